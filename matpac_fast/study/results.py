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
from ..files import made_anew, read_parquet, write_parquet
from ..tasks import Task
from .cache import View
from .cost import Cost
from .linear import Probed
from .metrics import RESAMPLES, Draws, interval

# Hears of (stage, parts done, parts in all).
Progress = Callable[[str, float, int], None]


def ignored(stage: str, done: float, total: int) -> None:
    pass


CHEAPEST_BY = {"memory": "peak_mib", "time": "ms_per_audio_second", "macs": "macs_per_audio_second"}


@dataclass(frozen=True)
class Cell:
    """One task, encoder and temporal support: what its probes said, and what it cost at each batch size."""

    task: Task
    encoder: str
    encoder_id: str
    embedding_dim: int
    view: View
    probed: Probed
    windows: float
    shared_audio: int
    costs: list[Cost]

    @property
    def valid_score(self) -> float:
        """Mean over folds and seeds of the score on validation clips: what a choice may look at."""
        return self.probed.valid_score.nanmean().item()

    @property
    def sees_all(self) -> bool:
        """Whether every clip is one window, and no padding in it: a longer temporal support changes nothing."""
        padded = self.view.remainder == "pad" and self.view.aggregate != "one"
        return not padded and self.view.temporal_support >= float(self.task.seconds.max())


@dataclass(frozen=True)
class Tables:
    """`results`: a row a cell, and one more for each subset of its test clips. `comparisons`: a row a cell, against the
    best temporal support of its task and encoder. `choices`: a row a task and encoder. `encoders`: a row a task,
    encoder and other encoder, either at its best temporal support."""

    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    comparisons: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    choices: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    encoders: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def tabulate(
    cells: Sequence[Cell],
    margin: float,
    cheapest_by: str = "memory",
    resamples: int = RESAMPLES,
    progress: Progress = ignored,
) -> Tables:
    """Score, compare and choose.

    The best temporal support is the one of the best validation score, and the cheapest is the one of least cost whose
    validation score is within `margin` of that; test clips only say what both are worth. Costs are those of the
    largest batch; where they were not measured there is no cheapest, and its columns are None. Of the temporal supports
    that see every clip whole, whose embeddings are the same, only the shortest is chosen. The resamples are the same
    for every cell of a task, so differences are paired.
    """
    tables = Tables()
    done = 0
    for task in {cell.task.name: cell.task for cell in cells}.values():
        draws = Draws.of([task.groups[fold.test] for fold in task.folds], cells[0].probed.valid.shape[1], resamples)
        targets = [torch.from_numpy(task.targets[fold.test]) for fold in task.folds]
        of_task = [cell for cell in cells if cell.task.name == task.name]
        bests: list[tuple[Cell, Tensor]] = []  # of each encoder, with its resampled score
        for name in dict.fromkeys(cell.encoder for cell in of_task):
            mine = sorted((c for c in of_task if c.encoder == name), key=lambda c: c.view.temporal_support)
            scored = []
            for cell in mine:
                scored.append(draws.score(task.metric, cell.probed.scores, targets))
                done += 1
                progress("scoring", done, len(cells))
            rows = [_row(cell, "", score) for cell, score in zip(mine, scored, strict=True)]
            whole = [i for i, cell in enumerate(mine) if cell.sees_all]
            choosable = [i for i in range(len(mine)) if i not in whole[1:]]
            best = max(choosable, key=lambda i: (mine[i].valid_score, -mine[i].view.temporal_support))
            near = [i for i in choosable if mine[i].valid_score >= mine[best].valid_score - margin - 1e-9]
            column = CHEAPEST_BY[cheapest_by]
            measured = all(rows[i][column] is not None for i in near)
            cheapest = min(near, key=lambda i: (rows[i][column], mine[i].view.temporal_support)) if measured else None
            for i, cell in enumerate(mine):
                tables.results.append(rows[i])
                for subset, member in task.subsets.items():
                    within = [torch.from_numpy(member[fold.test]) for fold in task.folds]
                    if not any(part.any() for part in within):  # its test clips are left out
                        continue
                    score = draws.score(task.metric, cell.probed.scores, targets, within)
                    tables.results.append(_row(cell, subset, score))
                tables.comparisons.append(_difference(task, cell, mine[best], scored[i][0] - scored[best][0]))
            told = None if cheapest is None else (rows[cheapest], scored[cheapest][0] - scored[best][0])
            tables.choices.append(_choice(task, name, rows[best], told))
            bests.append((mine[best], scored[best][0]))
        for (one, score), (other, others) in itertools.permutations(bests, 2):
            tables.encoders.append(_pair(task, one, other, score - others))
    return tables


def _row(cell: Cell, subset: str, scored: tuple[Tensor, Tensor]) -> dict[str, Any]:
    task, view = cell.task, cell.view
    (low, high), (low_folds, high_folds) = interval(scored[0]), interval(scored[1])
    tested = np.unique(np.concatenate([fold.test for fold in task.folds]))
    counted = tested if not subset else tested[task.subsets[subset][tested]]
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
        probe_version=__version__,
    )
    return row | _costs(cell)


def _costs(cell: Cell) -> dict[str, Any]:
    """Of the largest batch; the latency is the smallest batch's. All None where nothing was measured."""
    if not cell.costs:
        names = ("batch", "latency_ms", "ms_per_audio_second", "ms_per_clip", "peak_mib", "weights_mib", "macs")
        names += ("macs_per_audio_second", "macs_per_clip", "parameters", "device", "dtype", "threads")
        return dict.fromkeys(names)
    small, large = (pick(cell.costs, key=lambda cost: cost.batch) for pick in (min, max))
    return dict(
        batch=large.batch,
        latency_ms=small.batch_ms,
        ms_per_audio_second=1e3 / large.times_real_time,
        ms_per_clip=large.batch_ms / large.batch * cell.windows,
        peak_mib=large.peak_mib,
        weights_mib=large.weights_mib,
        macs=large.macs,
        macs_per_audio_second=large.macs_per_second,
        macs_per_clip=large.macs * cell.windows,
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


def _pair(task: Task, one: Cell, other: Cell, difference: Tensor) -> dict[str, Any]:
    return dict(
        task=task.name,
        encoder=one.encoder,
        temporal_support=one.view.temporal_support,
        other=other.encoder,
        other_temporal_support=other.view.temporal_support,
        metric=task.metric,
        **_apart(difference),
    )


def _apart(difference: Tensor) -> dict[str, float]:
    low, high = interval(difference)
    return dict(difference=difference[0].item(), low=low, high=high)


_CHEAPEST = ("temporal_support", "seconds_seen", "score", "low", "high")
_CHANGES = ("difference", "difference_low", "difference_high", "memory_saved", "time_saved", "macs_saved")


def _choice(
    task: Task, encoder: str, best: dict[str, Any], told: tuple[dict[str, Any], Tensor] | None
) -> dict[str, Any]:
    """`told`: the cheapest row, and its resampled difference to the best; None where costs are not known."""
    choice = dict(
        task=task.name,
        encoder=encoder,
        metric=task.metric,
        best_temporal_support=best["temporal_support"],
        best_seconds_seen=best["seconds_seen"],
        best_score=best["score"],
        best_low=best["low"],
        best_high=best["high"],
    )
    if told is None:
        return choice | dict.fromkeys([*(f"cheapest_{name}" for name in _CHEAPEST), *_CHANGES])
    cheapest, difference = told
    low, high = interval(difference)

    def saved(column: str) -> float:
        return 1 - cheapest[column] / best[column] if best[column] else 0.0

    return choice | dict(
        cheapest_temporal_support=cheapest["temporal_support"],
        cheapest_seconds_seen=cheapest["seconds_seen"],
        cheapest_score=cheapest["score"],
        cheapest_low=cheapest["low"],
        cheapest_high=cheapest["high"],
        difference=difference[0].item(),
        difference_low=low,
        difference_high=high,
        memory_saved=saved("peak_mib"),
        time_saved=saved("ms_per_audio_second"),
        macs_saved=saved("macs_per_audio_second"),
    )


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
    types |= {name: pa.string() for name in ("device", "dtype")}
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
    with made_anew(path):
        return [Cost(**row) for row in read_parquet(path).to_pylist()]
