"""`matpac-fast study`: accuracy, memory and time against the seconds of audio that an embedding sees."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from .._cores import n_cores
from ..audio.decode import decoder_versions
from ..backend import versions
from ..choice import parse
from ..errors import ConfigError
from ..files import write_text
from ..study.cache import Aggregate
from ..study.cost import device_name
from ..study.plots import write_plots
from ..study.results import Cell, Tables, tabulate, write_table
from ..study.study_page import write_report
from ..study.sweep import Progress, StudyConfig, check_folder, cost_sweep, run_study
from ..tasks import DatasetError
from ..train.distributed import pick_device
from ._probe import DECAYS, at_the_edge, check_resamples, numbers, probe_config, probe_words, untrained
from ._progress import kept, stages
from ._study_words import NAMED, choice_cells, cost_cells, left_out, sentences, unsteady, untold
from ._table import show
from ._words import plain

UNITS = {"hashing": "files", "measuring cost": "points", "embedding": "clips", "probing": "probes", "scoring": "probes"}


def main(
    encoders: str,
    out: Path,
    tasks: str = "",
    temporal_support: str = "0.5,1,2,3,5,10",
    hop: float | None = None,
    remainder: Literal["keep", "pad", "merge", "drop"] = "keep",
    aggregate: Aggregate = "mean",
    margin: float = 0.01,
    cheapest_by: Literal["memory", "time", "macs"] = "memory",
    cost: bool = True,
    cost_only: bool = False,
    batch_sizes: str = "1,16",
    learning_rates: str | None = None,
    decays: str = DECAYS,
    probe_batch: int | None = None,
    seeds: int = 3,
    standardize: bool = True,
    resamples: int = 1000,
    batch_size: int | None = None,
    partial: bool = False,
    split_seed: int = 0,
    workers: int | None = None,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> int:
    """Find which temporal support is best for an encoder and a task, and the cheapest that is nearly as good.

    Example: matpac-fast study --encoders untrained-tiny,runs/a --tasks folder:my/audio --out study/

    A task is NAME:FOLDER: folder (sub-folder = label, or a clips.csv), esc50, urbansound8k, gtzan, tau2020, openmic,
    magnatagatune, nsynth, fsd50k or hear (one of the HEAR benchmark), in its official layout. Embeddings are probed
    linearly; the best and the cheapest temporal support are chosen on validation clips, for their scores fold by fold,
    and scored on test clips, with 95 % intervals. Writes results.parquet, comparisons.parquet, encoders.parquet,
    choices.parquet, cost.parquet, PNG plots and report.html. Killed and run again, it goes on.

    Args:
        encoders: names, run folders or files, with commas between them, such as runs/a,runs/a@teacher,runs/a@layer6;
            see matpac-fast embed --help.
        out: folder for results and embeddings.
        tasks: NAME:FOLDER, several with commas between them.
        temporal_support: seconds of audio that one embedding sees, with commas between them.
        hop: seconds from one window to the next, by which a second of audio costs more or less. Default: the temporal
            support.
        remainder: the end of a clip that fills no window: keep it as a shorter one, pad it with zeros, merge it into
            the last one, or drop it.
        aggregate: mean probes the mean embedding of a clip's windows; score probes every window and averages what the
            probe says; attend is an attentive probe, which learns how much each window counts; one probes the single
            window in the clip's middle.
        margin: how much less validation score than the best the cheapest temporal support may have; 0.01 is one point
            of 100.
        cheapest_by: what cheap means: least peak memory, or least time or multiply-adds for a second of audio.
        cost: measure memory, time and multiply-adds.
        cost_only: measure costs alone, without tasks.
        batch_sizes: numbers of windows at a time to measure costs with.
        learning_rates: learning rates to try, with commas between them; the validation clips of each fold and seed
            choose. Default: 0.1,1; in batches 1e-4,1e-3,1e-2.
        decays: weight decays to try, with commas between them; validation clips choose.
        probe_batch: train each probe in shuffled batches of so many windows, until 20 passes have not lowered the
            validation loss, 300 passes at most, as papers do: MATPAC's is --probe-batch 128 --learning-rates 1e-4
            --decays 0 --seeds 5. Default: all at once.
        seeds: how many times each probe is trained, each time from other initial weights, and choosing by another
            resample of the validation clips, or by other ones where a task has none of its own.
        standardize: bring features to zero mean and unit spread before the probe.
        resamples: how often the test clips are drawn anew for the 95 % interval (bootstrap).
        batch_size: windows that the encoder embeds at a time. Default: 16 on a CPU, 128 on a GPU.
        partial: use a data set's folder although some of its files are missing or cannot be decoded: these are left out
            and named.
        split_seed: determines the folds that are drawn where a folder: task has none of its own.
        workers: threads that decode audio. Default: one a core.
        device: auto, cpu, cuda or cuda:1.
        dtype: number format that the encoder computes in.
    """
    check_resamples(resamples)
    if not 0 <= margin < math.inf:
        raise ConfigError(f"--margin is {margin:g}; expected 0 or more, such as 0.01")
    if not cost_only and not tasks:
        raise ConfigError("--tasks is missing; expected NAME:FOLDER, or --cost-only to measure costs alone")
    config = StudyConfig(
        encoders=_paths(encoders),
        tasks=() if cost_only else _paths(tasks),
        temporal_supports=numbers("--temporal-support", temporal_support),
        hop=hop,
        remainder=remainder,
        aggregate=aggregate,
        probe=probe_config(learning_rates, decays, probe_batch, seeds, standardize),
        cost=cost or cost_only,
        batch_sizes=tuple(_whole("--batch-sizes", n) for n in numbers("--batch-sizes", batch_sizes)),
        batch_size=batch_size,
        device=str(pick_device(device)),
        dtype=dtype,
        seed=split_seed,
        partial=partial,
        workers=n_cores() if workers is None else workers,
    )
    if cost_only and int(os.environ.get("RANK", 0)):  # torchrun's first process measures, on a machine at rest
        return 0
    check_folder(out)
    cells: list[Cell] = []
    with stages(UNITS) as hear, kept("what is embedded, probed and measured is"):
        if cost_only:
            found, tables = list(cost_sweep(config, out, hear).values()), Tables()
        else:
            cells = _checked(config, out, hear)
            if not cells:  # a torchrun process that is not the first
                return 0
            found = list({id(cost): cost for cell in cells for cost in cell.costs}.values())
            tables = tabulate(cells, margin, cheapest_by, resamples, hear)
    made = _made(config)
    lines = sentences(tables, margin) + at_the_edge(tables.results, config.probe.decays)
    lines += untrained(tables.results)
    lines += unsteady(found, out / "cost.parquet")
    told, files = left_out(cells)
    lines += told
    if cells and (path := _listed(out, files)):
        lines.append(f"All files that are left out are in {path}.")
    lines += untold(out / "results.parquet", tables.results)
    if tables.results:
        for name in ("results", "comparisons", "choices", "encoders"):
            if rows := getattr(tables, name):
                write_table(out / f"{name}.parquet", rows)
            else:  # of one encoder; what is there is of another command
                (out / f"{name}.parquet").unlink(missing_ok=True)
    step = None if aggregate == "one" else hop  # of one window a clip there is no next one
    plots, failed = write_plots(out, tables.results, found, step)
    lines += failed
    write_report(out / "report.html", tables, found, plots, choice_cells(tables), lines, made, step)
    settings = {"settings": dataclasses.asdict(config), "made": made}
    write_text(out / "settings.json", json.dumps(settings, indent=2) + "\n")
    show(*(choice_cells(tables) if tables.choices else cost_cells(found, step)))
    print(plain("\n" + "\n".join([*lines, f"open {out / 'report.html'}"])))
    return 0


def _checked(config: StudyConfig, out: Path, hear: Progress) -> list[Cell]:
    """The study; of a data set that is not whole, every file is named in problems.txt."""
    try:
        return run_study(config, out, hear)
    except DatasetError as error:
        if path := _listed(out, [f"{name}: {reason}" for name, reason in error.problems]):
            raise DatasetError(f"{error}; all of them are in {path}", error.problems) from None
        raise


def _listed(out: Path, lines: Sequence[str]) -> Path | None:
    """Where the files are that one line cannot name; what an earlier study found there is told no longer."""
    path = out / "problems.txt"
    if len(lines) > NAMED:
        write_text(path, "".join(f"{line}\n" for line in lines))
        return path
    path.unlink(missing_ok=True)
    return None


def _made(config: StudyConfig) -> dict[str, str]:
    return {
        "command": shlex.join(["matpac-fast", *sys.argv[1:]]),
        "device": f"{device_name(torch.device(config.device))}, {config.dtype}, threads: {torch.get_num_threads()}",
        "windows": f"hop {config.hop or 'as the temporal support'}, remainder {config.remainder}, {config.aggregate}",
        "probe": probe_words(config.probe, config.aggregate == "attend"),
        **versions(),
        **decoder_versions(),
    }


def _paths(text: str) -> tuple[str, ...]:
    """Names and paths with commas between them; a path that is there, alone or after "name:", may hold commas."""
    words, found = text.split(","), []
    while words:
        n = next((n for n in range(len(words), 1, -1) if _exists(",".join(words[:n]).strip())), 1)
        found.append(",".join(words[:n]).strip())
        del words[:n]
    return tuple(path for path in found if path)


def _exists(path: str) -> bool:
    """With or without an ending such as "@teacher"."""
    name, _, file = path.partition(":")
    return os.path.exists(parse(path).path) or ("," not in name and os.path.exists(parse(file).path))


def _whole(option: str, number: float) -> int:
    if not number.is_integer():
        raise ConfigError(f"{option} has {number:g}; expected whole numbers")
    return int(number)
