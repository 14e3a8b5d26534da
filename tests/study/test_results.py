"""What the rows of a study's tables hold: costs of the audio that is embedded, and bounds of scores."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from matpac_fast import __version__
from matpac_fast.cli._study_words import choice_cells, cost_cells, sentences
from matpac_fast.study import plots, sweep
from matpac_fast.study.cache import View
from matpac_fast.study.results import Tables, tabulate, write_table
from matpac_fast.study.study_page import write_report
from tests.study.conftest import made_cost
from tests.study.test_choose import cell, rotating


def one_cell(view: View, **changes):
    return dataclasses.replace(
        cell(rotating(3, 10), view.temporal_support, np.arange(30) % 3 > 0), view=view, **changes
    )


@pytest.mark.parametrize(
    ("hop", "aggregate", "step"), [(None, "mean", 2.0), (0.5, "mean", 0.5), (4.0, "score", 4.0), (0.5, "one", 2.0)]
)
def test_a_second_of_audio_costs_a_window_each_hop(hop, aggregate, step):
    (row,) = tabulate([one_cell(View(2.0, hop, aggregate=aggregate))], 0.01, resamples=10).results
    cost = made_cost(2.0)
    assert row["ms_per_audio_second"] == pytest.approx(cost.batch_ms / cost.batch / step)
    assert row["macs_per_audio_second"] == pytest.approx(cost.macs / step)


def test_a_row_says_of_its_cell_what_the_documentation_says():
    task = rotating(3, 30)  # three clips a group, and of the first fold's every other one in the subset
    task = dataclasses.replace(
        task,
        groups=np.array([f"group {i // 3:02d}" for i in range(90)]),
        seconds=np.linspace(1.0, 9.9, 90),
        subsets={"outdoors": np.arange(90) % 2 + np.arange(90) // 30 == 0, "absent": np.zeros(90, bool)},
        left_out=[("x.wav", "missing")],
    )
    right = np.arange(90) % 30 < np.repeat([20, 10, 15], 30)
    plain = cell(task, 2.0, right, valid=[0.5, 0.8, 0.5])
    chosen = torch.tensor([[[0.1, 1e-3]], [[1.0, 1e-2]], [[1.0, 1e-3]]], dtype=torch.float64)
    probed = dataclasses.replace(plain.probed, chosen=chosen, untrained=torch.tensor([[False], [True], [False]]))
    view = View(2.0, 0.5, remainder="merge", aggregate="score")
    costs = [dataclasses.replace(made_cost(2.0), batch=batch, batch_ms=3.0 * batch) for batch in (4, 1, 16)]
    made = dataclasses.replace(plain, view=view, probed=probed, windows=7.5, shared_audio=3, costs=costs)
    rows = tabulate([made], 0.01, resamples=400).results
    want = dict(task="t", encoder="e", encoder_id="id", embedding_dim=8, metric="accuracy", subset="")
    want |= dict(temporal_support=2.0, hop=0.5, remainder="merge", aggregate="score", windows=7.5)
    want |= dict(clips=90, test_clips=90, test_groups=30, left_out=1, shared_audio=3, classes=2, folds=3, seeds=1)
    want |= dict(clip_seconds=pytest.approx(5.45), longest_seconds=9.9, seconds_seen=pytest.approx(174.5 / 90))
    want |= dict(score=0.5, valid_score=pytest.approx(0.6), untrained=1, probe_version=__version__)
    want |= dict(learning_rates=[0.1, 1.0, 1.0], decays=[1e-3, 1e-2, 1e-3])
    want |= dict(batch=16, latency_ms=3.0, ms_per_clip=22.5, device="cpu", dtype="float32", threads=1)
    assert {name: rows[0][name] for name in want} == want
    assert rows[0]["low_folds"] < rows[0]["low"] < 0.5 < rows[0]["high"] < rows[0]["high_folds"]
    assert [(row["subset"], row["test_clips"], row["test_groups"]) for row in rows[1:]] == [("outdoors", 15, 10)]
    assert rows[1]["score"] == pytest.approx(10 / 15)  # of the fold that has some


def test_tables_have_the_same_types_with_costs_and_several_folds_or_without(tmp_path):
    """So that those of several studies can be read together; what there is not is null."""
    task = rotating(3, 10)
    one = cell(dataclasses.replace(task, folds=task.folds[:1]), 2.0, np.arange(30) % 3 > 0)
    schemas = []
    for found in (one_cell(View(2.0)), dataclasses.replace(one, costs=[])):
        tables = tabulate([found], 0.01, resamples=10)
        write_table(tmp_path / "results.parquet", tables.results)
        write_table(tmp_path / "choices.parquet", tables.choices)
        schemas.append([pq.read_schema(tmp_path / f"{name}.parquet") for name in ("results", "choices")])
    assert schemas[0] == schemas[1]
    (row,) = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert (row["test_clips"], row["hop"], row["low_folds"], row["high_folds"]) == (10, 2.0, None, None)
    costs = ("batch", "latency_ms", "ms_per_clip", "peak_mib", "macs_per_clip", "parameters", "device")
    assert {row[name] for name in costs} == {None}
    (choice,) = pq.read_table(tmp_path / "choices.parquet").to_pylist()
    assert {value for name, value in choice.items() if name.startswith("cheapest") or "saved" in name} == {None}


def test_the_cheapest_of_a_second_of_audio_is_so_at_the_hop():
    # A window of 4 s takes half as long as four of 1 s; with one of either a second it takes twice as long.
    cells = [
        one_cell(View(ts), costs=[dataclasses.replace(made_cost(ts), batch_ms=ms)])
        for ts, ms in ((1.0, 4.0), (4.0, 8.0))
    ]
    (choice,) = tabulate(cells, 1.0, "time", resamples=10).choices
    assert choice["cheapest_temporal_support"] == 4.0
    cells = [dataclasses.replace(each, view=dataclasses.replace(each.view, hop=1.0)) for each in cells]
    (choice,) = tabulate(cells, 1.0, "time", resamples=10).choices
    assert choice["cheapest_temporal_support"] == 1.0


def test_costs_alone_are_of_a_second_of_audio_at_the_hop_too(tmp_path, monkeypatch):
    cost = dataclasses.replace(made_cost(2.0), macs=4 * 10**9, batch_ms=8.0)  # 1 s a second for a batch of 4: 2 ms each
    for hop, real_time, macs in ((None, "1000", "2.000"), (0.5, "250", "8.000")):
        assert cost_cells([cost], hop)[1][0][-2:] == [real_time, macs]
        write_report(tmp_path / "report.html", Tables(), [cost], [], ([], []), [], {}, hop)
        assert f'data-value="{4e9 / (hop or 2)}"' in (tmp_path / "report.html").read_text()
    pytest.importorskip("matplotlib")
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append((path.name, figure)))
    plots.write_plots(tmp_path, [], [cost], 0.5)
    drawn = {axis.get_ylabel(): axis.lines[0].get_ydata()[0] for axis in dict(saved)["cost.png"].axes}
    assert drawn["milliseconds per second of audio"] == 4.0
    assert drawn["GMAC per second of audio"] == 8.0


@pytest.mark.parametrize(
    ("view", "windows", "full"),
    [  # of clips of 1 s and 5.5 s
        (View(2.0), 2.0, (0.5 + 2.75) / 2),
        (View(2.0, remainder="pad"), 2.0, 2.0),
        (View(2.0, remainder="merge"), 1.5, (0.5 + 2.75) / 2),
        (View(2.0, remainder="drop"), 1.5, (0.5 + 2.0) / 2),
        (View(2.0, hop=1.0), 3.0, (0.5 + 4.75) / 2),
        (View(2.0, hop=1.0, aggregate="one"), 1.0, (0.5 + 1.0) / 2),
        (View(10.0), 1.0, (0.1 + 0.55) / 2),
    ],
)
def test_windows_of_a_clip_are_charged_by_their_length(view, windows, full):
    task = rotating(3, 10)
    task = dataclasses.replace(task, seconds=np.where(np.arange(30) < 15, 1.0, 5.5))
    assert sweep._windows(task, view, 8_000) == (windows, pytest.approx(full))
    found = one_cell(view, task=task, windows=windows, full_windows=full)
    (row,) = tabulate([found], 0.01, resamples=10).results
    cost = made_cost(view.temporal_support)
    assert row["windows"] == windows
    assert row["ms_per_clip"] == pytest.approx(full * cost.batch_ms / cost.batch)
    assert row["macs_per_clip"] == pytest.approx(full * cost.macs)


def test_of_no_wrong_clip_and_of_no_difference_tables_and_report_say_what_is_known(tmp_path):
    task = dataclasses.replace(rotating(3, 10), folds=rotating(3, 10).folds[:1])
    cells = [cell(task, ts, np.ones(30, bool)) for ts in (1.0, 2.0)]
    cells += [cell(task, 1.0, np.ones(30, bool), encoder="other")]
    tables = tabulate(cells, 0.01, resamples=20)
    (one, _) = tables.choices
    exact = pytest.approx((0.025 ** (1 / 10), 1.0))
    assert (tables.results[0]["low"], tables.results[0]["high"]) == (one["best_low"], one["best_high"]) == exact
    assert tables.results[0]["test_groups"] == 10
    assert sentences(tables, 0.01)[-1].endswith("on test: other +0.000 (no clip differs).")
    write_report(tmp_path / "report.html", tables, [], [], choice_cells(tables), [], {})
    text = (tmp_path / "report.html").read_text()
    for name in ("comparisons", "encoders"):
        assert "<td>no clip differs</td>" in text.split(f'id="{name}"')[1].split("</table>")[0]


def test_each_task_has_a_best_encoder_of_its_own():
    right = {("a", "one"): 1.0, ("a", "two"): 0.5, ("b", "one"): 0.4, ("b", "two"): 0.8}
    tasks = {name: dataclasses.replace(rotating(3, 10), name=name) for name in ("a", "b")}
    masks = {key: np.tile(np.arange(10) < round(10 * share), 3) for key, share in right.items()}
    cells = [cell(tasks[task], 1.0, masks[task, encoder], encoder=encoder) for task, encoder in right]
    choices = tabulate(cells, 0.01, resamples=10).choices
    told = {(row["task"], row["encoder"]): (row["best_encoder"], row["against_best"]) for row in choices}
    assert {key: best for key, (best, _) in told.items()} == {key: {"a": "one", "b": "two"}[key[0]] for key in right}
    assert [against for _, against in told.values()] == pytest.approx([0.0, -0.5, -0.4, 0.0])


def test_a_subset_without_a_clip_of_any_class_has_no_score(tmp_path):
    targets = np.tile(np.eye(2, dtype=np.float32), (15, 1))
    targets[1::2] = 0
    plain = rotating(3, 10)
    found = cell(plain, 1.0, np.ones(30, bool))
    task = dataclasses.replace(plain, kind="multi", targets=targets, subsets={"silent": np.arange(30) % 2 == 1})
    tables = tabulate([dataclasses.replace(found, task=task)], 0.01, resamples=20)
    assert [np.isnan(row["score"]) for row in tables.results] == [False, True]
    write_report(tmp_path / "report.html", tables, [], [], choice_cells(tables), [], {})
    table = (tmp_path / "report.html").read_text().split('id="results"')[1].split("</table>")[0]
    assert table.count("<td>no score: no clip of any class</td>") == 1
