"""Several processes train one model: the curve of one, on other numbers of ranks, and however it ends."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import socket
import types
from typing import Any

import pytest
import torch
from forks import forks
from ranks import free_port, needs_shards, on_ranks, rank_main, train
from runs import assert_same_curve, curve, newest
from stops import after

from matpac_fast import ops
from matpac_fast.errors import ConfigError
from matpac_fast.train import distributed, joining, lifeline, pretrain, read_log
from matpac_fast.train import loop as training
from matpac_fast.train.begin import check_options


@pytest.fixture
def whole(tmp_path, corpus, model_config, train_config):
    """The run of one process."""
    pretrain(corpus, tmp_path / "one", model_config, train_config, "cpu")
    return tmp_path / "one"


@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=needs_shards)], ids=["ddp", "fsdp"])
def test_two_ranks_draw_the_curve_of_one(tmp_path, corpus, model_config, train_config, whole, shard):
    config = dataclasses.replace(train_config, grad_accumulation=2, shard=shard)
    assert on_ranks(2, train, corpus, tmp_path / "two", model_config, config) == {0: (12, True), 1: (12, True)}
    assert_same_curve(whole, tmp_path / "two")
    assert sum(r.get("event") == "start" for r in read_log(tmp_path / "two" / "log.jsonl")) == 1
    # The curve is not a constant that anything would match.
    losses = [r["loss"] for r in curve(whole)]
    assert max(losses) - min(losses) > 0.01


@needs_shards
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, corpus, model_config, train_config, whole):
    """Begun by one, gone on with by four with a part of the model each, by two with all of it, ended by two halves.

    Four hold less than a row of some tensors, and nothing of others.
    """
    run = tmp_path / "run"
    parts = dataclasses.replace(train_config, shard=True)
    assert pretrain(corpus, run, model_config, train_config, "cpu", stop=after(3)).step == 3
    stopped = on_ranks(4, train, corpus, run, model_config, parts, 2)
    assert set(stopped.values()) == {(6, False)}  # all of them learn of it one step later, and save the same step
    assert set(on_ranks(2, train, corpus, run, model_config, train_config, 2).values()) == {(9, False)}
    assert set(on_ranks(2, train, corpus, run, model_config, parts).values()) == {(12, True)}
    assert_same_curve(whole, run)
    assert [r["ranks"] for r in read_log(run / "log.jsonl") if r.get("event") in ("start", "resume")] == [1, 4, 2, 2]


def poisoned(rank, corpus, folder, model, config):
    """NaN in rank 1's part of step 4 only, and a shard that only its clips are in."""
    honest, calls = ops.log_mel, iter(range(1_000))
    training.ops.log_mel = lambda wave, mel: honest(wave, mel) * (float("nan") if rank == next(calls) - 2 else 1.0)
    if rank == 1:
        corpus.gone = {9}
    return train(rank, corpus, folder, model, config)


def test_what_is_wrong_on_one_rank_counts_for_all(tmp_path, corpus, model_config, train_config):
    assert on_ranks(2, poisoned, corpus, tmp_path / "run", model_config, train_config) == {0: (12, True), 1: (12, True)}
    records = read_log(tmp_path / "run" / "log.jsonl")
    skipped = [r for r in records if r.get("event") == "skipped"]
    assert [r["step"] for r in skipped] == [3, 4]  # rank 0's third step, rank 1's fourth
    assert [len(r["clips"]) for r in skipped] == [4, 4]  # those of both ranks
    assert [r["text"] for r in records if r.get("event") == "unreadable"] == ["shards/00001.i16: cut short"]
    found = newest(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert found["optimizer/student.norm.weight/step"] == 10


def failing(rank, corpus, folder, model, config, how):
    honest, calls = training.train_step, iter(range(1_000))

    def train_step(*args, **kwargs):
        if next(calls) == 5 and rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise torch.OutOfMemoryError("out of memory") if how == "memory" else ValueError("of a sudden")
        return honest(*args, **kwargs)

    training.train_step = train_step
    return train(rank, corpus, folder, model, config)


@pytest.mark.parametrize(
    ("how", "own", "reason"),
    [
        ("error", "ValueError: of a sudden", "rank 1: of a sudden"),
        ("memory", "TrainingError: 2 crops at a time do not fit", "rank 1: 2 crops at a time do not fit into the mem"),
        ("killed", None, f"rank 1 on {socket.gethostname()} ended and gave no reason, as where"),
    ],
)
def test_a_rank_that_fails_ends_the_run_with_its_reason(tmp_path, corpus, model_config, train_config, how, own, reason):
    answers = on_ranks(2, failing, corpus, tmp_path / "run", model_config, train_config, how)
    assert answers[0].startswith(f"PeerError: {reason}")
    assert answers.get(1) is None if own is None else answers[1].startswith(own)
    last = read_log(tmp_path / "run" / "log.jsonl")[-1]
    assert last["event"] == "failed"
    assert last["text"].startswith(reason)
    # The last checkpoint is intact, and the run goes on from it.
    assert json.loads((tmp_path / "run/checkpoints/step-00000004/state.json").read_text())["step"] == 4
    assert pretrain(corpus, tmp_path / "run", model_config, train_config, "cpu").finished


def test_what_rank_0_refuses_ends_every_rank(tmp_path, corpus, model_config, train_config):
    (tmp_path / "thesis.txt").write_text("do not touch")
    answers = on_ranks(2, train, corpus, tmp_path, model_config, train_config)
    assert "is not empty and holds no run" in answers[0]
    assert answers[0].startswith("ConfigError")
    assert answers[1].startswith("PeerError: rank 0:")


def other_options(rank, corpus, folder, model, configs):
    return train(rank, corpus, folder, model.replace(ema_end=0.9 + 0.09 * rank), configs[rank])


def test_the_options_of_rank_0_count(tmp_path, corpus, model_config, train_config):
    """Where the others do not see the folder of a run, they know only the command's defaults."""
    other = dataclasses.replace(train_config, steps=20, batch_size=8, seed=1, lr=0.1)
    answers = on_ranks(2, other_options, corpus, tmp_path / "two", model_config, [train_config, other])
    assert answers == {0: (12, True), 1: (12, True)}
    pretrain(corpus, tmp_path / "one", model_config.replace(ema_end=0.9), train_config, "cpu")
    assert_same_curve(tmp_path / "one", tmp_path / "two")


def without_room(rank, *args):
    honest = training.make_optimizer

    def make_optimizer(*args):
        if rank == 1:
            raise torch.OutOfMemoryError("no room for Adam")
        return honest(*args)

    training.make_optimizer = make_optimizer
    return train(rank, *args)


def test_a_rank_that_fails_before_the_first_step_ends_the_run_with_its_reason(
    tmp_path, corpus, model_config, train_config
):
    answers = on_ranks(2, without_room, corpus, tmp_path / "run", model_config, train_config)
    assert answers[0] == "PeerError: rank 1: no room for Adam"
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["text"] == "rank 1: no room for Adam"


def one_after_the_other(rank, corpus, folder, model, config):
    answers = []
    for name, steps in (("a", config.steps), ("b", 3), ("c", config.steps)):
        try:
            answers.append(train(rank, corpus, folder / name, model, dataclasses.replace(config, steps=steps)))
        except Exception as error:  # of the second, whose folder holds something else
            answers.append(type(error).__name__)
    return answers


def test_the_same_processes_train_one_run_after_the_other(tmp_path, corpus, model_config, train_config):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").touch()
    answers = on_ranks(2, one_after_the_other, corpus, tmp_path, model_config, train_config)
    assert answers == {0: [(12, True), "ConfigError", (12, True)], 1: [(12, True), "PeerError", (12, True)]}


def waiting(rank, asked):
    signal.signal(signal.SIGTERM, lambda *_: None)
    meeting = importlib.import_module("torch.distributed.rendezvous")  # the attribute of this name is its function
    honest = meeting.rendezvous

    def rendezvous(url):
        asked.set()
        yield from honest(url)

    meeting.rendezvous = rendezvous
    with joining.join("cpu"):
        return signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def test_a_rank_that_waits_for_others_which_never_come_can_be_stopped():
    """As torchrun does where rank 0 has refused its options."""
    context = forks()
    asked, results = context.Event(), context.Queue()
    process = context.Process(target=rank_main, args=(1, 2, free_port(), results, waiting, (asked,)))
    process.start()
    assert asked.wait(60)
    os.kill(process.pid, signal.SIGTERM)
    process.join(20)
    ended = process.exitcode
    process.kill()
    assert ended == -signal.SIGTERM
    assert on_ranks(2, waiting, context.Event()) == {0: True, 1: True}  # who has met them handles its signals again


def test_a_group_for_gpus_alone_is_refused(tmp_path, corpus, model_config, train_config, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(ConfigError, match=r'expected init_process_group\("cpu:gloo,cuda:nccl"\)'):
        pretrain(corpus, tmp_path / "run", model_config, train_config, "cpu")


def other_corpus(rank, corpora, folder, model, config):
    return train(rank, corpora[rank], folder, model, config)


def test_a_rank_that_has_lost_another_leaves_the_reason_to_who_has_one():
    store = torch.distributed.HashStore()
    line: Any = types.SimpleNamespace(store=store, reason=lambda: lifeline.reason_left(store))
    first, second = (distributed.Ranks(torch.device("cpu"), rank, 2, line) for rank in range(2))
    lost, full = RuntimeError("gloo: connection closed by peer"), ConfigError("the disk is full")
    assert str(second.failure(lost)) == "rank 1: lost another rank, which gave no reason"
    assert first.failure(full) is full
    assert str(second.failure(lost)) == "rank 0: the disk is full"


def test_ranks_with_different_corpora_are_refused(tmp_path, memory_corpus, model_config, train_config):
    corpora = [memory_corpus([6_000] * 4, seed) for seed in range(2)]
    answers = on_ranks(2, other_corpus, corpora, tmp_path / "run", model_config, train_config)
    assert all("do not have the same corpus" in answer for answer in answers.values()), answers


def test_shards_are_refused_where_their_gradients_are_wrong(memory_corpus, model_config, train_config, monkeypatch):
    config = dataclasses.replace(train_config, shard=True)
    corpus, cpu, cuda = memory_corpus([6_000] * 4), torch.device("cpu"), torch.device("cuda")
    monkeypatch.delattr("torch.distributed.fsdp.FSDPModule.set_force_sum_reduction_for_comms", raising=False)
    with pytest.raises(ConfigError, match=r"shard on a CPU needs torch 2\.8 or later; this is "):
        check_options(corpus, model_config, config, cpu, world=2)
    for device, world in ((cpu, 1), (cuda, 2)):
        assert check_options(corpus, model_config, config, device, world)


def test_ranks_that_do_not_divide_the_batch_are_refused(tmp_path, corpus, model_config, train_config, monkeypatch):
    config = dataclasses.replace(train_config, grad_accumulation=2)
    answers = on_ranks(4, train, corpus, tmp_path / "run", model_config, config)
    assert all("4 processes times a grad_accumulation of 2 do not divide" in answer for answer in answers.values()), (
        answers
    )
    # More ranks on a machine than it has GPUs.
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert str(distributed.pick_device("cuda:1")) == "cuda:1"
    with pytest.raises(ConfigError, match="device is 'cuda:3'; torch finds 2 CUDA devices here"):
        distributed.pick_device("cuda")
