"""`matpac-fast study`: accuracy, memory and time against the seconds of audio that an embedding sees."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from .._cores import n_cores
from ..audio.decode import decoder_versions
from ..backend import versions
from ..choice import parse
from ..errors import ConfigError
from ..files import made_anew, read_parquet, write_text
from ..study.cache import Aggregate
from ..study.cost import Cost, device_name
from ..study.plots import write_plots
from ..study.results import Cell, Tables, tabulate, write_table
from ..study.study_page import write_report
from ..study.sweep import Progress, StudyConfig, check_folder, cost_sweep, run_study
from ..tasks import DatasetError
from ..train.distributed import pick_device
from ._probe import DECAYS, at_the_edge, bounds, check_resamples, numbers, probe_config, probe_words
from ._progress import stages
from ._table import show

UNITS = {"hashing": "files", "measuring cost": "points", "embedding": "clips", "probing": "probes", "scoring": "probes"}
_NAMED = 5  # files that one line names
_WIDE = 1 / 3  # from quartile to quartile, of the median time: more than a machine at rest shows


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
    magnatagatune, nsynth or fsd50k, in its official layout. Embeddings are probed linearly; the best and the cheapest
    temporal support are chosen on validation clips and scored on test clips, with 95 % intervals. Writes
    results.parquet, comparisons.parquet, encoders.parquet, cost.parquet, PNG plots and report.html. Killed and run
    again, it goes on.

    Args:
        encoders: names, run folders or files, with commas between them, such as runs/a,runs/a@teacher,runs/a@layer6;
            see matpac-fast embed --help.
        out: folder for results and embeddings.
        tasks: NAME:FOLDER, several with commas between them.
        temporal_support: seconds of audio that one embedding sees, with commas between them.
        hop: seconds from one window to the next. Default: the temporal support.
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
        seeds: how many times each probe is trained, each time from other initial weights, and on other validation clips
            where a task has none of its own.
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
    with stages(UNITS) as hear, _kept():
        if cost_only:
            found, tables = list(cost_sweep(config, out, hear).values()), Tables()
        else:
            cells = _checked(config, out, hear)
            if not cells:  # a torchrun process that is not the first
                return 0
            found = list({id(cost): cost for cell in cells for cost in cell.costs}.values())
            tables = tabulate(cells, margin, cheapest_by, resamples, hear)
    made = _made(config)
    lines = _sentences(tables, margin) + at_the_edge(tables.results, config.probe.decays)
    lines += _unsteady(found, out / "cost.parquet")
    told, files = left_out(cells)
    lines += told
    if cells and (path := _listed(out, files)):
        lines.append(f"All files that are left out are in {path}.")
    lines += _untold(out / "results.parquet", tables.results)
    if tables.results:
        for name in ("results", "comparisons", "choices", "encoders"):
            if rows := getattr(tables, name):
                write_table(out / f"{name}.parquet", rows)
            else:  # of one encoder; what is there is of another command
                (out / f"{name}.parquet").unlink(missing_ok=True)
    plots, failed = write_plots(out, tables.results, found)
    lines += failed
    write_report(out / "report.html", tables, found, plots, choice_cells(tables), lines, made)
    settings = {"settings": dataclasses.asdict(config), "made": made}
    write_text(out / "settings.json", json.dumps(settings, indent=2) + "\n")
    show(*(choice_cells(tables) if tables.choices else cost_cells(found)))
    print("\n" + "\n".join([*lines, f"open {out / 'report.html'}"]))
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
    if len(lines) > _NAMED:
        write_text(path, "".join(f"{line}\n" for line in lines))
        return path
    path.unlink(missing_ok=True)
    return None


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("what is embedded, probed and measured is kept; the same command goes on from there", file=sys.stderr)
        raise


def choice_cells(tables: Tables) -> tuple[list[str], list[list[str]]]:
    """Header and body: for each task and encoder the best and the cheapest temporal support."""
    header = ["task", "encoder", "metric", "best TS", "score (95 %)"]
    costed = any(row["cheapest_temporal_support"] is not None for row in tables.choices)
    if costed:
        header += ["cheapest TS", "score (95 %)", "memory change", "time change"]
    body = []
    for row in tables.choices:
        line = [row["task"], row["encoder"], row["metric"], _support(row, "best"), _score(row, "best")]
        if costed and row["cheapest_temporal_support"] is None:
            line += ["–"] * 4
        elif costed:
            changes = (_change(row["memory_saved"]), _change(row["time_saved"]))
            line += [_support(row, "cheapest"), _score(row, "cheapest"), *changes]
        body.append(line)
    return header, body


def _support(row: dict[str, Any], which: str) -> str:
    """A temporal support, and what an embedding sees on average where clips are shorter."""
    ts, seen = row[which + "_temporal_support"], row[which + "_seconds_seen"]
    return f"{ts:g} s" if f"{seen:.3g}" == f"{ts:.3g}" else f"{ts:g} s (sees {seen:.3g} s)"


def _change(saved: float) -> str:
    text = f"{-100 * saved:+.0f} %"
    return "same" if text[1:] == "0 %" else text


def _score(row: dict[str, Any], which: str) -> str:
    return f"{row[which + '_score']:.3f} ({bounds(row[which + '_low'], row[which + '_high'])})"


def cost_cells(costs: list[Cost]) -> tuple[list[str], list[list[str]]]:
    header = ["encoder", "TS", "windows", "peak MiB", "ms", "times real time", "GMAC/s of audio"]
    return header, [
        [
            cost.encoder,
            f"{cost.temporal_support:g} s",
            str(cost.batch),
            f"{cost.peak_mib:.1f}",
            f"{cost.batch_ms:.2f}",
            f"{cost.times_real_time:.0f}",
            f"{cost.macs_per_second / 1e9:.3f}" if cost.macs else "–",
        ]
        for cost in costs
    ]


def _sentences(tables: Tables, margin: float) -> list[str]:
    """What was found, a sentence a task and encoder."""
    found = []
    for row in tables.choices:
        best, cheapest = row["best_temporal_support"], row["cheapest_temporal_support"]
        text = f"{row['task']}, {row['encoder']}: {_support(row, 'best')} is best on validation clips, "
        text += f"{_score(row, 'best')} on test"
        if cheapest is None:  # costs were not measured, so nothing is known of cheaper ones
            text += "."
        elif cheapest == best:
            text += f"; nothing cheaper is within {margin:g} of it."
        else:
            text += f"; {_support(row, 'cheapest')} is cheaper and within {margin:g}, {row['difference']:+.3f} on test "
            text += f"({bounds(row['difference_low'], row['difference_high'], '+.3f', ' to ')})."
        found.append(text)
    for task in dict.fromkeys(row["task"] for row in tables.results):
        rows = [row for row in tables.results if row["task"] == task]
        longest = rows[0]["longest_seconds"]
        beyond = sorted({row["temporal_support"] for row in rows if row["temporal_support"] > longest})
        padded = rows[0]["remainder"] == "pad" and rows[0]["aggregate"] != "one"
        more = "adds only silence" if padded else "changes nothing: it is the whole clip"
        if beyond:
            text = f"{task}: no clip is longer than {longest:.3g} s; beyond that a longer temporal support {more} "
            found.append(text + f"(here at {', '.join(f'{ts:g}' for ts in beyond)} s).")
    return found + _ranking(tables) + copies(tables.results)


def _ranking(tables: Tables) -> list[str]:
    """A sentence a task of several encoders: how far each is, on test clips, from the best on validation clips."""
    found = []
    for task in dict.fromkeys(row["task"] for row in tables.encoders):
        whole = [row for row in tables.results if row["task"] == task and not row["subset"]]
        best = max(whole, key=lambda row: row["valid_score"])["encoder"]
        apart = [
            f"{row['encoder']} {row['difference']:+.3f} ({bounds(row['low'], row['high'], '+.3f', ' to ')})"
            for row in tables.encoders
            if row["task"] == task and row["other"] == best
        ]
        found.append(f"{task}: {best} is best on validation clips; against it, on test: {', '.join(apart)}.")
    return found


def copies(results: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each task that tests on audio that it learns from."""
    shared = {row["task"]: row["shared_audio"] for row in results if row["shared_audio"]}
    are = {task: "1 test clip is a copy" if n == 1 else f"{n} test clips are copies" for task, n in shared.items()}
    return [f"{task}: {text} of training clips, by their bytes." for task, text in are.items()]


def _unsteady(costs: Sequence[Cost], path: Path) -> list[str]:
    """A sentence where the times of a point's runs differ so much that something else took the machine's time."""

    def spread(cost: Cost) -> float:
        return (cost.batch_ms_high - cost.batch_ms_low) / cost.batch_ms

    wide = [cost for cost in costs if spread(cost) > _WIDE]
    if not wide:
        return []
    worst = max(wide, key=spread)
    return [
        f"Times are uncertain at {len(wide)} of {len(costs)} points, most at {worst.encoder}, "
        f"{worst.temporal_support:g} s, batch {worst.batch}: half of its runs took {worst.batch_ms_low:.3g} to "
        f"{worst.batch_ms_high:.3g} ms, so the machine was busy. To measure again at rest, delete {path}."
    ]


def _untold(path: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence where the table at `path` has tasks and encoders that `rows` have not."""
    if not path.exists():
        return []
    try:
        with made_anew(path):
            before = read_parquet(path, ["task", "encoder"]).to_pylist()
    except ConfigError:  # damaged, and about to be made anew
        return []
    there, now = (dict.fromkeys((row["task"], row["encoder"]) for row in some) for some in (before, rows))
    gone = [f"{encoder} on {task}" for task, encoder in there if (task, encoder) not in now]
    if not gone:
        return []
    some = ", ".join(gone[:_NAMED]) + (f" and {len(gone) - _NAMED} more" if len(gone) > _NAMED else "")
    return [
        f"The report that was here told of {some} as well; to have all in one, name all encoders and tasks in one "
        "command: what is embedded and probed is kept."
    ]


def left_out(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    """A sentence for each task that is not whole, with the first few files by name; and a line for every file."""
    sentences, lines = [], []
    for task in {cell.task.name: cell.task for cell in cells}.values():
        if not task.left_out:
            continue
        named = [f"{name}: {reason}" for name, reason in task.left_out]
        some = "; ".join(named[:_NAMED]) + (f"; and {len(named) - _NAMED} more" if len(named) > _NAMED else "")
        count = "1 clip is" if len(named) == 1 else f"{len(named)} clips are"
        sentences.append(f"{task.name}: {count} left out, missing, altered or damaged: {some}.")
        lines += [f"{task.name}: {line}" for line in named]
    return sentences, lines


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
