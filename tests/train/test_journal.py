"""A run's log where effective ranks are found beside the training, as on a GPU."""

from __future__ import annotations

import errno
import threading
import tracemalloc

import pytest
import torch

from matpac_fast.config import MatpacConfig
from matpac_fast.errors import CheckpointError
from matpac_fast.nn.statistics import effective_rank
from matpac_fast.train import journal as module
from matpac_fast.train import logs
from matpac_fast.train.journal import Journal
from matpac_fast.train.logs import Log, Reporter, Reporters, iter_log, read_log

CONFIG = MatpacConfig.preset("nano")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


@pytest.fixture
def gate(monkeypatch):
    """Ranks are found once it is set."""
    gate = threading.Event()
    monkeypatch.setattr(module, "effective_rank", lambda gram: gate.wait(20) and effective_rank(gram))
    return gate


def gram(rank):
    return torch.diag(torch.tensor([1.0] * rank + [0.0] * (8 - rank), dtype=torch.float64))


def test_a_line_waits_for_its_rank_and_what_follows_for_the_line(path, gate):
    journal = Journal(Log(path), Reporters(), CONFIG, beside=True)
    journal.tell_measured({"step": 20, "loss": 1.0}, gram(4))
    journal.settle(wait=False)
    assert read_log(path) == []  # the training goes on
    gate.set()
    journal.tell({"event": "probe", "step": 20})
    first, second = read_log(path)
    assert first == {"step": 20, "loss": 1.0, "effective_rank": pytest.approx(4, rel=1e-4)}
    assert second["event"] == "probe"
    journal.tell_measured({"step": 40}, gram(2))
    journal.tell_measured({"step": 60}, None)
    journal.tell_measured({"step": 80}, gram(8))
    journal.close()
    assert [record["step"] for record in read_log(path)] == [20, 20, 40, 60, 80]
    assert read_log(path)[-1]["effective_rank"] == pytest.approx(8, rel=1e-4)


def test_it_is_told_without_a_wait_once_it_is_known(path, gate):
    journal = Journal(Log(path), Reporters(), CONFIG, beside=True)
    journal.tell_measured({"step": 20}, gram(4))
    gate.set()
    journal._pending[1].result()  # pyright: ignore[reportOptionalSubscript]
    journal.settle(wait=False)
    assert [record["step"] for record in read_log(path)] == [20]
    journal.close()


def test_all_that_was_told_is_on_the_disk_once_it_says_so(path, gate, monkeypatch):
    """A checkpoint is saved behind it, and a run that goes on from there tells no step before it again."""
    synced = []
    monkeypatch.setattr(logs.os, "fsync", lambda _: synced.append([record["step"] for record in read_log(path)]))
    journal = Journal(Log(path), Reporters(), CONFIG, beside=True)
    journal.tell_measured({"step": 20}, gram(4))
    gate.set()
    journal.sync()
    journal.close()
    assert synced == [[20]]


def test_a_log_that_does_not_reach_the_disk_says_so(path, monkeypatch):
    """As on a network's disk, which tells of no room only then."""

    def full(_):
        raise OSError(errno.ENOSPC, "No space left")

    log = Log(path)
    monkeypatch.setattr(logs.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"log\.jsonl: cannot be written: No space left$"):
        log.sync()
    log.close()


def test_a_rank_that_cannot_be_found_hides_not_what_ended_the_run(path, monkeypatch):
    def fails(gram):
        raise RuntimeError("no convergence")

    monkeypatch.setattr(module, "effective_rank", fails)
    journal = Journal(Log(path), Reporters(), CONFIG, beside=True)
    journal.tell({"event": "start", "step": 0})
    journal.tell_measured({"step": 20}, gram(4))
    journal.close()
    assert [record["step"] for record in read_log(path)] == [0]


def test_a_collapse_is_told_behind_its_line(path, gate):
    gate.set()
    heard = []
    reporter = Reporter()
    reporter.record = heard.append
    journal = Journal(Log(path), Reporters(reporter), CONFIG, beside=True)
    journal.tell_measured({"step": 20}, gram(1))
    journal.sync()
    journal.tell_measured({"step": 40}, gram(1))
    journal.close()
    told = [(record["step"], record.get("event")) for record in read_log(path)]
    assert told == [(20, None), (20, "warning"), (40, None)]
    assert [record["step"] for record in heard] == [20, 20, 40]


def test_the_gram_may_be_overwritten_by_the_next_step(path, gate):
    """As by a CUDA graph; on a GPU `cpu` copies."""
    journal = Journal(Log(path), Reporters(), CONFIG, beside=True)
    held = gram(4)
    held.cpu = held.clone  # pyright: ignore[reportAttributeAccessIssue]
    journal.tell_measured({"step": 20}, held)
    held.copy_(gram(1))
    gate.set()
    journal.close()
    assert read_log(path)[0]["effective_rank"] == pytest.approx(4, rel=1e-4)


def test_other_ranks_tell_and_compute_nothing(monkeypatch):
    monkeypatch.setattr(module, "effective_rank", None)
    journal = Journal(None, Reporters(), CONFIG, beside=True)
    journal.tell_measured({"step": 20}, gram(1))
    journal.tell({"event": "probe", "step": 20})
    journal.sync()
    journal.close()


def test_a_long_log_is_gone_on_with_in_little_memory(path):
    """Of what is written as it was read; as Python's objects it is many times as large."""
    lines = [f'{{"step": {step}, "loss": {step / 7}, "text": "{"x" * 300}"}}\n' for step in range(1, 20_001)]
    path.write_text("".join(lines) + '{"step": 20001, "lo')
    tracemalloc.start()
    Log(path, keep_until=19_000).close()
    assert any(record.get("step") == 19_000 for record in iter_log(path))
    assert tracemalloc.get_traced_memory()[1] < 2**20  # the log has 6.7 MB
    tracemalloc.stop()
    assert path.read_text() == "".join(lines[:19_000])
