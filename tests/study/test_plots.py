"""Plots of a study: what is drawn, what is left out of them, and what a plot that fails costs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from matpac_fast.errors import ConfigError
from matpac_fast.study import plots
from matpac_fast.study.cost import Cost

pytest.importorskip("matplotlib")


def made_cost(name: str, ts: float, macs: int, peak: float = 3.0) -> Cost:
    return Cost(name, name, ts, 1, "cpu", "float32", 1, 10, macs, 4e0, 3.0, 5.0, 5, peak, 1.0, 16_000, 8, "2", "0")


@pytest.fixture
def drawn(monkeypatch) -> dict[str, Any]:
    """The figures that are saved, by file name."""
    figures: dict[str, Any] = {}
    real = plots._save

    def keep(figure, path):
        figures[path.name] = figure
        real(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def panels(figure) -> dict[str, Any]:
    return {axis.get_ylabel(): axis for axis in figure.axes}


def labels(axis) -> list[str]:
    low, high = axis.get_view_interval()
    return [text.get_text() for text in axis.get_ticklabels() if low <= text.get_position()[1] <= high]


def test_without_anything_to_count_there_is_no_such_panel(drawn, tmp_path):
    made, failed = plots.write_plots(tmp_path, [], [made_cost("statistics", ts, 0) for ts in (1.0, 5.0)])
    assert failed == []
    assert [name for name, _ in made] == ["cost.png", "latency.png"]
    assert list(panels(drawn["cost.png"])) == ["milliseconds per second of audio", "peak memory (MiB)"]


def test_who_is_not_in_a_panel_is_named_there(drawn, tmp_path):
    costs = [made_cost("statistics", 1.0, 0, peak=0.0), made_cost("network", 1.0, 10**8)]
    plots.write_plots(tmp_path, [], costs)
    titles = {label: axis.get_title() for label, axis in panels(drawn["cost.png"]).items()}
    assert titles["GMAC per second of audio"] == titles["peak memory (MiB)"] == "0, so not shown: statistics"
    assert titles["milliseconds per second of audio"] == ""


@pytest.mark.parametrize("values", [(0.0876, 0.1003), (0.1, 0.1), (0.9, 5.0), (3.0, 7000.0), (9.99e-4, 1.001e-3)])
def test_every_axis_has_ticks_and_small_differences_look_small(drawn, tmp_path, values):
    costs = [made_cost("network", ts, round(1e9 * ts * value)) for ts, value in zip((1.0, 5.0), values, strict=True)]
    plots.write_plots(tmp_path, [], costs)
    axis = panels(drawn["cost.png"])["GMAC per second of audio"]
    assert 3 <= len(labels(axis.yaxis)) <= 8
    low, high = axis.get_ylim()
    assert low < min(values)
    assert high > max(max(values), 3.9 * low)


def test_a_plot_that_fails_costs_no_other(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no such scale")

    monkeypatch.setattr(plots, "_cost", broken)
    made, failed = plots.write_plots(tmp_path, [], [made_cost("e", 1.0, 10)])
    assert [name for name, _ in made] == ["latency.png"]
    assert failed == ["cost.png could not be drawn: ValueError: no such scale"]


def test_without_matplotlib_there_are_no_plots(tmp_path, monkeypatch):
    def missing():
        raise ConfigError("the study's plots need matplotlib")

    monkeypatch.setattr(plots, "_pyplot", missing)
    assert plots.write_plots(tmp_path, [], [made_cost("e", 1.0, 10)]) == (
        [],
        ["No plots: the study's plots need matplotlib"],
    )


def test_each_plot_is_of_its_own_rows(monkeypatch, tmp_path):
    drawn: dict[str, list[Any]] = {}
    for name in ("_score", "_pareto", "_cost", "_latency"):
        monkeypatch.setattr(plots, name, lambda plt, path, rows, *_: drawn.update({path.name: rows}))
    small = made_cost("e", 1.0, 1)
    large = dataclasses.replace(small, batch=16)
    row = dict(task="t", encoder="e", subset="", metric="accuracy", peak_mib=1.0)
    other = row | dict(task="u", peak_mib=None)
    plots.write_plots(tmp_path, [row, row | dict(subset="even"), other], [large, small])
    assert drawn == {
        "score-t.png": [row],
        "pareto-t.png": [row],
        "score-u.png": [other],
        "cost.png": [large],
        "latency.png": [small],
    }


@pytest.mark.parametrize(("longest", "told"), [(1.5, "dotted: the longest clip, 1.5 s"), (2.0, "")])
def test_bars_are_the_intervals_and_where_clips_end_is_told(drawn, tmp_path, longest, told):
    row = dict(task="t", encoder="e", subset="", metric="accuracy", peak_mib=None, longest_seconds=longest)
    rows = [row | dict(temporal_support=ts, score=0.5, low=0.4, high=0.5 + ts / 10) for ts in (2.0, 1.0)]
    assert plots.write_plots(tmp_path, rows, [])[1] == []
    (axis,) = drawn["score-t.png"].axes
    _, _, (bars,) = axis.containers[0].lines
    ends = [[round(float(y), 6) for _, y in segment] for segment in bars.get_segments()]
    assert ends == [[0.4, 0.6], [0.4, 0.7]]
    assert axis.get_title().startswith(told)
    assert bool(axis.get_title()) == bool(told)


def test_points_are_the_numbers_of_their_encoder_by_rising_temporal_support(drawn, tmp_path):
    costs = []
    for ts in (5.0, 0.5):
        for name, more in (("e", 0.0), ("f", 1.0)):
            ms = 4 * ts + more
            plain = made_cost(name, ts, round(1e9 * ts**2), peak=ts + more)
            costs.append(dataclasses.replace(plain, batch_ms=ms, batch_ms_low=0.8 * ms, batch_ms_high=1.5 * ms))
    row = dict(task="t", subset="", metric="accuracy", low=0.0, high=1.0, longest_seconds=9.0)
    rows = [
        row
        | dict(encoder=each.encoder, temporal_support=each.temporal_support, score=1 / each.batch_ms)
        | dict(peak_mib=each.peak_mib, ms_per_audio_second=each.batch_ms / each.temporal_support)
        for each in costs
    ]
    assert plots.write_plots(tmp_path, rows, costs)[1] == []

    def lines(axis):
        return [line.get_xydata().tolist() for line in ([bars.lines[0] for bars in axis.containers] or axis.lines)]

    cost = panels(drawn["cost.png"])
    (score,), (latency,) = drawn["score-t.png"].axes, drawn["latency.png"].axes
    for axis, e, f in (
        (score, ((0.5, 1 / 2), (5.0, 1 / 20)), ((0.5, 1 / 3), (5.0, 1 / 21))),
        (latency, ((0.5, 2.0), (5.0, 20.0)), ((0.5, 3.0), (5.0, 21.0))),
        (cost["milliseconds per second of audio"], ((0.5, 4.0), (5.0, 4.0)), ((0.5, 6.0), (5.0, 4.2))),
        (cost["peak memory (MiB)"], ((0.5, 0.5), (5.0, 5.0)), ((0.5, 1.5), (5.0, 6.0))),
        (cost["GMAC per second of audio"], ((0.5, 0.5), (5.0, 5.0)), ((0.5, 0.5), (5.0, 5.0))),
    ):
        np.testing.assert_allclose(lines(axis), (e, f), rtol=0.007)  # scores stand beside each other
        assert [text.get_text() for text in axis.get_xticklabels()] == ["0.5", "5"]
    bars = [part[:, 1] for part in latency.containers[1].lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [(0.8 * 3, 1.5 * 3), (0.8 * 21, 1.5 * 21)])
    for axis, column in zip(drawn["pareto-t.png"].axes, ("peak_mib", "ms_per_audio_second"), strict=True):
        dots = [found.get_offsets()[0] for found in axis.collections]
        np.testing.assert_allclose(dots, [(each[column], each["score"]) for each in rows])


def test_the_front_is_what_none_beats_in_both():
    points = [(3.0, 0.6), (2.0, 0.5), (1.0, 0.5), (1.0, 0.4), (4.0, 0.1)]
    assert plots._front(points) == [(1.0, 0.5), (3.0, 0.6)]


def test_a_peak_of_nothing_is_no_point_of_the_trade(drawn, tmp_path):
    row = dict(task="t", encoder="e", subset="", metric="accuracy", score=0.5, low=0.4, high=0.6, temporal_support=1.0)
    row |= dict(longest_seconds=1.0)
    rows = [row | dict(peak_mib=0.0, ms_per_audio_second=ms, temporal_support=ms) for ms in (1.0, 2.0)]
    assert plots.write_plots(tmp_path, rows, [])[1] == []
    (time,) = drawn["pareto-t.png"].axes
    assert time.get_xlabel() == "milliseconds per second of audio"
    assert time.get_ylabel() == "accuracy (numbers: temporal support in s)"


def test_every_encoder_is_told_from_the_others(drawn, tmp_path):
    names = ["_old/run", "/home/somebody/" + 60 * "x", *(f"runs/{i}" for i in range(9))]
    plots.write_plots(tmp_path, [], [made_cost(name, 1.0, 10**8) for name in names])
    figure = drawn["latency.png"]
    (legend,) = figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == names
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(names)
    assert legend.get_window_extent().width < figure.bbox.width


def test_numbers_of_the_trade_cover_nothing_and_the_front_has_its_own(monkeypatch, tmp_path):
    """Three points apart, which nothing beats, and a crowd."""
    spots = [(1.0, 0.2), (10.0, 0.5), (100.0, 0.9), *((50.0 + i / 5, 0.3 + i / 1000) for i in range(30))]
    rows = [
        dict(task="t", encoder=f"e{i % 2}", metric="accuracy", subset="", temporal_support=float(i), score=score)
        | dict(low=score, high=score, peak_mib=peak, ms_per_audio_second=0.0, longest_seconds=100.0)
        for i, (peak, score) in enumerate(spots)
    ]
    boxes, points = {}, []

    def look(figure, path):  # at the resolution of the placing: at another one text is as large, but for rounding
        if path.name == "pareto-t.png":
            (axis,) = figure.axes
            boxes.update({text.get_text(): text.get_window_extent() for text in axis.texts})
            points.extend(axis.transData.transform(spots))

    monkeypatch.setattr(plots, "_save", look)
    assert plots.write_plots(tmp_path, rows, [])[1] == []
    assert {"0", "1", "2"} <= boxes.keys()
    assert 5 < len(boxes) < len(spots) == len(points)
    for i, box in enumerate(boxes.values()):
        assert not any(box.overlaps(other) for other in list(boxes.values())[:i])
        assert not any(box.contains(*point) for point in points)


def test_plots_of_an_earlier_command_are_removed(tmp_path, monkeypatch):
    row = dict(task="t", encoder="e", subset="", metric="accuracy", score=0.5, low=0.4, high=0.6, temporal_support=1.0)
    row |= dict(longest_seconds=1.0, peak_mib=1.0, ms_per_audio_second=1.0)
    costs = [made_cost("e", 1.0, 10)]
    (tmp_path / "mine.png").touch()
    plots.write_plots(tmp_path, [row, row | dict(task="[u]")], costs)
    names = {"cost.png", "latency.png", "mine.png", "score-t.png", "pareto-t.png"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"score-[u].png", "pareto-[u].png"}
    plots.write_plots(tmp_path, [row], costs)
    assert {path.name for path in tmp_path.iterdir()} == names
    plots.write_plots(tmp_path, [row | dict(peak_mib=None)], [])
    assert {path.name for path in tmp_path.iterdir()} == {"mine.png", "score-t.png"}

    def missing():
        raise ConfigError("no matplotlib")

    monkeypatch.setattr(plots, "_pyplot", missing)
    plots.write_plots(tmp_path, [row], costs)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.png"}


def test_without_an_interval_there_is_no_bar_and_a_note(drawn, tmp_path):
    row = dict(task="t", encoder="e", subset="", metric="accuracy", peak_mib=None, longest_seconds=9.0, score=0.5)
    none = float("nan")
    rows = [row | dict(temporal_support=1.0, low=none, high=none), row | dict(temporal_support=2.0, low=0.4, high=0.6)]
    assert plots.write_plots(tmp_path, rows, [])[1] == []
    (axis,) = drawn["score-t.png"].axes
    _, caps, (bars,) = axis.containers[0].lines
    ends = [[float(y) for _, y in segment] for segment in bars.get_segments()]
    assert [each for each in ends if each] == [[0.4, 0.6]]
    assert all(math.isnan(cap.get_ydata()[0]) for cap in caps)
    assert axis.get_title() == "without a bar: no interval, for the test clips are one group"
