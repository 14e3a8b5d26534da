"""Pieces of an HTML report that is one file: charts as inline SVG, images as PNG data, and no library.

Every piece is a string of HTML; `page` puts them together. Colours follow the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

# Marks differ in shape as well as colour, so that no reader has to tell colours apart.
_MARKS = ("circle", "square", "diamond", "triangle")
# Anchors of a dark-to-light map of rising lightness, for spectrograms.
_MAP = np.array(
    [
        *[(8, 6, 24), (38, 16, 74), (84, 20, 109), (137, 34, 106), (187, 55, 84)],
        *[(227, 89, 51), (249, 142, 9), (249, 201, 50), (252, 255, 164)],
    ],
    dtype=np.float64,
)


@dataclass(frozen=True)
class Series:
    """One line of a chart: `y` over `x`, with the ends of an interval for each point where there are any."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marks: bool = True


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two of plain text under it, and pieces side by side where there is room."""

    heading: str
    text: str
    pieces: Sequence[str]


def png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> a PNG file."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # filter 0: none

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def heat(values: np.ndarray) -> np.ndarray:
    """(H, W) floats -> (H, W, 3) uint8: the 2nd percentile and below dark, the maximum light."""
    low, high = np.percentile(values, 2), values.max()
    place = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * (len(_MAP) - 1)
    below = np.minimum(place.astype(int), len(_MAP) - 2)
    share = (place - below)[..., None]
    return np.round(_MAP[below] * (1 - share) + _MAP[below + 1] * share).astype(np.uint8)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, `count` of them or somewhat fewer."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next((nice for nice in (1, 2, 5) if (high - low) / (step * nice) <= count), 10)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    log_ticks: Sequence[float] | None = None,
    from_zero: bool = True,
    y_format: str = "{:g}",
) -> str:
    """Lines with marks and intervals over common axes, and a legend where there is more than one line.

    With `log_ticks` the x axis is logarithmic, and has these. The y axis starts at 0 unless `from_zero` is false.
    `y_format` writes the y axis's numbers.
    """
    width, height, left, right, top, bottom = 460, 270, 58, 16, 12, 46
    scale = math.log if log_ticks else float
    xs = [scale(x) for one in series for x in one.x]
    ends = [value for one in series for values in (one.y, one.low, one.high) if values is not None for value in values]
    x_low, x_high = min(xs), max(xs)
    pad = (x_high - x_low) * (0.08 if log_ticks else 0.02) or 1.0
    x_low, x_high = x_low - pad, x_high + pad
    y_low, y_high = (0.0 if from_zero else min(ends)), max(ends)
    spread = (y_high - y_low) or 1.0
    y_low, y_high = (y_low if from_zero else y_low - 0.06 * spread), y_high + 0.06 * spread

    def at_x(x: float) -> float:
        return left + (scale(x) - x_low) / (x_high - x_low) * (width - left - right)

    def at_y(y: float) -> float:
        return height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = []
    for tick in ticks(y_low, y_high, 7):
        y = at_y(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{y_format.format(tick)}</text>')
    for tick in log_ticks or ticks(min(xs), max(xs)):
        x = at_x(tick)
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text x="14" y="{(top + height - bottom) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(top + height - bottom) / 2})">{escape(y_label)}</text>'
    )
    for number, one in enumerate(series):
        # Intervals at the same x stand beside each other.
        shift = (number - (len(series) - 1) / 2) * 7 if one.low is not None else 0.0
        points = [(at_x(x) + shift, at_y(y)) for x, y in zip(one.x, one.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<g class="s{number}"><polyline points="{path}"/>')
        for i, (x, y) in enumerate(points if one.marks else []):
            text = f"{one.name}: {y_format.format(one.y[i])}"
            if one.low is not None and one.high is not None:
                low, high = at_y(one.low[i]), at_y(one.high[i])
                caps = "".join(f"M{x - 4:.1f} {end:.1f}h8" for end in (low, high))
                parts.append(f'<path class="bar" d="M{x:.1f} {low:.1f}V{high:.1f}{caps}"/>')
                text += f" ({y_format.format(one.low[i])} to {y_format.format(one.high[i])})"
            parts.append(f"<g>{_mark(number, x, y)}<title>{escape(text)} at {one.x[i]:g}</title></g>")
        parts.append("</g>")
    names = ", ".join(one.name for one in series)
    svg = _svg(width, height, f"{y_label} against {x_label}: {names}", parts)
    return _legend([one.name for one in series]) + svg if len(series) > 1 else svg


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _mark(number: int, x: float, y: float) -> str:
    shape = _MARKS[number % len(_MARKS)]
    if shape == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    outline = {
        "square": ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        "diamond": ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0)),
        "triangle": ((0, -5), (5, 4), (-5, 4)),
    }[shape]
    return f'<polygon class="mark" points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in outline)}"/>'


def _legend(names: Sequence[str]) -> str:
    keys = [
        f'<span><svg class="s{i}" viewBox="0 0 24 14"><polyline points="0,7 24,7"/>{_mark(i, 12, 7)}</svg>'
        f"{escape(name)}</span>"
        for i, name in enumerate(names)
    ]
    return f'<div class="legend">{"".join(keys)}</div>'


def mask_figure(spec: np.ndarray, masked: np.ndarray, seconds: float, hz: np.ndarray) -> str:
    """A log-mel (n_mels, T) and, below it, what is left of it when the patches of `masked` (F, T') are covered.

    `seconds` is the length of the T frames, `hz` (n_mels,) the centre of each mel band.
    """
    n_mels, _ = spec.shape
    width, panel, left, top, gap, bottom = 940, 170, 58, 24, 34, 40
    wide, high = width - left - 12, 2 * panel + gap
    image = base64.b64encode(png(heat(spec)[::-1])).decode()
    parts = [
        f'<defs><image id="log-mel" width="{wide}" height="{panel}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{image}"/></defs>'
    ]
    titles = ("log-mel spectrogram", f"what the student sees: {100 * (1 - masked.mean()):.0f} % of the patches")
    for number, title in enumerate(titles):
        y = top + number * (panel + gap)
        parts.append(f'<text class="title" x="{left}" y="{y - 8}">{escape(title)}</text>')
        parts.append(f'<use href="#log-mel" x="{left}" y="{y}"/>')
        for mark in (100, 500, 1000, 2000, 4000):
            row = np.interp(mark, hz, np.arange(n_mels))
            at = y + panel * (1 - (row + 0.5) / n_mels)
            parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{mark}</text>')
    middle = top + high / 2
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">frequency (Hz)</text>'
    )
    rows, columns = masked.shape
    for row, column in np.argwhere(masked):
        x, y = left + column * wide / columns, top + panel + gap + (rows - 1 - row) * panel / rows
        parts.append(
            f'<rect class="cover" x="{x:.2f}" y="{y:.2f}" width="{wide / columns:.2f}" height="{panel / rows:.2f}"/>'
        )
    for tick in ticks(0, seconds, 8):
        x = left + tick / seconds * wide
        parts.append(f'<text x="{x:.1f}" y="{top + high + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{left + wide / 2}" y="{top + high + 36}" text-anchor="middle">time (s)</text>')
    return _svg(
        width, top + high + bottom, "A log-mel spectrogram, and the same with the masked patches covered", parts
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[tuple[int, int]] = ()) -> str:
    """A table of text; the cells (row, column) of `best` are set bold. All columns but the first align right."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="best">{escape(cell)}</td>' if (i, j) in best else f"<td>{escape(cell)}</td>"
            for j, cell in enumerate(row)
        )
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what they stand for, such as versions."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in rows) + "</dl>"


def tiles(numbers: Sequence[tuple[str, str]]) -> str:
    """The report's main numbers, large, each with a few words."""
    return (
        '<div class="tiles">'
        + "".join(f"<div><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in numbers)
        + "</div>"
    )


def page(title: str, lead: str, sections: Sequence[Section], top: str = "", style: str = "", script: str = "") -> str:
    """A whole HTML document. `title` and `lead` are plain text, `top` a piece that stands under the lead; `style` and
    `script` are added to what all pages have."""
    body = []
    for section in sections:
        pieces = "".join(f"<figure>{piece}</figure>" for piece in section.pieces)
        body.append(
            f"<section><h2>{escape(section.heading)}</h2><p>{escape(section.text)}</p>"
            f'<div class="pieces n{len(section.pieces)}">{pieces}</div></section>'
        )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}{style}</style></head>'
        f'<body><header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{top}</header>'
        f"{''.join(body)}{script and f'<script>{script}</script>'}</body></html>\n"
    )


_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f3; --card: #ffffff; --ink: #1b1d21; --dim: #63676e; --line: #e3e3de;
  --cover: #eeeeea; --s0: #0b66c2; --s1: #c4560b; --s2: #767b83; --s3: #7a48b8; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1c1e22; --ink: #e9e9e6; --dim: #a0a4ab;
  --line: #33363c; --cover: #26292e; --s0: #62aef7; --s1: #f39a53; --s2: #9ca1a9; --s3: #b794f2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 40px 20px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0 0 8px; font-size: 28px; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 0 0 4px; font-size: 18px; }
p { margin: 0; max-width: 76ch; color: var(--dim); }
.lead { font-size: 17px; }
section { margin-top: 20px; padding: 22px 24px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
figure { margin: 16px 0 0; min-width: 0; }
.pieces.n2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 0 28px;
  align-items: end; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--dim); font-size: 12px; font-variant-numeric: tabular-nums; }
svg text.title { fill: var(--ink); font-weight: 600; }
svg use { image-rendering: pixelated; }
.grid { stroke: var(--line); }
.axis { stroke: var(--dim); }
.cover { fill: var(--cover); stroke: var(--card); stroke-width: 1; }
polyline, .bar { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.bar { stroke-width: 1.5; opacity: 0.75; }
.mark { fill: currentColor; stroke: var(--card); stroke-width: 1.5; }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin-bottom: 6px; font-size: 13px; color: var(--dim); }
.legend span { display: inline-flex; align-items: center; gap: 7px; }
.legend svg { width: 24px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-top: 22px; }
.tiles div { padding: 14px 18px; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tiles b { display: block; font-size: 26px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--dim); font-size: 13.5px; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 0 8px 16px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--dim); font-weight: 500; font-size: 13.5px; line-height: 1.3; white-space: normal;
  vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
.best { font-weight: 650; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; margin: 0; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  font-size: 13px; line-height: 1.75; }
"""
