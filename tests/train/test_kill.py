"""SIGKILL at random moments of training and saving: the newest checkpoint loads, and the curve goes on exactly."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time

import torch
from forks import forks
from safetensors.torch import load_file

from matpac_fast.model import Matpac
from matpac_fast.train import pretrain, read_log
from matpac_fast.train.state import RunFolder
from matpac_fast.train.step import make_optimizer

KILLS = 20


def child(corpus, folder, model_config, train_config):
    torch.set_num_threads(1)
    pretrain(corpus, folder, model_config, train_config)


def test_sigkill_never_costs_more_than_the_steps_since_the_last_checkpoint(
    tmp_path, corpus, model_config, train_config
):
    config = dataclasses.replace(train_config, steps=6 * KILLS, save_every=1, log_every=1, keep_last=2)
    context = forks()
    rng = random.Random(0)
    run = tmp_path / "killed"
    seen = 0
    for _ in range(KILLS):
        process = context.Process(target=child, args=(corpus, run, model_config, config), daemon=True)
        process.start()
        deadline = time.monotonic() + 60
        while _latest(run) == seen:  # it has begun and saved a step of its own
            assert process.is_alive(), "the run ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        before, seen = seen, _latest(run)
        assert before < seen < config.steps
        model = Matpac(model_config)
        state = RunFolder(run).load(model, make_optimizer(model, config))
        assert state is not None
        assert state["step"] == seen

    # In one go from the last kill, against a run that nothing ever happened to.
    config = dataclasses.replace(config, save_every=1_000)
    # In processes like the killed ones: what other tests have set in this one may move a bit.
    for folder in (run, tmp_path / "whole"):
        process = context.Process(target=child, args=(corpus, folder, model_config, config), daemon=True)
        process.start()
        process.join()
        assert process.exitcode == 0
    last = f"checkpoints/step-{config.steps:08d}"
    for file in ("model", "optimizer"):
        whole = load_file(tmp_path / "whole" / last / f"{file}.safetensors")
        for name, tensor in load_file(run / last / f"{file}.safetensors").items():
            assert torch.equal(tensor, whole[name]), name
    curves = [
        [(r["step"], r["loss"], r["grad_norm"]) for r in read_log(folder / "log.jsonl") if "loss" in r]
        for folder in (run, tmp_path / "whole")
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == config.steps


def _latest(run):
    """Step of the newest checkpoint, 0 where there is none."""
    try:
        return int((run / "latest").read_text().removeprefix("step-"))
    except FileNotFoundError:
        return 0
