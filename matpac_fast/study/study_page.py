"""report.html of a study: one file with its plots, a table that sorts, and what made it; nothing is fetched."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_text
from .cost import Cost
from .metrics import no_clip_differs
from .report import Section, facts, page, table
from .results import Tables

_STYLE = """
.pieces.n2 { display: block; }
img { display: block; width: 100%; height: auto; border-radius: 8px; background: #fff; }
figcaption { margin-top: 6px; font-size: 13.5px; color: var(--dim); }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px; }
th[aria-sort] { color: var(--ink); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
ul { margin: 12px 0 0; padding-left: 20px; max-width: 80ch; color: var(--dim); }
.filter { margin: 0 0 10px; padding: 7px 10px; width: min(320px, 100%); font: inherit; color: inherit;
  background: var(--page); border: 1px solid var(--line); border-radius: 8px; }
td.text, th.text { text-align: left; }
"""

# Click a heading to sort by it, again to turn the order round; cells sort by data-value, empty ones last.
_SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0];
  const value = (row, i) => row.cells[i].dataset.value ?? '';
  table.tHead.querySelectorAll('th').forEach((head, i) => {
    head.querySelector('button').addEventListener('click', () => {
      const order = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
      table.tHead.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', order === 1 ? 'ascending' : 'descending');
      const rows = [...body.rows].sort((a, b) => {
        const x = value(a, i), y = value(b, i);
        if (x === '' || y === '') return (x === '') - (y === '');
        const numeric = Number(x) - Number(y);
        return order * (Number.isNaN(numeric) ? x.localeCompare(y) : numeric);
      });
      body.append(...rows);
    });
  });
  const filter = table.parentElement.previousElementSibling;
  filter.addEventListener('input', () => {
    const wanted = filter.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
}
"""

NO_SCORE, NO_CLIP = "no score: no clip of any class", "no clip differs"

# column -> heading, and how a value is written
_COLUMNS = {
    "task": ("task", "{}"),
    "subset": ("test clips of", "{}"),
    "encoder": ("encoder", "{}"),
    "temporal_support": ("TS (s)", "{:g}"),
    "seconds_seen": ("sees (s)", "{:.3g}"),
    "score": ("score", "{:.3f}"),
    "low": ("95 % from", "{:.3f}"),
    "high": ("to", "{:.3f}"),
    "metric": ("metric", "{}"),
    "test_clips": ("test clips", "{:d}"),
    "windows": ("windows a clip", "{:.1f}"),
    "peak_mib": ("peak MiB", "{:.1f}"),
    "latency_ms": ("latency ms", "{:.1f}"),
    "ms_per_audio_second": ("ms / s of audio", "{:.2f}"),
    "macs_per_audio_second": ("MAC / s of audio", "{:.3g}"),
}


def write_report(
    path: Path,
    tables: Tables,
    costs: Sequence[Cost],
    plots: Sequence[tuple[str, str]],
    choices: tuple[Sequence[str], Sequence[Sequence[str]]],
    sentences: Sequence[str],
    made: dict[str, str],
    hop: float | None = None,
) -> None:
    """`plots` are (file name, caption) beside the report; `choices` header and body of the table of temporal supports
    to take; `sentences` say what was found, `made` how. `hop`: seconds from one window to the next, by which a
    second of audio costs; None: as the temporal support."""
    sections = []
    several = any(len(row["best_by_fold"]) > 1 for row in tables.choices)
    if tables.choices:
        costed = any(row["cheapest_temporal_support"] is not None for row in tables.choices)
        text = "Both are chosen on validation clips; their" if costed else "The best is chosen on validation clips; its"
        text += " scores are those of test clips, with 95 % intervals." + (_BY_FOLD if several else "")
        sections.append(Section("Which temporal support to take", text, [table(*choices), _list(sentences)]))
    scores = [plot for plot in plots if plot[0].startswith(("score-", "pareto-"))]
    rest = [plot for plot in plots if plot not in scores]
    if scores:
        sections.append(
            Section(
                "What an embedding gains from what it sees",
                "Temporal support is the seconds of audio that one embedding sees; a clip's embeddings are averaged "
                "unless the settings below say otherwise. Bars are 95 % bootstrap intervals over test clips and seeds.",
                [_image(path.parent, *plot) for plot in scores],
            )
        )
    if rest:
        sections.append(
            Section(
                "What it costs",
                "Measured on windows of noise, each point in a process of its own. Peak memory is weights and "
                "activations; multiply-adds are counted as they run.",
                [_image(path.parent, *plot) for plot in rest],
            )
        )
    if tables.results:
        compared = [row for row in tables.comparisons if row["temporal_support"] != row["best_temporal_support"]]
        columns = dict(_COLUMNS)
        if all(f"{row['seconds_seen']:.3g}" == f"{row['temporal_support']:.3g}" for row in tables.results):
            del columns["seconds_seen"]  # no clip is shorter than what an embedding may see
        rows = [_dash(row) | ({"score": NO_SCORE} if math.isnan(row["score"]) else {}) for row in tables.results]
        sections.append(Section("Every number", _NO_MACS, [sortable("results", columns, rows)]))
        if compared:  # there were several
            sections.append(
                Section(
                    "Against the best temporal support",
                    "The difference on the same test clips, resampled together: its interval is narrower than the two "
                    "scores' intervals suggest. The best is chosen on validation clips."
                    + (_BY_FOLD if several else ""),
                    [sortable("comparisons", _COMPARED, list(map(_worded, compared)))],
                )
            )
    if tables.encoders:
        sections.append(
            Section(
                "One encoder against another",
                "Either at its best temporal support, on the same test clips, resampled together. Each pair by itself: "
                "among many some differ by chance." + (_BY_FOLD if several else ""),
                [sortable("encoders", _ENCODERS, list(map(_worded, tables.encoders)))],
            )
        )
    if costs and not tables.results:
        rows = [
            _dash(
                dict(
                    cost.__dict__,
                    ms_per_audio_second=1e3 / cost.times_real_time(hop),
                    macs_per_audio_second=cost.macs_per_second(hop),
                )
            )
            for cost in costs
        ]
        sections.append(Section("Every number", _NO_MACS, [sortable("costs", _COSTS, rows), _list(sentences)]))
    sections.append(Section("How this was made", "", [facts(list(made.items()))]))
    lead = "How many seconds of audio must an embedding see, and what does each second cost?"
    title = "Temporal support: what it gains and what it costs"
    write_text(path, page(title, lead, sections, style=_STYLE, script=_SCRIPT))


_BY_FOLD = (
    " Where a task has several folds, the temporal support named is that of all folds' validation clips; as these "
    "are tested in other folds, scores and differences are of what each fold's own validation clips choose."
)
_APART = {
    "difference": ("difference", "{:+.3f}"),
    "low": ("95 % from", "{:+.3f}"),
    "high": ("to", "{:+.3f}"),
    "metric": ("metric", "{}"),
}
_COMPARED = {
    "task": ("task", "{}"),
    "encoder": ("encoder", "{}"),
    "temporal_support": ("TS (s)", "{:g}"),
    "best_temporal_support": ("best TS (s)", "{:g}"),
    **_APART,
}
_ENCODERS = {
    "task": ("task", "{}"),
    "encoder": ("encoder", "{}"),
    "temporal_support": ("TS (s)", "{:g}"),
    "other": ("against", "{}"),
    "other_temporal_support": ("its TS (s)", "{:g}"),
    **_APART,
}
_COSTS = {
    "encoder": ("encoder", "{}"),
    "temporal_support": ("TS (s)", "{:g}"),
    "batch": ("windows", "{:d}"),
    "peak_mib": ("peak MiB", "{:.1f}"),
    "weights_mib": ("weights MiB", "{:.1f}"),
    "batch_ms": ("ms", "{:.2f}"),
    "ms_per_audio_second": ("ms / s of audio", "{:.2f}"),
    "macs": ("MAC a window", "{:.3g}"),
    "macs_per_audio_second": ("MAC / s of audio", "{:.3g}"),
    "parameters": ("parameters", "{:d}"),
}


_NO_MACS = "A dash: there is nothing of the kind, such as matrix products and convolutions to count."


def _dash(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose multiply-adds, where none were counted, are a dash and no 0: they are not free of work."""
    return {key: None if key.startswith("macs") and value == 0 else value for key, value in row.items()}


def _worded(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a difference, which has words in the place of an interval without width."""
    same = no_clip_differs(row["difference"], row["low"], row["high"])
    return row | ({"low": NO_CLIP, "high": ""} if same else {})


def sortable(name: str, columns: dict[str, tuple[str, str]], rows: Sequence[dict[str, Any]]) -> str:
    """A table whose headings sort it, and a field above it that keeps the rows with some text."""
    shown = {key: column for key, column in columns.items() if any(row[key] not in (None, "") for row in rows)}
    text = {key: " class=text" if form == "{}" else "" for key, (_, form) in shown.items()}
    head = "".join(
        f'<th{text[key]}><button type="button">{escape(heading)}</button></th>' for key, (heading, _) in shown.items()
    )
    body = "".join(
        "<tr>" + "".join(_cell(row[key], form, text[key]) for key, (_, form) in shown.items()) + "</tr>" for row in rows
    )
    return (
        f'<input class="filter" type="search" placeholder="rows that contain …" aria-label="filter {escape(name)}">'
        f'<div class="scroll"><table class="sortable" id="{escape(name)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any, form: str, text: str) -> str:
    if value is None or value != value:  # NaN
        return f"<td{text}>–</td>"
    if isinstance(value, str) and form != "{}":  # words in the place of a number
        return f"<td{text}>{escape(value)}</td>"
    return f'<td{text} data-value="{escape(str(value))}">{escape(form.format(value))}</td>'


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _image(folder: Path, name: str, caption: str) -> str:
    data = base64.b64encode((folder / name).read_bytes()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption>'
