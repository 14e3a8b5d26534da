"""What a run says and leaves where its end, its disk or its memory is not as it should be."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os

import numpy as np
import pytest
import torch
from runs import assert_same_run
from stops import after

from matpac_fast.errors import CheckpointError
from matpac_fast.model import Matpac
from matpac_fast.train import Reporter, feed, logs, loop, pretrain, read_log, state
from matpac_fast.train.flops import step_flops
from matpac_fast.train.watch import TrainingError


class Heard(Reporter):
    closed = False

    def close(self):
        self.closed = True


def events(folder):
    return [record["event"] for record in read_log(folder / "log.jsonl") if "event" in record]


@pytest.mark.parametrize(("begun", "intact"), [(0, ""), (4, "; step-00000004 is intact")])
def test_a_log_that_cannot_be_written_says_so_and_closes_everything(
    tmp_path, corpus, model_config, train_config, monkeypatch, begun, intact
):
    honest = open
    if begun:
        pretrain(corpus, tmp_path / "run", model_config, train_config, stop=after(begun))

    def small_disk(path, *args, **kwargs):
        file = honest(path, *args, **kwargs)
        if str(path).endswith("log.jsonl") and "a" in args:
            os.dup2(os.open("/dev/full", os.O_WRONLY), file.fileno())
        return file

    monkeypatch.setattr(logs, "open", small_disk, raising=False)
    heard = Heard()
    says = rf"log\.jsonl: cannot be written: No space left on device{intact}$"
    with pytest.raises(CheckpointError, match=says):
        pretrain(corpus, tmp_path / "run", model_config, train_config, reporter=heard)
    assert heard.closed


def test_a_disk_without_locks_is_warned_of(tmp_path, corpus, model_config, train_config, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match=r"run cannot be locked \(Function not implemented\)") as warned:
        assert pretrain(corpus, tmp_path / "run", model_config, train_config).finished
    assert [told.filename for told in warned] == [state.__file__]  # by which the command line knows it


def test_a_run_whose_latest_is_lost_goes_on(tmp_path, corpus, model_config, train_config):
    """As in a copy of a run that lacks the file; one that is there and cannot be read begins no other run either."""
    run = tmp_path / "run"
    pretrain(corpus, run, model_config, train_config, stop=after(8))
    (run / "latest").unlink()
    assert Matpac.load(run).config == model_config
    pretrain(corpus, run, model_config, train_config, stop=after(1))
    assert [r["step"] for r in read_log(run / "log.jsonl") if r.get("event") == "resume"] == [8]
    (run / "latest").unlink()
    (run / "latest").mkdir()
    with pytest.raises(CheckpointError, match="latest: cannot be read: Is a directory"):
        pretrain(corpus, run, model_config, train_config)


def test_a_kill_in_a_probe_loses_no_step(tmp_path, corpus, model_config, train_config):
    """The checkpoint of its step comes before it; and the probe is made when the run is gone on with."""
    steps = []

    def probe(state, config):
        steps.append(read_log(tmp_path / "run" / "log.jsonl")[-1]["step"])
        if steps == [0, 4]:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        pretrain(corpus, tmp_path / "run", model_config, train_config, probe=probe)
    for n in (4, 100):  # stopped at the next one's step, too
        pretrain(corpus, tmp_path / "run", model_config, train_config, probe=probe, stop=after(n))
    assert steps == [0, 4, 4, 8, 12]
    told = [(r["event"], r["step"]) for r in read_log(tmp_path / "run" / "log.jsonl") if "event" in r]
    resumed = [
        ("resume", 4),
        ("probe", 4),
        ("stopped", 8),
        ("resume", 8),
        ("probe", 8),
        ("probe", 12),
        ("finished", 12),
    ]
    assert told == [("start", 0), ("probe", 0), *resumed]


def test_a_probe_that_was_made_is_not_made_again(tmp_path, corpus, model_config, train_config):
    class Killed(Reporter):
        def step(self, step):
            if step == 5:
                raise KeyboardInterrupt

    def probe(state, config):
        steps.append(read_log(tmp_path / "run" / "log.jsonl")[-1]["step"])
        return {}

    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        pretrain(corpus, tmp_path / "run", model_config, train_config, probe=probe, reporter=Killed())
    pretrain(corpus, tmp_path / "run", model_config, train_config, probe=probe)
    assert steps == [0, 4, 8, 12]


def test_a_probe_may_train_what_it_is_given(tmp_path, corpus, model_config, train_config):
    def probe(state, config):
        for tensor in state.values():
            tensor.zero_()
        return {}

    pretrain(corpus, tmp_path / "unseen", model_config, train_config)
    pretrain(corpus, tmp_path / "probed", model_config, train_config, probe=probe)
    assert_same_run(tmp_path / "unseen", tmp_path / "probed")


def test_a_probes_numbers_may_be_numpys_and_torchs(tmp_path, corpus, model_config, train_config):
    class Board(Reporter):
        def record(self, record):
            if record.get("event") == "probe":
                heard.append(record)

    def probe(state, config):
        return {"a": np.float32(0.5), "b": torch.tensor(3), "c": np.float32("nan"), "d": [torch.tensor(float("inf"))]}

    heard = []
    pretrain(corpus, tmp_path / "run", model_config, train_config, probe=probe, reporter=Board())
    logged = [r for r in read_log(tmp_path / "run" / "log.jsonl") if r.get("event") == "probe"]
    assert [r["step"] for r in logged] == [r["step"] for r in heard] == [0, 4, 8, 12]
    assert logged[0].items() >= {"a": 0.5, "b": 3, "c": "nan"}.items()
    assert logged[0]["d"] == ["inf"]
    assert [type(heard[0][name]) for name in "abc"] == [float, int, float]  # which boards take for numbers


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "returned None; expected a dictionary of numbers"),
        ({"acc": torch.ones(2)}, r"returned tensor\(\[1\., 1\.\]\) as 'acc'; expected a number"),
        ({"acc": {1, 2}}, r"returned \{1, 2\} as 'acc'; expected a number"),
    ],
)
def test_what_a_probe_cannot_return_is_said(tmp_path, corpus, model_config, train_config, found, says):
    def judge(state, config):
        return found

    with pytest.raises(TrainingError, match=rf"^probe \S*judge {says}"):
        pretrain(corpus, tmp_path / "run", model_config, train_config, probe=judge)


def test_a_run_killed_before_its_first_checkpoint_begins_its_log_anew(tmp_path, corpus, model_config, train_config):
    def killed(state, config):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(corpus, tmp_path / "run", model_config, train_config, probe=killed)
    assert pretrain(corpus, tmp_path / "run", model_config, train_config).finished
    assert events(tmp_path / "run") == ["start", "finished"]


def test_what_follows_the_last_step_is_done_after_a_kill_too(tmp_path, corpus, model_config, train_config):
    def killed(state, config):
        if len(calls) == 1:  # the second one, after the last step
            raise KeyboardInterrupt
        calls.append(state)
        return {"student_knn": 0.5}

    calls: list = []
    config = dataclasses.replace(train_config, probe_every=100)
    with pytest.raises(KeyboardInterrupt):
        pretrain(corpus, tmp_path / "run", model_config, config, probe=killed)
    assert events(tmp_path / "run") == ["start", "probe"]
    again = lambda state, config: {"student_knn": 0.75}  # noqa: E731
    assert pretrain(corpus, tmp_path / "run", model_config, config, probe=again).finished
    assert events(tmp_path / "run") == ["start", "probe", "resume", "probe", "finished"]
    assert pretrain(corpus, tmp_path / "run", model_config, config, probe=again).finished
    assert len(events(tmp_path / "run")) == 5  # nothing is left to do


def test_the_log_tells_the_options_in_force(tmp_path, corpus, model_config, train_config):
    pretrain(corpus, tmp_path / "run", model_config, train_config, stop=after(4))
    config = dataclasses.replace(train_config, grad_accumulation=2, save_every=3, max_bad_steps=5)
    pretrain(corpus, tmp_path / "run", model_config, config)
    first, second = (r["config"] for r in read_log(tmp_path / "run" / "log.jsonl") if "config" in r)
    assert [c["train"]["grad_accumulation"] for c in (first, second)] == [1, 2]
    assert [c["train"]["max_bad_steps"] for c in (first, second)] == [10, 5]
    assert first["corpus"] == second["corpus"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 12"),
    ],
)
@pytest.mark.parametrize(("largest", "pieces"), [(2, 3), (1, 6)])
def test_pieces_of_any_size_are_tried(
    tmp_path, corpus, model_config, train_config, monkeypatch, error, largest, pieces
):
    honest = Matpac.forward

    def small_memory(self, spec, *args, **kwargs):
        if len(spec) > largest:
            raise error
        return honest(self, spec, *args, **kwargs)

    monkeypatch.setattr(Matpac, "forward", small_memory)
    monkeypatch.setattr(loop._Run, "can_try", True)  # as on a GPU
    config = dataclasses.replace(train_config, batch_size=6)
    says = (
        f"6 crops at a time do not fit into the memory of cpu, but {largest} do: --grad-accumulation {pieces} computes"
    )
    with pytest.raises(TrainingError, match=says):
        pretrain(corpus, tmp_path / "run", model_config, config)


def test_whatever_stops_a_smaller_piece_it_is_not_proposed(tmp_path, corpus, model_config, train_config, monkeypatch):
    def small_memory(self, spec, *args, **kwargs):
        raise RuntimeError("out of memory" if len(spec) > 2 else "words that no library has said yet")

    monkeypatch.setattr(Matpac, "forward", small_memory)
    monkeypatch.setattr(loop._Run, "can_try", True)
    with pytest.raises(TrainingError, match="4 crops at a time do not fit into the memory of cpu, nor do fewer"):
        pretrain(corpus, tmp_path / "run", model_config, train_config)


def test_other_errors_are_not_taken_for_memory(tmp_path, corpus, model_config, train_config, monkeypatch):
    def wrong(self, *args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Matpac, "forward", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        pretrain(corpus, tmp_path / "run", model_config, train_config)
    assert events(tmp_path / "run") == ["start", "failed"]


def test_a_batch_that_does_not_fit_beside_the_step_says_so(tmp_path, corpus, model_config, train_config, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(feed, "read_batch", full)
    with pytest.raises(TrainingError, match="the next batch does not fit into the memory of cpu beside the step"):
        pretrain(corpus, tmp_path / "run", model_config, train_config)


def test_a_failure_before_the_first_step_is_in_the_log(tmp_path, corpus, model_config, train_config, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("no room for Adam")

    monkeypatch.setattr(loop, "make_optimizer", full)
    with pytest.raises(torch.OutOfMemoryError):
        pretrain(corpus, tmp_path / "run", model_config, train_config)
    assert read_log(tmp_path / "run" / "log.jsonl") == [{"event": "failed", "text": "no room for Adam"}]


def test_a_reporter_that_fails_at_the_end_hides_no_error(tmp_path, corpus, model_config, train_config, monkeypatch):
    class Board(Reporter):
        def record(self, record):
            if record.get("event") == "failed":
                raise RuntimeError("the board is offline")

    monkeypatch.setattr(loop, "train_step", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match=r"Board\.record failed"):
        pretrain(corpus, tmp_path / "run", model_config, train_config, reporter=Board())


def test_the_mfu_is_that_of_the_crops_that_were_drawn(tmp_path, corpus, model_config, train_config, monkeypatch):
    monkeypatch.setattr(loop, "peak_flops", lambda device, precision: 1e9)
    config = dataclasses.replace(train_config, crop_frames=(16, 32), log_every=12)
    drawn = []
    honest = loop.train_step

    def train_step(model, optimizer, pieces, *args):
        drawn.append(pieces[0][0].shape[2])
        return honest(model, optimizer, pieces, *args)

    monkeypatch.setattr(loop, "train_step", train_step)
    pretrain(corpus, tmp_path / "run", model_config, config)
    assert set(drawn) == {16, 32}
    (line,) = [record for record in read_log(tmp_path / "run" / "log.jsonl") if "loss" in record]
    flops = sum(step_flops(model_config, n) for n in drawn) / len(drawn)  # a crop
    assert line["mfu"] == pytest.approx(line["crops_per_s"] * flops / 1e9)
