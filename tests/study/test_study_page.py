"""The page of a study: every number in its table, and the words that are true of this study."""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path

import numpy as np
import pytest

from matpac_fast.cli._study_words import choice_cells
from matpac_fast.study.cell import Cell
from matpac_fast.study.metrics import no_clip_differs
from matpac_fast.study.results import Tables, tabulate
from matpac_fast.study.study_page import NO_CLIP, NO_SCORE, sortable, write_report
from tests.study.conftest import made_cost
from tests.study.test_choose import cell, made, rotating

BY_FOLD = "own validation clips choose"


def page(folder: Path, tables: Tables, **more) -> str:
    given = dict(costs=[], plots=[], choices=choice_cells(tables), sentences=["a sentence"], made={}) | more
    write_report(folder / "report.html", tables, **given)
    return (folder / "report.html").read_text()


def read(text: str, name: str) -> list[dict[str, str]]:
    """The rows of a table, by its headings."""
    body = text.split(f'id="{name}"')[1].split("</table>")[0]
    lines = [re.findall(r"<t[hd][^>]*>(?:<button[^>]*>)?(.*?)<", row) for row in body.split("<tr>")[1:]]
    return [dict(zip(lines[0], map(html.unescape, line), strict=True)) for line in lines[1:]]


def in_folds(number: int, name: str, **options) -> list[Cell]:
    """Of a task in so many folds."""
    task = dataclasses.replace(rotating(3, 10), name=name)
    task = dataclasses.replace(task, folds=task.folds[:number])
    return made(task, [[0.5, 0.9, 0.4], [0.4, 0.8, 1.0]], **options)


def test_every_number_and_every_difference_stands_there(tmp_path):
    tables = tabulate(in_folds(3, "t") + in_folds(3, "t", encoder="<other>"), 0.6, resamples=20)
    text = page(tmp_path, tables, costs=[made_cost(1.0)], made={"torch": "2.x"})
    for shown, row in zip(read(text, "results"), tables.results, strict=True):
        want = dict(task="t", encoder=row["encoder"], metric="accuracy")
        want |= {"TS (s)": f"{row['temporal_support']:g}", "test clips": "30", "windows a clip": "1.0"}
        want |= {"score": f"{row['score']:.3f}", "95 % from": f"{row['low']:.3f}", "to": f"{row['high']:.3f}"}
        want |= {"peak MiB": f"{row['peak_mib']:.1f}", "latency ms": "4000.0" if want["TS (s)"] == "1" else "8000.0"}
        assert {name: shown[name] for name in want} == want
        assert "test clips of" not in shown  # there is no subset
        assert "sees (s)" not in shown  # no clip is shorter
    others = [row for row in tables.comparisons if row["temporal_support"] != row["best_temporal_support"]]
    assert len(others) == 2
    for name, rows in (("comparisons", others), ("encoders", tables.encoders)):
        for shown, row in zip(read(text, name), rows, strict=True):
            same = no_clip_differs(row["difference"], row["low"], row["high"])
            assert same == (name == "encoders")
            ends = (NO_CLIP, "") if same else (f"{row['low']:+.3f}", f"{row['high']:+.3f}")
            want = dict(encoder=row["encoder"], difference=f"{row['difference']:+.3f}")
            want |= {"TS (s)": f"{row['temporal_support']:g}", "95 % from": ends[0], "to": ends[1]}
            assert {name: shown.get(name, "") for name in want} == want  # a column without a word is left out
    assert [shown["best TS (s)"] for shown in read(text, "comparisons")] == ["2", "2"]
    assert [shown["against"] for shown in read(text, "encoders")] == ["<other>", "e"]
    for once in (
        "Which temporal support to take",
        "<li>a sentence</li>",
        "cheapest TS",
        "Both are chosen on",
        "<dt>torch</dt><dd>2.x</dd>",
    ):
        assert text.count(once) == 1
    assert 'id="costs"' not in text  # they are of the rows


def test_what_an_embedding_sees_stands_beside_its_temporal_support_where_a_clip_is_shorter(tmp_path):
    task = dataclasses.replace(rotating(3, 10), seconds=np.full(30, 1.5))
    text = page(tmp_path, tabulate([cell(task, ts, np.ones(30, bool)) for ts in (1.0, 2.0)], 0.01, resamples=10))
    assert [(shown["TS (s)"], shown["sees (s)"]) for shown in read(text, "results")] == [("1", "1"), ("2", "1.5")]


@pytest.mark.parametrize(("folds", "told"), [((3,), 3), ((1,), 0), ((1, 3), 3), ((3, 1), 3)])
def test_choices_by_fold_are_explained_where_a_task_has_several(tmp_path, folds, told):
    cells = [each for i, n in enumerate(folds) for e in "ab" for each in in_folds(n, f"task {i}", encoder=e)]
    text = page(tmp_path, tabulate(cells, 0.01, resamples=10))
    assert text.count(BY_FOLD) == told  # beside choices, differences and encoders


@pytest.mark.parametrize("uncosted", [(), ("a",), ("a", "b")])
def test_the_cheapest_is_told_of_where_there_is_one(tmp_path, uncosted):
    cells = [each for e in "ab" for each in in_folds(3, "t", encoder=e)]
    cells = [dataclasses.replace(each, costs=[]) if each.encoder in uncosted else each for each in cells]
    text = page(tmp_path, tabulate(cells, 0.6, resamples=10))
    assert ("Both are chosen on validation clips; their scores" in text) == (len(uncosted) < 2)
    assert ("The best is chosen on validation clips; its scores" in text) == (len(uncosted) == 2)
    assert [shown.get("peak MiB") for shown in read(text, "results")][:2] == (
        ["1.0", "2.0"] if not uncosted else [None] * 2 if len(uncosted) == 2 else ["–"] * 2
    )


def test_one_temporal_support_of_one_encoder_is_compared_with_nothing(tmp_path):
    text = page(tmp_path, tabulate(in_folds(3, "t")[:1], 0.01, resamples=10))
    assert len(read(text, "results")) == 1
    assert "Against the best" not in text
    assert "One encoder against another" not in text


def test_plots_stand_with_what_they_show(tmp_path):
    names = ("score-t.png", "cost.png", "pareto-t.png", "latency.png")
    for name in names:
        (tmp_path / name).write_bytes(b"PNG")
    plots = [(name, f"of {name}") for name in names]
    text = page(tmp_path, Tables(), plots=plots, costs=[made_cost(2.0)])
    gains, costs = text.split("What it costs")
    assert re.findall(r"<figcaption>of (.*?)<", gains) == ["score-t.png", "pareto-t.png"]
    assert re.findall(r"<figcaption>of (.*?)<", costs) == ["cost.png", "latency.png"]
    for absent in ("What it costs", "What an embedding gains", "Which temporal support"):
        assert absent not in page(tmp_path, Tables(), costs=[made_cost(1.0)])


def test_costs_alone_are_those_of_a_second_of_audio_and_what_was_not_counted_is_a_dash(tmp_path):
    costs = [made_cost(2.0), dataclasses.replace(made_cost(0.5), macs=0, peak_mib=0.0)]
    text = page(tmp_path, Tables(), costs=costs)
    shown = [{name: row[name] for name in row if "of audio" in name or "MiB" in name} for row in read(text, "costs")]
    assert shown == [
        {"peak MiB": "1.0", "weights MiB": "1.0", "ms / s of audio": "1000.00", "MAC / s of audio": "500"},
        {"peak MiB": "0.0", "weights MiB": "1.0", "ms / s of audio": "1000.00", "MAC / s of audio": "–"},
    ]
    assert text.count("Every number") == 1


def test_a_score_of_no_clip_is_said_to_be_none(tmp_path):
    tables = tabulate(in_folds(3, "t")[:1], 0.01, resamples=10)
    tables.results.append(tables.results[0] | dict(subset="silent", score=float("nan"), low=float("nan")))
    found = [
        (shown["test clips of"], shown["score"], shown["95 % from"])
        for shown in read(page(tmp_path, tables), "results")
    ]
    assert found[1] == ("silent", NO_SCORE, "–")
    assert NO_SCORE not in found[0]


def test_what_is_no_number_is_no_value_to_sort_by():
    columns = {"name": ("name", "{}"), "score": ("score", "{:.1f}"), "macs": ("MAC", "{:d}"), "none": ("none", "{:d}")}
    values = ((0.25, 7), (float("nan"), None), (NO_SCORE, ""))
    rows = [dict(name=f"<{i}>", score=score, macs=macs, none=None) for i, (score, macs) in enumerate(values)]
    text = sortable("t", columns, rows)
    assert re.findall(r"<td.*?</td>", text) == [
        *('<td class=text data-value="&lt;0&gt;">&lt;0&gt;</td>', '<td data-value="0.25">0.2</td>'),
        '<td data-value="7">7</td>',
        *('<td class=text data-value="&lt;1&gt;">&lt;1&gt;</td>', "<td>–</td>", "<td>–</td>"),
        *('<td class=text data-value="&lt;2&gt;">&lt;2&gt;</td>', f"<td>{NO_SCORE}</td>", "<td></td>"),
    ]
    assert re.findall(r'<button type="button">(.*?)<', text) == ["name", "score", "MAC"]
