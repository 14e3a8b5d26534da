"""`matpac-fast probe`: what a linear probe makes of an encoder's embeddings on one task."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal

from .._cores import n_cores
from ..errors import ConfigError
from ..study.cache import Aggregate
from ..study.results import tabulate
from ..study.sweep import StudyConfig, check_folder, run_study
from ..train.distributed import pick_device
from ..weights import DEFAULT
from ._probe import DECAYS, at_the_edge, check_resamples, probe_config, scored, untrained
from ._progress import stages
from ._study_words import copies, left_out
from ._words import count, plain
from .study import UNITS


def main(
    task: str,
    encoder: str = DEFAULT,
    temporal_support: float = 2.0,
    hop: float | None = None,
    remainder: Literal["keep", "pad", "merge", "drop"] = "keep",
    aggregate: Aggregate = "mean",
    learning_rates: str | None = None,
    decays: str = DECAYS,
    probe_batch: int | None = None,
    seeds: int = 3,
    standardize: bool = True,
    resamples: int = 1000,
    batch_size: int | None = None,
    partial: bool = False,
    split_seed: int = 0,
    cache: Path | None = None,
    workers: int | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> int:
    """Score an encoder on a task at one temporal support.

    Example: matpac-fast probe --encoder runs/a --task esc50:data/ESC-50 --temporal-support 2

    Prints the score on the test clips with its 95 % interval, and of each subset that the task names, such as a
    recording device. matpac-fast study --help lists the tasks.

    Args:
        encoder: a run folder, or of it runs/a@teacher, runs/a@20000 or runs/a@layer6, a checkpoint, an official file,
            or a name such as passt:FILE. Default: this package's own pre-trained one.
        task: what to predict, as NAME:FOLDER, such as esc50:data/ESC-50.
        temporal_support: seconds of audio that one embedding sees.
        hop: seconds from one window to the next. Default: the temporal support.
        remainder: the end of a clip that fills no window: keep it as a shorter one, pad it with zeros, merge it into
            the last one, or drop it.
        aggregate: mean probes the mean embedding of a clip's windows; score probes every window and averages what the
            probe says; attend is an attentive probe, which learns how much each window counts; one probes the single
            window in the clip's middle.
        learning_rates: learning rates to try, with commas between them; validation clips choose. Default: 0.1,1; in
            batches 1e-4,1e-3,1e-2.
        decays: weight decays to try, with commas between them; validation clips choose.
        probe_batch: train each probe in shuffled batches of so many windows, until 20 passes have not lowered the
            validation loss, 300 passes at most, as papers do: MATPAC's is --probe-batch 128 --learning-rates 1e-4
            --decays 0 --seeds 5. Default: all at once.
        seeds: how many times each probe is trained, from other initial weights and choosing by another resample of the
            validation clips; the scores are averaged.
        standardize: bring features to zero mean and unit spread before the probe.
        resamples: how often the test clips are drawn anew for the 95 % interval (bootstrap).
        batch_size: windows that the encoder embeds at a time. Default: 16 on a CPU, 128 on a GPU.
        partial: use a data set's folder although some of its files are missing or cannot be decoded: these are left out
            and named.
        split_seed: determines the folds that are drawn where a folder: task has none of its own.
        cache: folder that keeps embeddings and probes, such as a study's. Default: they are not kept. torchrun needs
            one, for its processes share them.
        workers: threads that decode audio. Default: one a core.
        device: auto, cpu, cuda or cuda:1.
        dtype: number format that the encoder computes in.
    """
    check_resamples(resamples)
    if cache is None and (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ConfigError(
            f"--cache is missing: {world} processes share the embeddings; expected a folder that all of them see"
        )
    config = StudyConfig(
        encoders=(encoder,),
        tasks=(task,),
        temporal_supports=(temporal_support,),
        hop=hop,
        remainder=remainder,
        aggregate=aggregate,
        probe=probe_config(learning_rates, decays, probe_batch, seeds, standardize),
        cost=False,
        batch_size=batch_size,
        device=str(pick_device(device)),
        dtype=dtype,
        seed=split_seed,
        partial=partial,
        workers=n_cores() if workers is None else workers,
    )
    if cache is not None:
        check_folder(cache, "--cache")
    with tempfile.TemporaryDirectory() as folder, stages(UNITS) as hear:
        cells = run_study(config, cache or Path(folder), hear)
        results = tabulate(cells, 0.0, resamples=resamples, progress=hear).results if cells else []
    for row in results:
        where = plain(row["task"] + (f", {row['subset']}" if row["subset"] else ""))
        print(
            f"{where}: {row['metric']} {scored(row['score'], row['low'], row['high'], '.4f', ' to ')}, "
            f"{count(row['test_clips'], 'test clip')}, {count(row['folds'], 'fold')}, {count(row['seeds'], 'seed')}"
        )
    said = at_the_edge(results, config.probe.decays) + untrained(results)
    for line in [*copies(results), *said, *left_out(cells)[0]]:
        print(plain(line))
    return 0
