"""Whole runs: resume to the bit, what a folder holds, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from runs import assert_same_run, curve, newest
from stops import after

from matpac_fast import checkpoint, ops
from matpac_fast.encoder import load_encoder
from matpac_fast.errors import CheckpointError, ConfigError
from matpac_fast.model import Matpac
from matpac_fast.train import journal, loop, state
from matpac_fast.train.logs import Log, Reporter, read_log
from matpac_fast.train.loop import pretrain
from matpac_fast.train.schedule import learning_rate
from matpac_fast.train.state import RunFolder, Snapshot
from matpac_fast.train.step import make_optimizer, train_step
from matpac_fast.train.watch import collapse
from matpac_fast.train.weights import load_weights, weights_sizes


class Recorder(Reporter):
    def __init__(self):
        self.steps, self.records = [], []

    def step(self, step):
        self.steps.append(step)

    def record(self, record):
        self.records.append(record)


@pytest.mark.parametrize("interrupted", [(6,), (1, 2, 5)])
def test_resume_is_exact_to_the_bit(tmp_path, corpus, model_config, train_config, interrupted):
    assert pretrain(corpus, tmp_path / "whole", model_config, train_config).finished
    for steps in interrupted:
        result = pretrain(corpus, tmp_path / "parts", model_config, train_config, stop=after(steps))
        assert not result.finished
    assert result.step == sum(interrupted)
    assert pretrain(corpus, tmp_path / "parts", model_config, train_config) == loop.Result(tmp_path / "parts", 12, True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    events = [r["event"] for r in read_log(tmp_path / "parts" / "log.jsonl") if "event" in r]
    assert events == ["start", *["stopped", "resume"] * len(interrupted), "finished"]


def test_resume_is_exact_with_mcl_short_clips_several_crops_and_accumulation(
    tmp_path, memory_corpus, model_config, train_config
):
    corpus = memory_corpus([700, 2_000, 9_000, 12_000, 5_360])
    model = model_config.replace(mcl_heads=3)
    config = dataclasses.replace(train_config, pad_short="repeat", crop_frames=(16, 32), grad_accumulation=2)
    pretrain(corpus, tmp_path / "whole", model, config)
    pretrain(corpus, tmp_path / "parts", model, config, stop=after(5))
    pretrain(corpus, tmp_path / "parts", model, config)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_the_applications_default_device_changes_nothing(tmp_path, corpus, model_config, train_config):
    pretrain(corpus, tmp_path / "plain", model_config, train_config, "cpu")
    with torch.device("meta"):  # as torch.set_default_device("cuda")
        pretrain(corpus, tmp_path / "changed", model_config, train_config, "cpu")
    assert_same_run(tmp_path / "plain", tmp_path / "changed")


def test_what_was_done_after_the_last_checkpoint_is_done_again(tmp_path, corpus, model_config, train_config):
    """As after SIGKILL: the log goes further than the checkpoint, and its last line is torn."""
    pretrain(corpus, tmp_path / "whole", model_config, train_config)
    pretrain(corpus, tmp_path / "killed", model_config, train_config, stop=after(8))
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-00000008")
    (tmp_path / "killed" / "latest").write_text("step-00000004\n")
    with open(tmp_path / "killed" / "log.jsonl", "a") as file:
        file.write('{"step": 10, "lo')
    pretrain(corpus, tmp_path / "killed", model_config, train_config)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_seed_and_data_matter(tmp_path, corpus, memory_corpus, model_config, train_config):
    pretrain(corpus, tmp_path / "a", model_config, train_config)
    pretrain(corpus, tmp_path / "b", model_config, dataclasses.replace(train_config, seed=1))
    pretrain(memory_corpus(corpus.frames, seed=1), tmp_path / "c", model_config, train_config)
    losses = [[r["loss"] for r in curve(tmp_path / name)] for name in "abc"]
    assert losses[0] != losses[1]
    assert losses[0] != losses[2]


def test_the_folder_holds_what_it_promises(tmp_path, corpus, model_config, train_config):
    config = dataclasses.replace(train_config, keep_last=2)
    recorder = Recorder()
    pretrain(corpus, tmp_path / "run", model_config, config, reporter=recorder)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]
    newest_folder = tmp_path / "run" / "checkpoints" / "step-00000012"
    assert sorted(p.name for p in newest_folder.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert checkpoint.find_weights(tmp_path / "run") == newest_folder / "model.safetensors"
    weights, metadata = checkpoint.load(newest_folder / "model.safetensors")
    assert metadata["config"] == model_config.to_dict()
    assert metadata["step"] == 12
    Matpac(model_config).load_state_dict(weights)

    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["train"]["steps"] == 12
    assert stored["corpus"] == {"fingerprint": "noise-0-11", "clips": 11}
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert records[0]["event"] == "start"
    assert records[0]["config"] == stored
    assert records[0]["versions"]["torch"] == torch.__version__
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 6, 8, 10, 12]
    for record in records[1:-1]:
        assert record.keys() >= {
            "loss",
            "loss_pred",
            "loss_cls",
            "grad_norm",
            "lr",
            "crops_per_s",
            "data_wait",
            "epoch",
        }
        assert record["loss"] == pytest.approx(0.5 * record["loss_pred"] + 0.5 * record["loss_cls"], rel=1e-5)
        assert 0 <= record["data_wait"] <= 1
        assert record["teacher_perplexity"] > 1
    assert recorder.steps == list(range(1, 13))
    assert recorder.records == records


def test_the_last_step_is_logged_and_each_line_has_the_rate_of_its_step(tmp_path, corpus, model_config, train_config):
    config = dataclasses.replace(train_config, steps=5, warmup=3)
    pretrain(corpus, tmp_path / "run", model_config, config)
    rates = [(step, learning_rate(step - 1, config.lr, 3, 5)) for step in (2, 4, 5)]
    assert [(r["step"], r["lr"]) for r in curve(tmp_path / "run")] == rates


def test_the_speed_leaves_out_what_saving_and_probing_took(tmp_path, corpus, model_config, train_config, monkeypatch):
    for name in ("save", "run_probe"):
        monkeypatch.setattr(loop._Run, name, lambda self: -1e6)  # seconds, which the steps then seem to have taken
    config = dataclasses.replace(train_config, probe_every=6)
    pretrain(corpus, tmp_path / "run", model_config, config, probe=lambda state, config: {})
    speeds = [(r["step"], r["crops_per_s"]) for r in read_log(tmp_path / "run" / "log.jsonl") if "loss" in r]
    assert [step for step, speed in speeds if speed < 1] == [6, 8, 10]  # after the steps 4, 6 and 8


def test_the_wait_for_data_is_that_of_each_line(tmp_path, corpus, model_config, train_config, monkeypatch):
    class Slow(loop.Feed):
        def __next__(self):
            batch = super().__next__()
            self.waited += 1e6 * (batch.plan.step == 0)
            return batch

    monkeypatch.setattr(loop, "Feed", Slow)
    pretrain(corpus, tmp_path / "run", model_config, train_config)
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert [r["step"] for r in records if r.get("data_wait", 0) > 1] == [2]


def test_what_a_checkpoint_says_of_before_is_on_the_disk_before_it(
    tmp_path, corpus, model_config, train_config, monkeypatch
):
    """The log's lines up to it; then its folder under its name, and only then that it is the newest."""
    did = []

    def noted(name, honest):
        def call(*args):
            did.append(f"{name} {args[0].name}" if name == "write" else name)
            return honest(*args)

        return call

    monkeypatch.setattr(Log, "sync", noted("log", Log.sync))
    monkeypatch.setattr(state.os, "rename", noted("rename", state.os.rename))
    monkeypatch.setattr(state, "sync_folder", noted("sync", state.sync_folder))
    monkeypatch.setattr(state, "write_text", noted("write", state.write_text))
    pretrain(corpus, tmp_path / "run", model_config, dataclasses.replace(train_config, steps=4))
    assert did == ["write config.json", "log", "write state.json", "rename", "sync", "write latest"]


def test_a_runs_seconds_go_on_where_they_were(tmp_path, corpus, model_config, train_config):
    pretrain(corpus, tmp_path / "run", model_config, train_config, stop=after(4))
    before = tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json"
    before.write_text(json.dumps({"step": 4, "seconds": 1e6}))
    pretrain(corpus, tmp_path / "run", model_config, train_config)
    later = json.loads((tmp_path / "run" / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert 1e6 < later["seconds"] < 1e6 + 600


def test_a_finished_run_stays_as_it_is(tmp_path, corpus, model_config, train_config):
    pretrain(corpus, tmp_path / "run", model_config, train_config)
    before = newest(tmp_path / "run")
    recorder = Recorder()
    assert pretrain(corpus, tmp_path / "run", model_config, train_config, reporter=recorder).finished
    assert recorder.steps == recorder.records == []
    assert all(torch.equal(tensor, newest(tmp_path / "run")[name]) for name, tensor in before.items())


def test_another_config_is_refused_with_what_differs(tmp_path, corpus, memory_corpus, model_config, train_config):
    pretrain(corpus, tmp_path / "run", model_config, train_config, stop=after(2))
    other = dataclasses.replace(train_config, lr=0.5, save_every=3, log_every=1)
    with pytest.raises(ConfigError) as caught:
        pretrain(corpus, tmp_path / "run", model_config.replace(depth=2), other)
    message = str(caught.value)
    assert "model.depth is 1 there and 2 here" in message
    assert "train.lr is 0.001 there and 0.5 here" in message
    assert "save_every" not in message
    assert "To go on with it, leave out --preset, --lr. For another run, give a new folder to --out" in message
    assert message.endswith(f", with --init {tmp_path / 'run'} for one from its weights")
    official = dataclasses.replace(train_config, stretch_decays=False)
    with pytest.raises(ConfigError, match=r"To go on with it, leave out --no-stretch-decays\. For another run"):
        pretrain(corpus, tmp_path / "run", model_config, official)
    norm = dataclasses.replace(train_config, clip_norm=1.0)  # it has no option of its own
    with pytest.raises(
        ConfigError, match=r"1\.0 here \(--set train\.clip_norm\)\. To go on with it, leave out --set tr"
    ):
        pretrain(corpus, tmp_path / "run", model_config, norm)
    changed = "its corpus is another one, or has grown or changed since. To go on with its weights on this corpus"
    with pytest.raises(ConfigError, match=changed):
        pretrain(memory_corpus(corpus.frames, seed=4), tmp_path / "run", model_config, train_config)
    # Bookkeeping may change.
    assert pretrain(corpus, tmp_path / "run", model_config, dataclasses.replace(train_config, save_every=3)).finished


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, corpus, model_config, train_config):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        pretrain(corpus, tmp_path, model_config, train_config)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("frames", [24, 48])
def test_crops_that_the_model_cannot_take_are_refused_before_the_run_begins(
    tmp_path, corpus, model_config, train_config, frames
):
    config = dataclasses.replace(train_config, crop_frames=(32, frames))
    with pytest.raises(ConfigError, match=f"crop_frames holds {frames}; expected multiples of 16, of at most"):
        pretrain(corpus, tmp_path / "run", model_config, config)
    assert not (tmp_path / "run").exists()


def test_a_short_crop_that_is_masked_whole_is_refused_before_the_run_begins(
    tmp_path, corpus, model_config, train_config
):
    config = dataclasses.replace(train_config, crop_frames=(32, 16))
    says = "a crop of 16 frames has 5 patches, of which a mask_ratio of 0.85 leaves 0 visible; expected at least one"
    with pytest.raises(ConfigError, match=says):
        pretrain(corpus, tmp_path / "run", model_config.replace(mask_ratio=0.85), config)
    assert not (tmp_path / "run").exists()


def test_nothing_is_left_where_no_clip_is_long_enough(tmp_path, memory_corpus, model_config, train_config):
    with pytest.raises(ConfigError, match="the longest of 2 has 40"):
        pretrain(memory_corpus([30, 40]), tmp_path / "run", model_config, train_config)
    assert not (tmp_path / "run").exists()


def test_two_processes_cannot_train_into_one_folder(tmp_path, corpus, model_config, train_config):
    with RunFolder(tmp_path / "run").locked(), pytest.raises(ConfigError, match="another process is training"):
        pretrain(corpus, tmp_path / "run", model_config, train_config)


def test_a_snapshot_is_a_copy(model_config, train_config):
    model = Matpac(model_config)
    optimizer = make_optimizer(model, train_config)
    spec = torch.randn(4, 80, 32)
    ids_shuffle = ops.mask_shuffle(0, 0, torch.arange(4), 10)
    for step in (1, 2):
        train_step(model, optimizer, [(spec, ids_shuffle)], step, 1e-3, 3.0)
    snapshot = Snapshot.take(model, optimizer, {"step": 2})
    kept = {name: tensor.clone() for name, tensor in (snapshot.model | snapshot.optimizer).items()}
    train_step(model, optimizer, [(spec, ids_shuffle)], 3, 1e-3, 3.0)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in (snapshot.model | snapshot.optimizer).items())
    assert not torch.equal(snapshot.model["student.norm.weight"], model.student.norm.weight)
    assert not torch.equal(snapshot.model["center"], model.center)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, corpus, model_config, train_config, monkeypatch):
    gone_on, waited, save = threading.Event(), [], RunFolder.save

    def slow(self, snapshot, *args):
        if snapshot.state["step"] == 4:
            waited.append(gone_on.wait(timeout=10))
        save(self, snapshot, *args)

    class Watching(Reporter):
        def step(self, step):
            if step == 6:
                gone_on.set()

    monkeypatch.setattr(RunFolder, "save", slow)
    assert pretrain(corpus, tmp_path / "run", model_config, train_config, reporter=Watching()).finished
    assert waited == [True]


def test_checkpoints_to_keep_are_kept(tmp_path, corpus, model_config, train_config):
    config = dataclasses.replace(train_config, save_every=2, keep_last=2, keep_every=4)
    pretrain(corpus, tmp_path / "run", model_config, config)
    kept = [int(p.name.removeprefix("step-")) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(kept) == [4, 8, 10, 12]


@pytest.mark.parametrize("keep_every", [None, 4])
def test_copies_that_somebody_made_beside_the_checkpoints_stay(
    tmp_path, corpus, model_config, train_config, keep_every
):
    config = dataclasses.replace(train_config, keep_last=1, keep_every=keep_every)
    pretrain(corpus, tmp_path, model_config, config, stop=after(4))
    for name in ("step-00000004-best", "step-00000004.bak"):
        shutil.copytree(tmp_path / "checkpoints" / "step-00000004", tmp_path / "checkpoints" / name)
    assert pretrain(corpus, tmp_path, model_config, config).finished
    assert {"step-00000004-best", "step-00000004.bak"} < {p.name for p in tmp_path.glob("checkpoints/*")}


def test_init_starts_from_given_weights(tmp_path, corpus, model_config, train_config):
    pretrain(corpus, tmp_path / "a", model_config, train_config)
    longer = model_config.replace(n_frames=48)  # another crop length than the weights were trained on
    config = dataclasses.replace(train_config, pad_short="zeros")
    pretrain(corpus, tmp_path / "b", longer, config, init=tmp_path / "a", stop=after(1))
    old, new = newest(tmp_path / "a"), newest(tmp_path / "b")
    # The first step has a rate of 0: what it started from is still there.
    assert torch.equal(old["model/student.norm.weight"], new["model/student.norm.weight"])
    assert not torch.equal(old["model/student.norm.weight"], torch.ones(16))
    assert new["model/frontend.pos_embed"].shape[1] == 1 + 5 * 3

    official = Matpac(model_config)
    torch.save({"model": official.official_state_dict()}, tmp_path / "official.pt")
    pretrain(corpus, tmp_path / "c", model_config, train_config, init=tmp_path / "official.pt", stop=after(1))
    assert torch.equal(newest(tmp_path / "c")["model/head.mlp.0.weight"], official.head.mlp[0].weight)
    told = "another model: depth is 1 there and 2 here, mcl_heads is 0 there and 3 here; make this one as it is there"
    other = model_config.replace(depth=2, mcl_heads=3)
    for weights in ("a", "official.pt"):
        with pytest.raises(CheckpointError, match=told):
            pretrain(corpus, tmp_path / "d", other, train_config, init=tmp_path / weights)
    assert pretrain(corpus, tmp_path / "d", model_config, train_config).finished  # nothing was begun there
    load_encoder(tmp_path / "a").save(tmp_path / "encoder")
    with pytest.raises(CheckpointError, match="encoder: an encoder alone; expected a training checkpoint"):
        pretrain(corpus, tmp_path / "e", model_config, train_config, init=tmp_path / "encoder")


@pytest.mark.parametrize("name", ["matpac-nano", "untrained-tiny", "passt:weights.pt"])
def test_init_knows_a_registered_encoder_for_one(model_config, name):
    for take in (weights_sizes, lambda source: load_weights(Matpac(model_config), source)):
        with pytest.raises(CheckpointError, match=f"^{name}: an encoder alone; expected a training checkpoint"):
            take(name)


def test_a_file_of_that_name_is_one(tmp_path, model_config, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Matpac(model_config).save("matpac-nano")
    load_weights(Matpac(model_config), "matpac-nano")


def test_what_a_file_does_not_say_of_its_sizes_is_as_given(tmp_path, model_config):
    """Of official weights the heads, which are no 64 channels here; of bare ones the mels too."""
    model = Matpac(model_config.replace(n_mels=128, n_frames=80))
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    torch.save(Matpac(model_config).official_state_dict(), tmp_path / "official.pt")
    given = {"num_heads": 2, "n_mels": 128, "predictor_heads": 2}
    for name, n_mels in (("bare.pt", 128), ("official.pt", 80)):
        sizes = weights_sizes(tmp_path / name, given)
        assert (sizes["num_heads"], sizes["n_mels"], sizes["predictor_heads"]) == (2, n_mels, 2)
    model.save(tmp_path / "ours")
    assert (
        weights_sizes(tmp_path / "ours", {"num_heads": 4, "n_mels": 64, "predictor_heads": 1}).items() >= given.items()
    )


def test_init_refuses_weights_of_another_model_whose_shapes_fit(tmp_path, model_config):
    Matpac(model_config.replace(n_mels=128, num_heads=4)).save(tmp_path / "a")
    assert weights_sizes(tmp_path / "a")["n_mels"] == 128
    model = Matpac(model_config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = "another model: n_mels is 128 there and 80 here, num_heads is 4 there and 2 here; make this one"
    with pytest.raises(CheckpointError, match=told):
        load_weights(model, tmp_path / "a")
    Matpac(model_config.replace(predictor_heads=1)).save(tmp_path / "b")
    with pytest.raises(CheckpointError, match="another model: predictor_heads is 1 there and 2 here"):
        load_weights(model, tmp_path / "b")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.save({"model": model.official_state_dict()}, tmp_path / "official.pt")
    with pytest.raises(CheckpointError, match="another model: n_mels is 80 there and 64 here"):
        load_weights(Matpac(model_config.replace(n_mels=64)), tmp_path / "official.pt")


def test_a_corpus_of_another_rate_is_refused(tmp_path, corpus, model_config, train_config):
    corpus.sample_rate = 44_100
    with pytest.raises(ConfigError, match="the corpus is at 44100 Hz; expected 16000 Hz"):
        pretrain(corpus, tmp_path / "run", model_config, train_config)


def test_collapse_is_seen():
    healthy = {"spread_target": 1 / 16, "effective_rank": 90.0, "teacher_perplexity": 100.0, "teacher_entropy": 5.0}
    assert collapse(healthy, 256, 512) is None
    assert "to one point" in str(collapse(healthy | {"spread_target": 0.04 / 16}, 256, 512))
    assert "to one direction" in str(collapse(healthy | {"effective_rank": 1.9}, 256, 512))
    assert "to one class" in str(collapse(healthy | {"teacher_perplexity": 1.1}, 256, 512))
    assert "to all classes" in str(collapse(healthy | {"teacher_entropy": 6.2}, 256, 512))


def test_a_collapse_is_warned_of_once_while_it_lasts(tmp_path, corpus, model_config, train_config, monkeypatch):
    found = iter([None, "collapsing", "collapsing", None, "collapsing", None])
    monkeypatch.setattr(journal, "collapse", lambda values, width, prototypes: next(found))
    pretrain(corpus, tmp_path / "run", model_config, train_config)
    assert [r["step"] for r in read_log(tmp_path / "run" / "log.jsonl") if r.get("event") == "warning"] == [4, 10]


def test_loss_falls_on_tones(tmp_path, memory_corpus, model_config, train_config):
    """Learning, not only running: clips of steady tones are predictable from the patches around."""
    corpus = memory_corpus([8_000] * 16)
    time = np.arange(8_000) / 16_000
    corpus.clips = [(8_000 * np.sin(2 * np.pi * 150 * 1.25**i * time)).astype(np.int16) for i in range(16)]
    config = dataclasses.replace(train_config, steps=40, batch_size=8, lr=5e-3, log_every=5, save_every=40)
    pretrain(corpus, tmp_path / "run", model_config, config)
    losses = [r["loss_pred"] for r in curve(tmp_path / "run")]
    assert losses[-1] < 0.5 * losses[0]
