"""PNG plots of a study: score against temporal support and against cost, and cost against temporal support."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..files import atomic
from .cost import Cost

# Okabe and Ito's colours, told apart by readers of every kind of colour vision; marks differ too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_NOTE = dict(fontsize=8, color="0.35")
_LETTERS = 120  # that a legend as wide as a plot has room for
_MARKS = ("o", "s", "D", "^", "v", "P", "X", "*")


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigError(f"the study's plots need matplotlib ({error}): pip install 'matpac_fast[plots]'") from error
    return plt


def write_plots(
    out: Path, results: Sequence[dict[str, Any]], costs: Sequence[Cost], hop: float | None = None
) -> tuple[list[tuple[str, str]], list[str]]:
    """Draw what there is into `out`, and remove what an earlier command drew there and this one does not.

    Returns (file name, caption) of each plot, in the order of reading, and a sentence on each that could not be drawn,
    which costs the study's numbers nothing. `hop`: seconds from one window to the next; None: as the temporal support.
    """
    try:
        plt = _pyplot()
    except ConfigError as error:
        _clear(out, set())
        return [], [f"No plots: {error}"]
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[tuple[str, str]] = []
    failed: list[str] = []

    def draw(plot: Callable[..., None], name: str, caption: str, rows: list[Any]) -> None:
        try:
            plot(plt, out / name, rows, look)
            drawn.append((name, caption))
        except Exception as error:
            failed.append(f"{name} could not be drawn: {type(error).__name__}: {error}")
        finally:
            plt.close("all")

    whole = [row for row in results if not row["subset"]]
    names = list(dict.fromkeys([row["encoder"] for row in whole] + [cost.encoder for cost in costs]))
    look = {name: _look(i, name) for i, name in enumerate(names)}
    for task in dict.fromkeys(row["task"] for row in whole):
        rows = [row for row in whole if row["task"] == task]
        draw(_score, f"score-{task}.png", f"{task}: {rows[0]['metric']} against temporal support, 95 % intervals", rows)
        if all(row["peak_mib"] is not None for row in rows):
            caption = f"{task}: {rows[0]['metric']} against what it costs; points that none beats in both are joined"
            draw(_pareto, f"pareto-{task}.png", caption, rows)
    if costs:
        largest = max(cost.batch for cost in costs)
        caption = f"Cost against temporal support, {_windows(largest)} at a time"
        draw(
            lambda plt, path, costs, look: _cost(plt, path, costs, look, hop),
            "cost.png",
            caption,
            [cost for cost in costs if cost.batch == largest],
        )
        smallest = min(cost.batch for cost in costs)
        caption = f"Latency: from {_windows(smallest)} to the embedding; bars are quartiles"
        draw(_latency, "latency.png", caption, [cost for cost in costs if cost.batch == smallest])
    _clear(out, {name for name, _ in drawn})
    return drawn, failed


def _clear(out: Path, drawn: set[str]) -> None:
    """Remove the plots of an earlier command, which would stand beside this one's report as if they were of it."""
    for pattern in ("score-*.png", "pareto-*.png", "cost.png", "latency.png"):
        for path in out.glob(pattern):
            if path.name not in drawn:
                path.unlink(missing_ok=True)


def _look(number: int, name: str) -> dict[str, str]:
    """Of an encoder: no two of the first 64 have both the colour and the mark of another."""
    label = f" {name}" if name.startswith("_") else name  # legends leave out what begins with "_"
    return dict(color=_COLOURS[number % 8], marker=_MARKS[(number + number // 8) % 8], label=label)


def _windows(count: int) -> str:
    return "one window" if count == 1 else f"{count} windows"


def _save(figure: Any, path: Path) -> None:
    with atomic(path) as beside:
        figure.savefig(beside, format="png", dpi=140, bbox_inches="tight", facecolor="white")


def _ts_axis(axis: Any, values: Sequence[float]) -> None:
    axis.set_xscale("log")
    ticks = sorted(set(values))
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("temporal support (s)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _log_axis(axes: Any, which: str) -> None:
    """Logarithmic, with plain numbers; it spans a factor of four at least, so that it has ticks and a small difference
    looks small."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    if high < 4 * low:
        middle = math.sqrt(low * high)
        low, high = middle / 2, middle * 2
    places = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator([place * 10.0**decade for decade in decades for place in places]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    getattr(axes, f"set_{which}lim")(low, high)


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    columns = min(max(1, _LETTERS // (max(map(len, unique)) + 6)), 4)  # a mark is as wide as six letters
    rows = -(-len(unique) // columns)
    figure.legend(
        unique.values(), unique.keys(), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=-(-len(unique) // rows),
        frameon=False,
    )  # fmt: skip


def _score(plt: Any, path: Path, rows: list[dict[str, Any]], look: dict[str, Any]) -> None:
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    here = [name for name in look if any(row["encoder"] == name for row in rows)]
    for i, name in enumerate(here):
        mine = sorted((row for row in rows if row["encoder"] == name), key=lambda row: row["temporal_support"])
        shift = 1 + 0.012 * (i - (len(here) - 1) / 2)  # so that bars of several encoders do not hide each other
        x = [row["temporal_support"] * shift for row in mine]
        y = [row["score"] for row in mine]
        # Of NaN, as of one group, there is no bar; np.maximum keeps it, as max does not.
        bars = np.maximum(0.0, [[row["score"] - row["low"], row["high"] - row["score"]] for row in mine]).T
        axis.errorbar(x, y, bars, capsize=2, elinewidth=1, markersize=5, **look[name])
    _ts_axis(axis, [row["temporal_support"] for row in rows])
    longest, notes = rows[0]["longest_seconds"], []
    if longest < max(row["temporal_support"] for row in rows):
        axis.axvline(longest, color="0.6", linestyle=":", zorder=0)
        notes.append(f"dotted: the longest clip, {longest:.3g} s; beyond it an embedding sees no more")
    if any(math.isnan(row["low"]) for row in rows):
        notes.append("without a bar: no interval, for the test clips are one group")
    axis.set_title("\n".join(notes), **_NOTE)
    axis.set_ylabel(rows[0]["metric"])
    _legend(figure, axis)
    _save(figure, path)


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, score) that no other beats in both, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def _pareto(plt: Any, path: Path, rows: list[dict[str, Any]], look: dict[str, Any]) -> None:
    wanted = (("peak_mib", "peak memory (MiB)"), ("ms_per_audio_second", "milliseconds per second of audio"))
    panels = [(column, label) for column, label in wanted if any(row[column] > 0 for row in rows)]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    for axis, (column, label) in zip(axes[0], panels, strict=True):
        shown = [row for row in rows if row[column] > 0]  # a peak below what can be measured has no logarithm
        axis.plot(
            *zip(*_front([(row[column], row["score"]) for row in shown]), strict=True), color="0.6", lw=1, zorder=1
        )
        for row in shown:
            style = {key: value for key, value in look[row["encoder"]].items() if key != "color"}
            axis.scatter(row[column], row["score"], s=34, color=look[row["encoder"]]["color"], **style, zorder=2)
        axis.margins(x=0.12, y=0.08)  # room for the labels
        _log_axis(axis, "x")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25, which="major")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"{rows[0]['metric']} (numbers: temporal support in s)")
    _legend(figure, axes[0][-1])
    figure.canvas.draw()  # labels are placed where the points have come to lie, and stay
    figure.set_layout_engine("none")
    for axis, (column, _) in zip(axes[0], panels, strict=True):
        points = {
            (row[column], row["score"]): (f"{row['temporal_support']:g}", look[row["encoder"]]["color"])
            for row in rows
            if row[column] > 0
        }
        _label(axis, {point: points[point] for point in [*_front(list(points)), *points]})
    _save(figure, path)


def _label(axis: Any, points: dict[tuple[float, float], tuple[str, str]]) -> None:
    """Write each point's text, in its colour, beside it, the first ones first, where it covers neither a point nor
    another text; where there is no such place it is left out."""
    from matplotlib.transforms import Bbox

    per_point = axis.figure.dpi / 72
    centres = axis.transData.transform(list(points))
    taken = [Bbox.from_extents(x - 3, y - 3, x + 3, y + 3).expanded(per_point, per_point) for x, y in centres]
    for point, (text, color) in points.items():
        for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)):
            label = axis.annotate(
                text, point, xytext=(5 * right, 5 * up), textcoords="offset points", fontsize=7, color=color,
                ha=("center", "left", "right")[right], va=("center", "bottom", "top")[up],
            )  # fmt: skip
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            label.remove()


def _cost(plt: Any, path: Path, costs: list[Cost], look: dict[str, Any], hop: float | None) -> None:
    wanted: list[tuple[str, Callable[[Cost], float]]] = [
        ("milliseconds per second of audio", lambda cost: 1e3 / cost.times_real_time(hop)),
        ("peak memory (MiB)", lambda cost: cost.peak_mib),
        ("GMAC per second of audio", lambda cost: cost.macs_per_second(hop) / 1e9),
    ]
    panels = [(label, value) for label, value in wanted if any(value(cost) > 0 for cost in costs)]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.3 * len(panels) + 0.1, 4), layout="constrained", squeeze=False
    )
    for axis, (label, value) in zip(axes[0], panels, strict=True):
        absent = []
        for name, style in look.items():
            mine = sorted((c for c in costs if c.encoder == name), key=lambda c: c.temporal_support)
            seen = [c for c in mine if value(c) > 0]  # nothing to count, or too little to measure, has no logarithm
            if seen:
                axis.plot([c.temporal_support for c in seen], [value(c) for c in seen], markersize=5, **style)
            elif mine:
                absent.append(name)
        _ts_axis(axis, [c.temporal_support for c in costs])
        _log_axis(axis, "y")
        axis.set_ylabel(label)
        if absent:
            axis.set_title(f"0, so not shown: {', '.join(absent)}", **_NOTE)
    _legend(figure, axes[0][0])
    _save(figure, path)


def _latency(plt: Any, path: Path, costs: list[Cost], look: dict[str, Any]) -> None:
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for name, style in look.items():
        mine = sorted((c for c in costs if c.encoder == name), key=lambda c: c.temporal_support)
        y = [c.batch_ms for c in mine]
        bars = [[c.batch_ms - c.batch_ms_low for c in mine], [c.batch_ms_high - c.batch_ms for c in mine]]
        axis.errorbar([c.temporal_support for c in mine], y, bars, capsize=2, elinewidth=1, markersize=5, **style)
    _ts_axis(axis, [c.temporal_support for c in costs])
    _log_axis(axis, "y")
    axis.set_ylabel(f"milliseconds for {_windows(costs[0].batch)}")
    _legend(figure, axis)
    _save(figure, path)
