"""Checkpoints of a sharded run, to which every process writes its part."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import resource
import shutil
import signal
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forks import forks
from ranks import free_port, needs_shards, on_ranks, rank_main, train
from runs import assert_same_curve, newest

import matpac_fast as mf
from matpac_fast import checkpoint, distcp
from matpac_fast.errors import CheckpointError
from matpac_fast.train import pretrain

KILLS = 3
pytestmark = needs_shards


@pytest.fixture
def halves(train_config):
    return dataclasses.replace(train_config, shard=True)


@pytest.fixture
def stopped(tmp_path, corpus, model_config, halves):
    """A run that two processes began, each with half of the model, and stopped after four steps."""
    assert on_ranks(2, train, corpus, tmp_path / "run", model_config, halves, 3) == {0: (4, False), 1: (4, False)}
    return tmp_path / "run"


def test_each_process_writes_its_part(stopped, corpus, model_config, halves):
    folder = stopped / "checkpoints" / "step-00000004"
    assert sorted(p.name for p in folder.iterdir()) == ["parts", "state.json"]
    parts = sorted(p.name for p in (folder / "parts").iterdir())
    assert parts == [".metadata", "__0_0.distcp", "__1_0.distcp", "matpac_fast.json"]
    # They are the encoder as any other checkpoint is, and what a new run may begin with.
    state, metadata = checkpoint.load(checkpoint.find_weights(stopped))
    assert metadata["step"] == 4
    assert mf.Matpac.load(stopped).config == model_config
    wave = torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    assert mf.load_encoder(stopped).embed(wave, 16_000).values.isfinite().all()
    teacher = mf.load_encoder(f"{stopped}@4@teacher")
    assert torch.equal(teacher.student.norm.weight, state["teacher.norm.weight"])
    init = stopped.parent / "other"
    pretrain(corpus, init, model_config, dataclasses.replace(halves, steps=1, lr=1e-12), "cpu", init=stopped)
    assert torch.equal(newest(init)["model/student.norm.weight"], state["student.norm.weight"])


def full_disk(rank, *args):
    """Rank 1's disk is full when the checkpoint of step 8 is written."""
    honest = dcp.FileSystemWriter.write_data

    def write_data(self, plan, planner):
        if rank == 1 and "step-00000008" in str(self.path):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
        return honest(self, plan, planner)

    dcp.FileSystemWriter.write_data = write_data
    return train(rank, *args)


def test_a_full_disk_of_one_process_ends_all_and_leaves_the_last_checkpoint_intact(
    tmp_path, corpus, model_config, halves
):
    run = tmp_path / "run"
    answers = on_ranks(2, full_disk, corpus, run, model_config, halves)
    says = f"{run}/checkpoints/step-00000008: cannot be saved: File too large (rank 1); step-00000004 is intact"
    assert f"CheckpointError: {says}" in answers.values()
    assert all(says in answer for answer in answers.values()), answers  # its own error, or the other's as the reason
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000004"]
    assert pretrain(corpus, run, model_config, halves, "cpu").finished


@pytest.mark.slow
def test_sigkill_leaves_a_checkpoint_that_loads(tmp_path, corpus, model_config, halves):
    """All processes at once, as when a machine goes down, at random moments of training and saving."""
    config = dataclasses.replace(halves, steps=8 * KILLS, save_every=1)
    run, rng, seen = tmp_path / "killed", random.Random(0), 0
    context = forks()
    for _ in range(KILLS):
        port, results = free_port(), context.Queue()
        processes = [
            context.Process(
                target=rank_main, args=(rank, 2, port, results, train, (corpus, run, model_config, config)), daemon=True
            )
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 60
        while _latest(run) == seen:
            assert all(process.is_alive() for process in processes), "the run ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
        before, seen = seen, _latest(run)
        assert before < seen < config.steps
        mf.Matpac.load(run)
    config = dataclasses.replace(config, save_every=1_000)
    assert pretrain(corpus, run, model_config, config, "cpu").finished
    pretrain(corpus, tmp_path / "whole", model_config, config, "cpu")
    assert_same_curve(tmp_path / "whole", run)


def _latest(run):
    try:
        return int((run / "latest").read_text().removeprefix("step-"))
    except FileNotFoundError:
        return 0


def test_a_folder_that_is_not_shared_is_refused(tmp_path, corpus, model_config, halves):
    """Rank 1 has an old run of the same name on its own disk; its parts would end there."""
    pretrain(corpus, tmp_path / "b", model_config, dataclasses.replace(halves, steps=1), "cpu")
    # What rank 0 hands to the others is the path; let it be another disk on rank 1.
    answers = on_ranks(2, elsewhere, corpus, tmp_path / "a", tmp_path / "b", model_config, halves)
    assert "ConfigError: rank 1 does not see rank 0's" in answers[1]
    assert "must be on a disk that all nodes share" in answers[0]


def elsewhere(rank, corpus, folder, other, *args):
    from matpac_fast.train.state import RunFolder

    honest = RunFolder.check_shared

    def check_shared(self, ranks):
        self.path = other if rank == 1 else self.path
        honest(self, ranks)

    RunFolder.check_shared = check_shared
    return train(rank, corpus, folder, *args)


class _Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_damaged_parts_are_named(tmp_path, stopped, corpus, model_config, train_config):
    def refused(name, content, says):
        run = tmp_path / "damaged"
        shutil.copytree(stopped, run)
        path = run / "checkpoints" / "step-00000004" / "parts" / name
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(CheckpointError, match=says):
            pretrain(corpus, run, model_config, train_config, "cpu")
        shutil.rmtree(run)

    parts = stopped / "checkpoints" / "step-00000004" / "parts"
    about, part = ((parts / name).read_bytes() for name in (".metadata", "__1_0.distcp"))
    says = r"\.metadata: the pickle is more than a description of tensors, it names posix.system, so it is refused"
    refused(".metadata", pickle.dumps(_Evil()), says)
    refused(".metadata", about[: len(about) // 2], r"\.metadata: damaged")
    refused("__1_0.distcp", part[: len(part) // 2], r"__1_0\.distcp: damaged")
    refused("__1_0.distcp", bytes([*part[:-1], part[-1] ^ 64]), r"__1_0\.distcp: damaged: its bytes have changed")
    refused("__1_0.distcp", None, r"__1_0\.distcp: cannot be read: No such file")
    metadata = distcp._read_metadata(parts)
    del metadata.state_dict_metadata["model.center"]
    refused(".metadata", pickle.dumps(metadata), "step-00000004 does not fit this model; 1 missing: center")
