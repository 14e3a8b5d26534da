"""What `matpac-fast study` found, in words: the table on the screen, and a sentence on each thing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import damage_named, read_parquet
from ..study.cell import Cell
from ..study.cost import Cost
from ..study.results import Tables
from ._probe import differs, scored

NAMED = 5  # files that one line names
_WIDE = 1 / 3  # from quartile to quartile, of the median time: more than a machine at rest shows


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
    return scored(row[which + "_score"], row[which + "_low"], row[which + "_high"])


def cost_cells(costs: list[Cost], hop: float | None = None) -> tuple[list[str], list[list[str]]]:
    """Header and body: each point, and what a second of audio costs with a window every `hop` seconds."""
    header = ["encoder", "TS", "windows", "peak MiB", "ms", "times real time", "GMAC/s of audio"]
    return header, [
        [
            cost.encoder,
            f"{cost.temporal_support:g} s",
            str(cost.batch),
            f"{cost.peak_mib:.1f}",
            f"{cost.batch_ms:.2f}",
            f"{cost.times_real_time(hop):.0f}",
            f"{cost.macs_per_second(hop) / 1e9:.3f}" if cost.macs else "–",
        ]
        for cost in costs
    ]


def sentences(tables: Tables, margin: float) -> list[str]:
    """What was found, a sentence a task and encoder."""
    found = []
    for row in tables.choices:
        best, cheapest = row["best_temporal_support"], row["cheapest_temporal_support"]
        folds, score = len(row["best_by_fold"]), _score(row, "best")
        text = f"{row['task']}, {row['encoder']}: {_support(row, 'best')} is best on "
        if folds == 1:
            text += f"validation clips, {score} on test"
        elif set(row["best_by_fold"]) == {best}:
            text += f"the validation clips of all {folds} folds, and of each; {score} on test"
        else:
            text += f"the validation clips of all {folds} folds; each fold's own choice"
            text += f" ({_by_fold(row['best_by_fold'])}) scores {score} on test"
        if cheapest is None:  # costs were not measured, so nothing is known of cheaper ones
            text += "."
        elif cheapest == best:
            text += f"; nothing cheaper is within {margin:g} of {'it' if folds == 1 else f'{best:g} s'}."
        else:
            chosen = "" if folds == 1 else "chosen fold by fold "
            text += f"; {_support(row, 'cheapest')} is cheaper and within {margin:g}, {chosen}"
            text += f"{differs(row['difference'], row['difference_low'], row['difference_high'])} on test."
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


def _by_fold(chosen: Sequence[float]) -> str:
    """ "1 s in folds 0, 2; 2 s in fold 1"."""
    folds = {ts: [str(f) for f, each in enumerate(chosen) if each == ts] for ts in sorted(set(chosen))}
    return "; ".join(f"{ts:g} s in fold{'s' * (len(some) > 1)} {', '.join(some)}" for ts, some in folds.items())


def _ranking(tables: Tables) -> list[str]:
    """A sentence a task of several encoders: how far each is, on test clips, from the best on validation clips."""
    found = []
    for task in dict.fromkeys(row["task"] for row in tables.encoders):
        rows = [row for row in tables.choices if row["task"] == task]
        best = rows[0]["best_encoder"]
        apart = [
            f"{row['encoder']} {differs(row['against_best'], row['against_best_low'], row['against_best_high'])}"
            for row in rows
            if row["encoder"] != best
        ]
        it = "it" if len(rows[0]["best_by_fold"]) == 1 else "each fold's own best"
        found.append(f"{task}: {best} is best on validation clips; against {it}, on test: {', '.join(apart)}.")
    return found


def copies(results: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each task that tests on audio that it learns from."""
    shared = {row["task"]: row["shared_audio"] for row in results if row["shared_audio"]}
    are = {task: "1 test clip is a copy" if n == 1 else f"{n} test clips are copies" for task, n in shared.items()}
    return [f"{task}: {text} of training clips, by their bytes." for task, text in are.items()]


def unsteady(costs: Sequence[Cost], path: Path) -> list[str]:
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


def untold(path: Path, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence where the table at `path` has tasks and encoders that `rows` have not."""
    if not path.exists():
        return []
    try:
        with damage_named(path):
            before = read_parquet(path, ["task", "encoder"]).to_pylist()
    except ConfigError:  # damaged, and about to be made anew
        return []
    there, now = (dict.fromkeys((row["task"], row["encoder"]) for row in some) for some in (before, rows))
    gone = [f"{encoder} on {task}" for task, encoder in there if (task, encoder) not in now]
    if not gone:
        return []
    some = ", ".join(gone[:NAMED]) + (f" and {len(gone) - NAMED} more" if len(gone) > NAMED else "")
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
        some = "; ".join(named[:NAMED]) + (f"; and {len(named) - NAMED} more" if len(named) > NAMED else "")
        count = "1 clip is" if len(named) == 1 else f"{len(named)} clips are"
        sentences.append(f"{task.name}: {count} left out, missing, altered or damaged: {some}.")
        lines += [f"{task.name}: {line}" for line in named]
    return sentences, lines
