"""The report's pieces: images that decode, charts that put points where the numbers are, text that cannot break out."""

from __future__ import annotations

import base64
import re
import struct
import xml.etree.ElementTree as ET
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from matpac_fast.study.report import (
    Section,
    Series,
    facts,
    heat,
    line_chart,
    mask_figure,
    page,
    png,
    table,
    ticks,
    tiles,
)


def decode(data: bytes) -> np.ndarray:
    """Read an 8-bit RGB PNG without filters, checking every checksum."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, chunks = 8, {}
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        name, body = data[position + 4 : position + 8], data[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", data, position + 8 + length)[0] == zlib.crc32(name + body)
        chunks[name] = body
        position += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert kind == [8, 2, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def marks(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle class="mark" cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_png_round_trip() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 13, 3), dtype=np.uint8)
    assert np.array_equal(decode(png(pixels)), pixels)


def test_heat_rises_in_lightness_and_bears_silence() -> None:
    colours = heat(np.linspace(-1.0, 3.0, 200)[None])[0].astype(float)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > -0.5).all()
    assert lightness[0] < 20
    assert lightness[-1] > 230
    assert heat(np.zeros((3, 4))).shape == (3, 4, 3)


def test_heat_is_of_the_range_there_is() -> None:
    """Not of so many decibels: what is quiet throughout has the contrast of what is loud."""
    values = np.random.default_rng(0).normal(size=(8, 50))
    assert np.array_equal(heat(values / 8 - 4), heat(values))


@pytest.mark.parametrize(
    ("low", "high", "count", "expected"),
    [
        (0, 1, 5, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.31, 0.52, 5, [0.35, 0.4, 0.45, 0.5]),
        (7, 7, 5, [7]),
        (-3, 12, 5, [0, 5, 10]),
        (0, 400, 5, [0, 100, 200, 300, 400]),
    ],
)
def test_ticks_are_round(low: float, high: float, count: int, expected: list[float]) -> None:
    assert ticks(low, high, count) == pytest.approx(expected)


def test_points_stand_where_their_numbers_are() -> None:
    svg = line_chart([Series("a", [0, 10, 30], [0.0, 2.0, 4.0])], "x", "y")
    (x0, y0), (x1, y1), (x2, y2) = marks(svg)
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 3, abs=1e-3)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(1 / 2, abs=1e-3)
    assert y2 < y1 < y0  # up is more
    # The labelled tick of 4 stands at the height of the point 4.
    label = re.search(r'y="([\d.]+)" text-anchor="end">4<', svg)
    assert label
    assert float(label[1]) - 4 == pytest.approx(y2, abs=0.1)


@pytest.mark.parametrize("from_zero", [True, False])
@pytest.mark.parametrize("log", [True, False])
def test_points_and_intervals_lie_within_the_axes_which_begin_at_zero_or_do_not(log: bool, from_zero: bool) -> None:
    x, y = [1.0, 10.0, 30.0], [52.0, 54.0, 53.0]
    series = [Series("a", x, y, low=[v - 1 for v in y], high=[v + 1 for v in y])]
    svg = line_chart(series, "x", "y", log_ticks=x if log else None, from_zero=from_zero)
    axis = re.search(r'class="axis" x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)"', svg)
    assert axis
    left, right, floor = map(float, axis.groups())
    xs, ys = zip(*marks(svg), strict=True)
    ends = [float(end) for bar in re.findall(r'class="bar" d="M[\d.]+ ([\d.]+)V([\d.]+)', svg) for end in bar]
    assert left < xs[0] < left + 40
    assert right - 40 < xs[2] < right
    assert 0 < min(ends) < min(ys)
    assert max(ys) < max(ends) < floor
    zero = f'y="{floor + 4}" text-anchor="end">0<' in svg
    assert zero == from_zero


def test_a_logarithmic_axis_is_one() -> None:
    svg = line_chart([Series("a", [0.5, 1, 2], [1.0, 1.0, 1.0])], "x", "y", log_ticks=[0.5, 1, 2])
    (x0, _), (x1, _), (x2, _) = marks(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert all(f">{tick}<" in svg for tick in ("0.5", "1", "2"))


def test_intervals_span_their_ends() -> None:
    both = [Series(name, [1, 2], [0.5, 0.6], low=[0.4, 0.5], high=[0.7, 0.8]) for name in ("a", "b")]
    svg = line_chart(both, "x", "y", y_format="{:.0%}")
    bars = re.findall(r'class="bar" d="M[\d.]+ ([\d.]+)V([\d.]+)', svg)
    assert len(bars) == 4
    points = marks(svg)[1:]  # the first is the legend's
    low, high = map(float, bars[0])
    # A tenth of the axis is as long below the first point as two tenths above it.
    assert (points[0][1] - high) == pytest.approx(2 * (low - points[0][1]), abs=0.3)
    assert "a: 50% (40% to 70%) at 1" in svg
    assert svg.count("<title>") == 4


def test_one_point_and_flat_lines_are_drawn() -> None:
    for series in (Series("a", [3], [2.0]), Series("a", [1, 2], [0.0, 0.0])):
        svg = line_chart([series], "x", "y", from_zero=False)
        assert "nan" not in svg
        assert len(marks(svg)) == len(series.x)
        ET.fromstring(svg)


def test_mask_figure_covers_the_masked_patches() -> None:
    rng = np.random.default_rng(1)
    spec, masked = rng.normal(size=(80, 96)), np.zeros((5, 6), bool)
    masked[0, 0] = masked[4, 5] = True
    svg = mask_figure(spec, masked, 0.96, np.geomspace(60, 7800, 80))
    image = re.search(r"data:image/png;base64,([^\"]+)", svg)
    assert image
    assert np.array_equal(decode(base64.b64decode(image[1])), heat(spec)[::-1])  # low frequencies at the bottom
    covers = [
        tuple(map(float, c)) for c in re.findall(r'class="cover" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', svg)
    ]
    assert len(covers) == 2
    (x0, y0, width), (x1, y1, _) = covers
    assert x1 - x0 == pytest.approx(5 * width, abs=0.1)
    assert y1 < y0  # the lowest band is the lowest row
    assert "93 % of the patches" in svg
    ET.fromstring(svg)


class Outline(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_whole_and_needs_nothing_from_outside() -> None:
    evil = '<script>alert("x")</script>&'
    chart = line_chart([Series(evil, [1, 2], [1, 2]), Series("b", [1, 2], [2, 1])], evil, evil)
    figure = mask_figure(np.ones((80, 16)), np.ones((5, 1), bool), 0.16, np.geomspace(60, 7800, 80))
    pieces = [chart, figure, table([evil, "b"], [[evil, "2"]], best=[(0, 1)]), facts([(evil, evil)])]
    text = page(
        evil, evil, [Section(evil, evil, pieces), Section("two", "", [chart, chart])], top=tiles([(evil, evil)])
    )
    outline = Outline()
    outline.feed(text)
    assert not outline.open
    assert "script" not in outline.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in outline.links)
    assert not re.search(r"url\(|@import|https?://", text)
    assert '<td class="best">2</td>' in text
    assert outline.tags.count("section") == 2
    assert outline.tags.count("figure") == 6
