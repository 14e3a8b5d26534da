"""From probed cells to tables: scores with intervals, paired comparisons, and which temporal support to take."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..files import damage_named, read_parquet, write_parquet
from ..tasks import Task
from .cell import Cell
from .choose import Choice, best_encoder, choose
from .cost import Cost
from .metrics import RESAMPLES, Draws, interval, score_interval

# Hears of (stage, parts done, parts in all).
Progress = Callable[[str, float, int], None]


def ignored(stage: str, done: float, total: int) -> None:
    pass


CHEAPEST_BY = {"memory": "peak_mib", "time": "ms_per_audio_second", "macs": "macs_per_audio_second"}


@dataclass(frozen=True)
class Tables:
    """`results`: a row a cell, and one more for each subset of its test clips. `comparisons`: a row a cell, against the
    choice of its task and encoder. `choices`: a row a task and encoder. `encoders`: a row a task, encoder and other
    encoder, either at its choice. What is told of a choice is told of the folds' own choices, put together."""

    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    comparisons: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    choices: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    encoders: list[dict[str, Any]] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class _Chosen:
    """Of one encoder its cells, the best of them, and by fold (1 + B, F) and together (1 + B,) the best's scores."""

    cells: list[Cell]
    best: Choice
    by_fold: Tensor
    score: Tensor


def tabulate(
    cells: Sequence[Cell],
    margin: float,
    cheapest_by: str = "memory",
    resamples: int = RESAMPLES,
    progress: Progress = ignored,
) -> Tables:
    """Score, compare and choose.

    The best temporal support is the one of the best validation score, and the cheapest is the one of least cost whose
    validation score is within `margin` of that; test clips only say what both are worth, where there are several folds
    by the choice that each makes for itself (choose.py). Costs are those of the largest batch; where they were not
    measured there is no cheapest, and its columns are None. The resamples are the same for every cell of a task, so
    differences are paired.
    """
    tables = Tables()
    done = 0
    for task in {cell.task.name: cell.task for cell in cells}.values():
        draws = Draws.of([task.groups[fold.test] for fold in task.folds], cells[0].probed.valid.shape[1], resamples)
        targets = [torch.from_numpy(task.targets[fold.test]) for fold in task.folds]
        of_task = [cell for cell in cells if cell.task.name == task.name]
        chosen: list[_Chosen] = []
        for name in dict.fromkeys(cell.encoder for cell in of_task):
            mine = sorted((c for c in of_task if c.encoder == name), key=lambda c: c.view.temporal_support)
            by_fold = []
            for cell in mine:
                by_fold.append(draws.by_fold(task.metric, cell.probed.scores, targets))
                done += 1
                progress("scoring", done, len(cells))
            scored = [draws.together(task.metric, each) for each in by_fold]
            rows = [_row(cell, "", score) for cell, score in zip(mine, scored, strict=True)]
            best, cheapest = choose(mine, [row[CHEAPEST_BY[cheapest_by]] for row in rows], margin)
            of_best = best.together(by_fold)
            score = draws.together(task.metric, of_best)[0]
            for i, cell in enumerate(mine):
                tables.results.append(rows[i])
                for subset, member in task.subsets.items():
                    within = [torch.from_numpy(member[fold.test]) for fold in task.folds]
                    if not any(part.any() for part in within):  # its test clips are left out
                        continue
                    part = draws.score(task.metric, cell.probed.scores, targets, within)
                    tables.results.append(_row(cell, subset, part))
                tables.comparisons.append(_difference(task, cell, mine[best.taken], scored[i][0] - score))
            choice: dict[str, Any] = dict(task=task.name, encoder=name, metric=task.metric)
            choice |= _taken("best", rows, best, score)
            if cheapest is None:
                choice |= dict.fromkeys([*(f"cheapest_{column}" for column in _TAKEN), *_CHANGES])
            else:
                cheap = draws.together(task.metric, cheapest.together(by_fold))[0]
                choice |= _cheapest(rows, best, cheapest, cheap, cheap - score)
            tables.choices.append(choice)
            chosen.append(_Chosen(mine, best, of_best, score))
        for one, other in itertools.permutations(chosen, 2):
            tables.encoders.append(_pair(task, one, other))
        overall = best_encoder([(each.cells, each.best) for each in chosen])
        of_all = draws.together(task.metric, overall.together([each.by_fold for each in chosen]))[0]
        for choice, each in zip(tables.choices[-len(chosen) :], chosen, strict=True):
            apart = _apart(each.score - of_all)
            choice["best_encoder"] = chosen[overall.taken].cells[0].encoder
            names = ("against_best", "against_best_low", "against_best_high")
            choice |= dict(zip(names, apart.values(), strict=True))
    return tables


def _row(cell: Cell, subset: str, scored: tuple[Tensor, Tensor]) -> dict[str, Any]:
    task, view = cell.task, cell.view
    tested = np.unique(np.concatenate([fold.test for fold in task.folds]))
    counted = tested if not subset else tested[task.subsets[subset][tested]]
    groups = len(np.unique(task.groups[counted]))
    (low, high), (low_folds, high_folds) = (score_interval(values, task.metric, groups) for values in scored)
    row: dict[str, Any] = dict(
        task=task.name,
        encoder=cell.encoder,
        encoder_id=cell.encoder_id,
        temporal_support=view.temporal_support,
        hop=view.temporal_support if view.hop is None else view.hop,
        remainder=view.remainder,
        aggregate=view.aggregate,
        subset=subset,
        metric=task.metric,
        score=scored[0][0].item(),
        low=low,
        high=high,
        low_folds=low_folds if len(task.folds) > 1 else math.nan,
        high_folds=high_folds if len(task.folds) > 1 else math.nan,
        valid_score=cell.valid_score,
        test_clips=len(counted),
        test_groups=groups,
        clips=len(task.paths),
        left_out=len(task.left_out),
        shared_audio=cell.shared_audio,
        classes=len(task.classes),
        folds=len(task.folds),
        seeds=cell.probed.valid.shape[1],
        clip_seconds=float(task.seconds.mean()),
        longest_seconds=float(task.seconds.max()),
        seconds_seen=float(np.minimum(task.seconds, view.temporal_support).mean()),
        windows=cell.windows,
        embedding_dim=cell.embedding_dim,
        learning_rates=cell.probed.chosen[..., 0].flatten().tolist(),
        decays=cell.probed.chosen[..., 1].flatten().tolist(),
        untrained=int(cell.probed.untrained.sum()),
        probe_version=__version__,
    )
    return row | _costs(cell)


def _costs(cell: Cell) -> dict[str, Any]:
    """Of the largest batch; the latency is the smallest batch's. All None where nothing was measured."""
    if not cell.costs:
        names = ("batch", "latency_ms", "ms_per_audio_second", "ms_per_clip", "peak_mib", "weights_mib", "macs")
        names += ("macs_per_audio_second", "macs_per_clip", "parameters", "device", "dtype", "threads")
        return dict.fromkeys(names)
    full = cell.windows if cell.full_windows is None else cell.full_windows
    small, large = (pick(cell.costs, key=lambda cost: cost.batch) for pick in (min, max))
    return dict(
        batch=large.batch,
        latency_ms=small.batch_ms,
        ms_per_audio_second=1e3 / large.times_real_time(cell.view.step),
        ms_per_clip=large.batch_ms / large.batch * full,
        peak_mib=large.peak_mib,
        weights_mib=large.weights_mib,
        macs=large.macs,
        macs_per_audio_second=large.macs_per_second(cell.view.step),
        macs_per_clip=large.macs * full,
        parameters=large.parameters,
        device=large.device,
        dtype=large.dtype,
        threads=large.threads,
    )


def _difference(task: Task, cell: Cell, best: Cell, difference: Tensor) -> dict[str, Any]:
    return dict(
        task=task.name,
        encoder=cell.encoder,
        temporal_support=cell.view.temporal_support,
        best_temporal_support=best.view.temporal_support,
        metric=task.metric,
        **_apart(difference),
    )


def _pair(task: Task, one: _Chosen, other: _Chosen) -> dict[str, Any]:
    first, second = one.cells[one.best.taken], other.cells[other.best.taken]
    return dict(
        task=task.name,
        encoder=first.encoder,
        temporal_support=first.view.temporal_support,
        other=second.encoder,
        other_temporal_support=second.view.temporal_support,
        metric=task.metric,
        **_apart(one.score - other.score),
    )


def _apart(difference: Tensor) -> dict[str, float]:
    low, high = interval(difference)
    return dict(difference=difference[0].item(), low=low, high=high)


_TAKEN = ("temporal_support", "by_fold", "seconds_seen", "score", "low", "high")
_CHANGES = ("difference", "difference_low", "difference_high", "memory_saved", "time_saved", "macs_saved")


def _taken(which: str, rows: list[dict[str, Any]], choice: Choice, score: Tensor) -> dict[str, Any]:
    """`rows` are those of the cells, `score` (1 + B,) is the choice's."""
    row, supports = rows[choice.taken], [rows[i]["temporal_support"] for i in choice.by_fold]
    ends = score_interval(score, row["metric"], row["test_groups"])
    told = (row["temporal_support"], supports, row["seconds_seen"], score[0].item(), *ends)
    return {f"{which}_{name}": value for name, value in zip(_TAKEN, told, strict=True)}


def _cheapest(
    rows: list[dict[str, Any]], best: Choice, cheapest: Choice, score: Tensor, difference: Tensor
) -> dict[str, Any]:
    """`difference` (1 + B,) of its score to the best's; what it saves is of the two that are recommended."""
    apart, one, other = _apart(difference), rows[cheapest.taken], rows[best.taken]

    def saved(column: str) -> float:
        return 1 - one[column] / other[column] if other[column] else 0.0

    costs = [saved(column) for column in ("peak_mib", "ms_per_audio_second", "macs_per_audio_second")]
    return _taken("cheapest", rows, cheapest, score) | dict(zip(_CHANGES, [*apart.values(), *costs], strict=True))


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of one set of columns as Parquet, all of it or none; NaN is written as null.

    A column has one type, with values or without, so that tables of several studies can be read together.
    """
    import pyarrow as pa

    plain = [
        {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in rows
    ]
    table = pa.Table.from_pylist(plain)
    types = {name: pa.int64() for name in ("batch", "macs", "parameters", "threads")}
    types |= {name: pa.string() for name in ("device", "dtype")} | {"cheapest_by_fold": pa.list_(pa.float64())}
    for i, field in enumerate(table.schema):
        if pa.types.is_null(field.type):
            kind = types.get(field.name, pa.float64())
            table = table.set_column(i, field.name, table[field.name].cast(kind))
    write_parquet(path, table)


def add_cost(path: Path, cost: Cost) -> None:
    """One more row of the table, which other processes may add to at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        write_table(path, [dataclasses.asdict(each) for each in (*read_costs(path), cost)])


def read_costs(path: Path) -> list[Cost]:
    if not path.exists():
        return []
    with damage_named(path):
        return [Cost(**row) for row in read_parquet(path).to_pylist()]
