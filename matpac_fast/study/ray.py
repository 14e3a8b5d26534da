"""A study on a Ray cluster: the embeddings, which are most of its work, are made by tasks on its machines.

    from matpac_fast.study.ray import run_study  # and StudyConfig from matpac_fast.study.sweep
    cells = run_study(config, "/shared/study", concurrency=8, num_gpus=1)

All machines must see the data sets and `out` under the same paths. What a task has embedded is kept as it goes on, so a
study that is killed, or a task that fails, costs no more than the clips in work.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .results import Cell
from .sweep import Loaded, Progress, StudyConfig, check_folder, embed_share, load_tasks
from .sweep import run_study as run_here

_PARTS = 4  # of the clips, for each task that runs at a time: the last ones are short


def run_study(
    config: StudyConfig,
    out: str | os.PathLike[str],
    *,
    concurrency: int = 2,
    num_cpus: float = 1,
    num_gpus: float = 0,
    progress: Progress = lambda stage, done, total: None,
) -> list[Cell]:
    """`sweep.run_study`, with the embeddings made on the Ray cluster that is running, or on a local one.

    Costs are measured and probes trained here, on `config.device`.

    Args:
        config, out, progress: as `sweep.run_study` takes them; but tasks have their own device and decoding threads.
        concurrency: tasks at a time.
        num_cpus, num_gpus: of each task; with GPUs it embeds on its own one. Decoding threads are as many as CPUs.

    Raises:
        DatasetError, ConfigError, CheckpointError, AudioError: as there; ConfigError also where ray is missing.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(f"a study on a cluster needs Ray ({error}): pip install 'matpac_fast[ray]'") from error
    if concurrency < 1:
        raise ConfigError(f"concurrency is {concurrency}; expected at least 1")
    out = Path(out).resolve()
    check_folder(out, "out")
    loaded = load_tasks(config, progress)  # a data set that is not whole is an error before anything is computed
    theirs = dataclasses.replace(config, workers=max(1, int(num_cpus)), device="cuda" if num_gpus else "cpu")
    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus)(_embed)
    handed = [ray.put(given) for given in (theirs, loaded)]
    parts = concurrency * _PARTS
    waiting, running, done = list(range(parts)), [], 0
    while waiting or running:
        while waiting and len(running) < concurrency:
            running.append(remote.remote(out, *handed, (waiting.pop(0), parts)))
        ready, running = ray.wait(running)
        try:
            ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            for task in running:
                ray.cancel(task)
            raise error.as_instanceof_cause() from None
        done += len(ready)
        progress("embedding on the cluster", done, parts)
    return run_here(config, out, progress, loaded)


def _embed(out: Path, config: StudyConfig, loaded: Loaded, share: tuple[int, int]) -> None:
    torch.set_num_threads(config.workers)
    embed_share(config, out, loaded, torch.device(config.device), share)
