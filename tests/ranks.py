"""Real processes over gloo on this machine, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import time

import pytest
import torch
from forks import forks

from matpac_fast.train import pretrain
from matpac_fast.train.distributed import shards

needs_shards = pytest.mark.skipif(not shards(torch.device("cpu")), reason="FSDP2 on a CPU needs torch 2.8 or later")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_main(rank, world, port, results, job, args):
    """One process as torchrun would start it; what came of it goes into `results`."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        answer = job(rank, *args)
    except Exception as error:
        answer = f"{type(error).__name__}: {error}"
    results.put((rank, answer))


def on_ranks(world, job, *args, timeout=60.0):
    """job(rank, *args) in `world` processes -> their answers by rank; fails where one hangs."""
    port = free_port()
    context = forks()
    results = context.Queue()
    processes = [
        context.Process(target=rank_main, args=(rank, world, port, results, job, args), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hung = [process.name for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
    assert not hung, f"{hung} did not end"
    answers = {}
    while len(answers) < world and not results.empty():
        rank, answer = results.get()
        answers[rank] = answer
    return answers


def train(rank, corpus, folder, model, config, stop_after=None):
    asked = iter(range(1, 1_000))
    # One rank alone wants to stop, and not the one that writes.
    stop = lambda: rank == 1 and next(asked) == stop_after  # noqa: E731
    result = pretrain(corpus, folder, model, config, "cpu", stop=stop)
    return result.step, result.finished
