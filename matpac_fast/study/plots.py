"""PNG plots of a study: score against temporal support and against cost, and cost against temporal support."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import atomic
from .cost import Cost

# Okabe and Ito's colours, told apart by readers of every kind of colour vision; marks differ too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
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
    out: Path, results: Sequence[dict[str, Any]], costs: Sequence[Cost], batch: int | None = None
) -> list[tuple[str, str]]:
    """Draw what there is into `out`, and return (file name, caption) of each plot, in the order of reading."""
    plt = _pyplot()
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[tuple[str, str]] = []
    whole = [row for row in results if not row["subset"]]
    names = list(dict.fromkeys([row["encoder"] for row in whole] + [cost.encoder for cost in costs]))
    look = {name: dict(color=_COLOURS[i % 8], marker=_MARKS[i % 8], label=name) for i, name in enumerate(names)}
    for task in dict.fromkeys(row["task"] for row in whole):
        rows = [row for row in whole if row["task"] == task]
        drawn.append((f"score-{task}.png", f"{task}: {rows[0]['metric']} against temporal support, 95 % intervals"))
        _score(plt, out / drawn[-1][0], rows, look)
        if all(row["peak_mib"] is not None for row in rows):
            caption = f"{task}: {rows[0]['metric']} against what it costs; points that none beats in both are joined"
            drawn.append((f"pareto-{task}.png", caption))
            _pareto(plt, out / drawn[-1][0], rows, look)
    if costs:
        largest = max(cost.batch for cost in costs) if batch is None else batch
        drawn.append(("cost.png", f"Cost against temporal support, {largest} windows at a time"))
        _cost(plt, out / "cost.png", [cost for cost in costs if cost.batch == largest], look)
        smallest = min(cost.batch for cost in costs)
        some = "one window" if smallest == 1 else f"{smallest} windows"
        drawn.append(("latency.png", f"Latency: from {some} to the embedding; bars are quartiles"))
        _latency(plt, out / "latency.png", [cost for cost in costs if cost.batch == smallest], look)
    return drawn


def _save(plt: Any, figure: Any, path: Path) -> None:
    with atomic(path) as beside:
        figure.savefig(beside, format="png", dpi=140, bbox_inches="tight", facecolor="white")
    plt.close(figure)


def _ts_axis(axis: Any, values: Sequence[float]) -> None:
    axis.set_xscale("log")
    ticks = sorted(set(values))
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("temporal support (s)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _log_axis(axis: Any) -> None:
    """Logarithmic, with plain numbers; an axis of less than a decade has ticks too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    rows = -(-len(unique) // 4)
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
        bars = [
            [max(0.0, row["score"] - row["low"]) for row in mine],
            [max(0.0, row["high"] - row["score"]) for row in mine],
        ]
        axis.errorbar(x, y, bars, capsize=2, elinewidth=1, markersize=5, **look[name])
    _ts_axis(axis, [row["temporal_support"] for row in rows])
    axis.set_ylabel(rows[0]["metric"])
    _legend(figure, axis)
    _save(plt, figure, path)


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, score) that no other beats in both, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def _pareto(plt: Any, path: Path, rows: list[dict[str, Any]], look: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained", sharey=True)
    for axis, column, label in (
        (axes[0], "peak_mib", "peak memory (MiB)"),
        (axes[1], "ms_per_audio_second", "milliseconds per second of audio"),
    ):
        axis.plot(
            *zip(*_front([(row[column], row["score"]) for row in rows]), strict=True), color="0.6", lw=1, zorder=1
        )
        for row in rows:
            style = {key: value for key, value in look[row["encoder"]].items() if key != "color"}
            axis.scatter(row[column], row["score"], s=34, color=look[row["encoder"]]["color"], **style, zorder=2)
            axis.annotate(
                f"{row['temporal_support']:g}", (row[column], row["score"]), xytext=(4, 4), textcoords="offset points",
                fontsize=7, color="0.35",
            )  # fmt: skip
        axis.set_xscale("log")
        _log_axis(axis.xaxis)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25, which="major")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"{rows[0]['metric']} (numbers: temporal support in s)")
    _legend(figure, axes[0])
    _save(plt, figure, path)


def _cost(plt: Any, path: Path, costs: list[Cost], look: dict[str, Any]) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for axis, value, label in (
        (axes[0], lambda cost: cost.peak_mib, "peak memory (MiB)"),
        (axes[1], lambda cost: 1e3 / cost.times_real_time, "milliseconds per second of audio"),
        (axes[2], lambda cost: cost.macs_per_second / 1e9, "GMAC per second of audio"),
    ):
        for name, style in look.items():
            mine = sorted((c for c in costs if c.encoder == name), key=lambda c: c.temporal_support)
            mine = [c for c in mine if value(c) > 0]  # no products to count: nothing to show on a logarithmic axis
            axis.plot([c.temporal_support for c in mine], [value(c) for c in mine], markersize=5, **style)
        _ts_axis(axis, [c.temporal_support for c in costs])
        axis.set_yscale("log")
        _log_axis(axis.yaxis)
        axis.set_ylabel(label)
    _legend(figure, axes[0])
    _save(plt, figure, path)


def _latency(plt: Any, path: Path, costs: list[Cost], look: dict[str, Any]) -> None:
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    for name, style in look.items():
        mine = sorted((c for c in costs if c.encoder == name), key=lambda c: c.temporal_support)
        y = [c.batch_ms for c in mine]
        bars = [[c.batch_ms - c.batch_ms_low for c in mine], [c.batch_ms_high - c.batch_ms for c in mine]]
        axis.errorbar([c.temporal_support for c in mine], y, bars, capsize=2, elinewidth=1, markersize=5, **style)
    _ts_axis(axis, [c.temporal_support for c in costs])
    axis.set_yscale("log")
    _log_axis(axis.yaxis)
    axis.set_ylabel("milliseconds")
    _legend(figure, axis)
    _save(plt, figure, path)
