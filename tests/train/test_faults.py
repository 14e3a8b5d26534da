"""What goes wrong in a run: bad batches, full disks, damaged checkpoints and shards, too little memory."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch
from forks import forks
from runs import assert_same_run, curve, newest
from safetensors.torch import load_file, save_file
from stops import after

from matpac_fast import checkpoint
from matpac_fast.audio.corpus import Corpus
from matpac_fast.audio.prepare import prepare
from matpac_fast.errors import CheckpointError, ConfigError
from matpac_fast.model import Matpac
from matpac_fast.train import loop, state
from matpac_fast.train.logs import read_log
from matpac_fast.train.loop import pretrain
from matpac_fast.train.watch import TrainingError


class Poisoned:
    """Turns the log-mel of some steps into NaN, as damaged audio would."""

    def __init__(self, monkeypatch, steps):
        honest, calls = loop.ops.log_mel, iter(range(1_000))

        def log_mel(wave, config):
            spec = honest(wave, config)
            return spec * float("nan") if next(calls) in steps else spec

        monkeypatch.setattr(loop.ops, "log_mel", log_mel)


def test_bad_batches_are_skipped_and_their_clips_logged(tmp_path, corpus, model_config, train_config, monkeypatch):
    Poisoned(monkeypatch, {3, 7})
    assert pretrain(corpus, tmp_path / "run", model_config, train_config).finished
    skipped = [r for r in read_log(tmp_path / "run" / "log.jsonl") if r.get("event") == "skipped"]
    assert [r["step"] for r in skipped] == [4, 8]
    assert [len(r["clips"]) for r in skipped] == [4, 4]
    assert skipped[0]["clips"] == [f"clip-{i}.wav" for i in corpus.reads[3]]
    tensors = newest(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert tensors["optimizer/student.norm.weight/step"] == 10
    assert [r["step"] for r in curve(tmp_path / "run") if r["loss"] == "nan"] == [4, 8]


@pytest.mark.parametrize("log_every", [2, 100])  # on a CPU each step is looked at
def test_a_run_of_bad_batches_ends_the_run(tmp_path, corpus, model_config, train_config, monkeypatch, log_every):
    Poisoned(monkeypatch, set(range(5, 1_000)))
    config = dataclasses.replace(train_config, max_bad_steps=3, log_every=log_every)
    with pytest.raises(TrainingError, match="stopped at step 8: loss or gradient not finite for 3 steps in a row"):
        pretrain(corpus, tmp_path / "run", model_config, config)
    assert (tmp_path / "run" / "latest").read_text() == "step-00000004\n"
    assert all(tensor.isfinite().all() for tensor in newest(tmp_path / "run").values())


def test_a_run_without_a_checkpoint_offers_no_weights_to_begin_from(
    tmp_path, corpus, memory_corpus, model_config, train_config, monkeypatch
):
    with monkeypatch.context() as patch:
        Poisoned(patch, set(range(1_000)))
        with pytest.raises(TrainingError, match="stopped at step 3: "):
            pretrain(corpus, tmp_path / "run", model_config, dataclasses.replace(train_config, max_bad_steps=3))
    slower = dataclasses.replace(train_config, lr=1e-4)
    with pytest.raises(ConfigError, match=r"leave out --lr\. For another run, give a new folder to --out$"):
        pretrain(corpus, tmp_path / "run", model_config, slower)
    other = memory_corpus(corpus.frames, seed=4)
    with pytest.raises(ConfigError, match=r"no checkpoint yet: for a run on this corpus, give a new folder to --out$"):
        pretrain(other, tmp_path / "run", model_config, train_config)
    assert pretrain(corpus, tmp_path / "new", model_config, slower).finished


def test_bad_batches_apart_do_not_end_the_run(tmp_path, corpus, model_config, train_config, monkeypatch):
    Poisoned(monkeypatch, {1, 2, 4, 5, 7, 8})
    assert pretrain(corpus, tmp_path / "run", model_config, dataclasses.replace(train_config, max_bad_steps=3)).finished


@pytest.mark.parametrize("where", ["model", "optimizer", "latest"])
def test_a_full_disk_leaves_the_last_checkpoint_intact(
    tmp_path, corpus, model_config, train_config, monkeypatch, where
):
    pretrain(corpus, tmp_path / "whole", model_config, train_config)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    honest_save, honest_text = checkpoint.save, state.write_text

    def save(path, *args):
        (full if path.parent.name == "step-00000008.part" and path.stem == where else honest_save)(path, *args)

    def write_text(path, text):
        (full if path.name == where and "08" in text else honest_text)(path, text)

    says = "step-00000008: cannot be saved: No space left on device; step-00000004 is intact"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        patch.setattr(state, "write_text", write_text)
        with pytest.raises(CheckpointError, match=says):
            pretrain(corpus, tmp_path / "run", model_config, train_config)
    assert (tmp_path / "run" / "latest").read_text() == "step-00000004\n"
    assert not list((tmp_path / "run" / "checkpoints").glob("*.part"))
    pretrain(corpus, tmp_path / "run", model_config, train_config)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_whose_last_checkpoint_cannot_be_saved_has_not_finished(
    tmp_path, corpus, model_config, train_config, monkeypatch
):
    honest = checkpoint.save

    def save(path, *args):
        if path.parent.name == "step-00000012.part":
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save)
        says = "step-00000012: cannot be saved: No space left on device; step-00000008 is intact"
        with pytest.raises(CheckpointError, match=says):
            pretrain(corpus, tmp_path, model_config, train_config)
    assert [r["event"] for r in read_log(tmp_path / "log.jsonl") if "event" in r] == ["start", "failed"]
    assert pretrain(corpus, tmp_path, model_config, train_config).finished
    assert (tmp_path / "latest").read_text() == "step-00000012\n"


def limited(corpus, folder, model_config, train_config):
    """In a process of its own: no file may grow beyond what the log needs, as on a disk that is full."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        pretrain(corpus, folder, model_config, train_config)
    except CheckpointError as error:
        os._exit(3 if "step-00000008: cannot be saved" in str(error) and "step-00000004 is intact" in str(error) else 4)


def test_a_disk_that_is_really_full_is_said_so(tmp_path, corpus, model_config, train_config):
    pretrain(corpus, tmp_path / "run", model_config, train_config, stop=after(4))
    context = forks()
    process = context.Process(target=limited, args=(corpus, tmp_path / "run", model_config, train_config))
    process.start()
    process.join(60)
    assert process.exitcode == 3
    assert (tmp_path / "run" / "latest").read_text() == "step-00000004\n"
    assert pretrain(corpus, tmp_path / "run", model_config, train_config).finished


def test_a_first_write_that_was_torn_does_not_block_the_folder(tmp_path, corpus, model_config, train_config):
    (tmp_path / "run").mkdir()
    torn = tmp_path / "run" / ".config.json.abc.tmp"
    torn.write_text("{")
    assert pretrain(corpus, tmp_path / "run", model_config, train_config).finished
    assert not torn.exists()


def test_what_a_killed_save_left_behind_is_cleared(tmp_path, corpus, model_config, train_config):
    pretrain(corpus, tmp_path / "run", model_config, train_config, stop=after(5))
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000007.part").mkdir()
    shutil.copytree(checkpoints / "step-00000005", checkpoints / "step-00000008")  # renamed, but `latest` never moved
    (checkpoints / "step-00000008" / "model.safetensors").write_bytes(b"torn")
    assert pretrain(corpus, tmp_path / "run", model_config, train_config).finished
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-00000005", "step-00000008", "step-00000012"]
    load_file(checkpoints / "step-00000008" / "model.safetensors")


@pytest.mark.parametrize("damage", ["state.json", "model.safetensors", "optimizer.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, corpus, model_config, train_config, damage):
    pretrain(corpus, tmp_path / "run", model_config, train_config, stop=after(5))
    newest_folder = tmp_path / "run" / "checkpoints" / "step-00000005"
    (newest_folder / damage).write_bytes((newest_folder / damage).read_bytes()[:20])
    with pytest.raises(CheckpointError, match="step-00000005"):
        pretrain(corpus, tmp_path / "run", model_config, train_config)


@pytest.mark.parametrize(
    ("moment", "to", "says"),
    [
        ("student.norm.weight/exp_avg", None, r"the optimiser has state for \d+ of \d+ parameters"),
        ("student.norm.weight/exp_avg", torch.zeros(3), r"the optimiser's '.*' \(3,\) fits no trained parameter"),
        ("student.more/step", torch.zeros(()), r"the optimiser's 'student.more/step' \(\) fits no trained parameter"),
    ],
)
def test_an_optimiser_of_other_parameters_is_named(tmp_path, corpus, model_config, train_config, moment, to, says):
    """Before the sums are looked at, which say no more than that something changed."""
    pretrain(corpus, tmp_path / "run", model_config, train_config, stop=after(5))
    folder = tmp_path / "run" / "checkpoints" / "step-00000005"
    moments = load_file(folder / "optimizer.safetensors")
    if to is None:
        moments = {name: value for name, value in moments.items() if not name.startswith("student.norm.weight/")}
    else:
        moments[moment] = to
    save_file(moments, folder / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=f"step-00000005: {says}"):
        pretrain(corpus, tmp_path / "run", model_config, train_config)


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_a_bit_that_has_changed_is_noticed(tmp_path, corpus, model_config, train_config, name):
    run = tmp_path / "run"
    pretrain(corpus, run, model_config, train_config, stop=after(5))
    path = run / "checkpoints" / "step-00000005" / f"{name}.safetensors"
    held = bytearray(path.read_bytes())
    held[-5] ^= 64
    path.write_bytes(held)
    says = rf"{name}.safetensors: damaged: its bytes have changed since they were written. step-00000004 is intact"
    with pytest.raises(CheckpointError, match=says):
        pretrain(corpus, run, model_config, train_config)
    with pytest.raises(CheckpointError, match=says):
        pretrain(corpus, tmp_path / "b", model_config, train_config, init=run)


def test_a_run_without_its_configuration_says_how_to_use_its_weights(tmp_path, corpus, model_config, train_config):
    run = tmp_path / "a run"
    pretrain(corpus, run, model_config, train_config, stop=after(5))
    (run / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json is missing; to begin a run .*, add --init '") as caught:
        pretrain(corpus, run, model_config, train_config)
    (init,) = shlex.split(str(caught.value).rpartition("--init ")[2])
    assert pretrain(corpus, tmp_path / "b", model_config, train_config, init=init).finished


def test_the_newest_intact_checkpoint_is_named_beside_a_damaged_one(tmp_path, corpus, model_config, train_config):
    run = tmp_path / "a run"
    config = dataclasses.replace(train_config, save_every=2)
    pretrain(corpus, run, model_config, config, stop=after(6))
    weights = run / "checkpoints" / "step-00000006" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    (run / "checkpoints" / "step-00000004" / "state.json").write_text("{")
    with pytest.raises(
        CheckpointError, match=r"step-00000006/.*: damaged .*step-00000002 is intact: to go on"
    ) as caught:
        pretrain(corpus, run, model_config, config)
    with pytest.raises(CheckpointError, match=r"damaged .*step-00000002 is intact: to begin from it, --init '.*02'"):
        pretrain(corpus, tmp_path / "b", model_config, config, init=run)
    command = str(caught.value).rpartition("to go on from it, ")[2]
    subprocess.run(command, shell=True, check=True)  # does what it says
    assert pretrain(corpus, run, model_config, config).finished
    whole = tmp_path / "whole"
    pretrain(corpus, whole, model_config, config)
    assert_same_run(run, whole)
    for name in ("00000010", "00000012"):
        (run / "checkpoints" / f"step-{name}" / "optimizer.safetensors").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    with pytest.raises(CheckpointError, match=r"No other checkpoint of .* is intact"):
        pretrain(corpus, run, model_config, config)


@pytest.mark.parametrize("held", [b"{}", b"[]", b"\xff", b'{"step": 4, "seconds": 1.0}'])
def test_a_state_that_is_not_the_checkpoints_is_no_first_step(tmp_path, corpus, model_config, train_config, held):
    pretrain(corpus, tmp_path / "run", model_config, train_config, stop=after(5))
    (tmp_path / "run" / "checkpoints" / "step-00000005" / "state.json").write_bytes(held)
    with pytest.raises(CheckpointError, match=r"step-00000005/state.json: .*step-00000004 is intact"):
        pretrain(corpus, tmp_path / "run", model_config, train_config)


@pytest.mark.parametrize(
    "config", [b"\xff", b"[]", b'{"model": null, "train": {}}', b'{"model": {}, "train": {"lr": ""}}']
)
def test_a_damaged_config_is_named(tmp_path, config):
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(CheckpointError, match="config.json: damaged: "):
        state.read_config(tmp_path)


def test_damaged_bytes_in_latest_and_log_are_no_traceback(tmp_path, corpus, model_config, train_config):
    run = tmp_path / "run"
    pretrain(corpus, run, model_config, train_config, stop=after(5))
    lines = (run / "log.jsonl").read_bytes().splitlines(keepends=True)
    (run / "log.jsonl").write_bytes(b"".join([lines[0], b"\xff\n", *lines[1:]]))
    (run / "latest").write_bytes(b"\xff")
    assert state.steps_done(run) == 0
    with pytest.raises(CheckpointError, match="step-00000005 is intact"):
        pretrain(corpus, run, model_config, train_config)
    (run / "latest").write_text("step-00000005")
    assert state.steps_done(run) == 5
    pretrain(corpus, run, model_config, train_config)
    assert [record["step"] for record in curve(run)] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_no_longer_the_runs_is_not_written_to(tmp_path, corpus, model_config, train_config, replaced):
    run, asked = tmp_path / "run", iter(range(1, 1_000))

    def remove():
        if next(asked) == 1:  # nothing is being saved yet
            shutil.rmtree(run)
            if replaced:
                pretrain(corpus, run, model_config, train_config, stop=after(2))
        return False

    with pytest.raises(CheckpointError, match="was removed, moved or replaced"):
        pretrain(corpus, run, model_config, train_config, stop=remove)
    assert run.exists() == replaced
    assert not replaced or [path.name for path in run.glob("checkpoints/*")] == ["step-00000002"]


def test_a_shard_that_cannot_be_read_is_named_once_and_the_run_goes_on(tmp_path, corpus, model_config, train_config):
    corpus.gone = {2, 4}
    assert pretrain(corpus, tmp_path / "run", model_config, train_config).finished
    told = [r["text"] for r in read_log(tmp_path / "run" / "log.jsonl") if r.get("event") == "unreadable"]
    assert told == ["shards/00000.i16: cut short"]


def test_a_shard_that_is_cut_short_while_training_is_named_and_left_out(tmp_path, model_config, train_config):
    (tmp_path / "audio").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        soundfile.write(tmp_path / "audio" / f"{i}.wav", rng.uniform(-0.5, 0.5, 8_000), 16_000)
    prepare(tmp_path / "audio", tmp_path / "corpus")
    shard = tmp_path / "corpus" / "shards" / "00000.i16"
    asked = iter(range(1, 1_000))

    def cut():
        if next(asked) == 3:
            os.truncate(shard, shard.stat().st_size // 2)
        return False

    corpus = Corpus(tmp_path / "corpus")
    assert pretrain(corpus, tmp_path / "run", model_config, train_config, stop=cut).finished
    told = [r for r in read_log(tmp_path / "run" / "log.jsonl") if r.get("event") == "unreadable"]
    assert [r["text"].split(" to ")[0] for r in told] == [f"{shard}: cut short"]


@pytest.fixture
def room_for_one_crop(monkeypatch):
    """A model that has memory for one crop at a time."""
    honest = Matpac.forward

    def small_memory(self, spec, *args, **kwargs):
        if len(spec) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return honest(self, spec, *args, **kwargs)

    monkeypatch.setattr(Matpac, "forward", small_memory)


def test_out_of_memory_says_what_fits(tmp_path, corpus, model_config, train_config, room_for_one_crop, monkeypatch):
    monkeypatch.setattr(loop._Run, "can_try", True)  # as on a GPU
    says = (
        r"4 crops at a time do not fit into the memory of cpu, but 1 do: --grad-accumulation 4 computes the same step"
    )
    with pytest.raises(TrainingError, match=says):
        pretrain(corpus, tmp_path / "run", model_config, train_config)
    config = dataclasses.replace(train_config, grad_accumulation=4)
    assert pretrain(corpus, tmp_path / "fits", model_config, config).finished


def test_out_of_memory_proposes_where_nothing_can_be_tried(
    tmp_path, corpus, model_config, train_config, room_for_one_crop
):
    says = r"4 crops at a time do not fit into the memory of cpu: try 2, --grad-accumulation 2 computes the same step"
    with pytest.raises(TrainingError, match=says):
        pretrain(corpus, tmp_path / "run", model_config, train_config)
