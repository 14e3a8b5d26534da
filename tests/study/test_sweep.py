"""A study end to end: its numbers, its choices, and going on after a stop."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import time
import weakref
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from ranks import on_ranks

from matpac_fast import load_encoder
from matpac_fast.audio_encoder import AudioEncoder
from matpac_fast.cli._study_words import choice_cells, cost_cells, sentences
from matpac_fast.errors import AudioError, ConfigError
from matpac_fast.study import cache as cache_module
from matpac_fast.study import sweep
from matpac_fast.study.cache import View
from matpac_fast.study.linear import ProbeConfig, Probed
from matpac_fast.study.results import Cell, Tables, tabulate, write_table
from matpac_fast.study.study_page import write_report
from matpac_fast.study.sweep import StudyConfig, run_study
from matpac_fast.tasks import DatasetError, load_task
from tests.study.conftest import made_cost, save_encoder

PROBE = ProbeConfig(learning_rates=(0.3,), decays=(1e-3, 1e-1), seeds=2, steps=60)


def config(encoder_file, clips, **changes) -> StudyConfig:
    base = StudyConfig((str(encoder_file),), (f"folder:{clips}",), (0.2, 0.5), probe=PROBE, cost=False, workers=1)
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def studied(encoder_file, clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    return out, run_study(config(encoder_file, clips), out)


def test_scores_are_those_of_the_test_clips(studied):
    _, cells = studied
    tables = tabulate(cells, 0.01, resamples=200)
    assert [(row["temporal_support"], row["subset"]) for row in tables.results] == [
        (ts, subset) for ts in (0.2, 0.5) for subset in ("", "even", "odd")
    ]
    task = cells[0].task
    for cell, row in zip(cells, tables.results[::3], strict=True):
        said = cell.probed.scores[0].argmax(2).numpy()  # (S, N)
        right = said == task.targets[task.folds[0].test]
        assert row["score"] == pytest.approx(right.mean())
        assert row["low"] <= row["score"] <= row["high"]
        assert row["score"] > 0.5  # chance is a third
        assert cell.full_windows == row["windows"]  # clips of 1 s: all are full
        assert (row["test_clips"], row["clips"], row["windows"]) == (12, 30, 5 if row["temporal_support"] == 0.2 else 2)
    even = tables.results[1]
    assert even["test_clips"] == 6


def test_weights_are_hashed_once(encoder_file, clips, tmp_path, monkeypatch):
    hashed, real = [], AudioEncoder.id.fget
    monkeypatch.setattr(AudioEncoder, "id", property(lambda self: hashed.append(1) or real(self)))
    load_encoder(encoder_file, "cpu")
    loading = len(hashed)
    tasks = (f"folder:{clips}", f"folder:{shutil.copytree(clips, tmp_path / 'again')}")
    cells = run_study(config(encoder_file, clips, tasks=tasks), tmp_path / "out")
    assert [(cell.task.name, cell.view.temporal_support) for cell in cells] == [
        (name, ts) for name in ("tones", "again") for ts in (0.2, 0.5)
    ]
    assert len(hashed) == loading + loading + 1


def test_one_encoder_is_in_memory_at_a_time(clips, tmp_path, monkeypatch):
    loaded: list[weakref.ref] = []

    def load(name, *args, **kwargs):
        gc.collect()
        assert not [ref for ref in loaded if ref() is not None]
        encoder = load_encoder("untrained-nano" if name == "b" else "logmel-stats", *args, **kwargs)
        loaded.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(sweep, "load_encoder", load)
    cells = run_study(config("a", clips, encoders=("a", "b", "c")), tmp_path / "out")
    assert [(cell.encoder, cell.embedding_dim) for cell in cells[::2]] == [("a", 160), ("b", 960), ("c", 160)]
    assert len(loaded) == 3
    gc.collect()
    assert loaded[-1]() is None


def test_an_encoder_that_is_trained_meanwhile_is_the_one_that_was_embedded(studied, encoder_file, clips, tmp_path):
    path = shutil.copy(encoder_file, tmp_path / "run.safetensors")

    def train(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("embedding", total):
            save_encoder(path, seed=1)

    cells = run_study(config(path, clips), tmp_path / "out", train)
    for one, two in zip(studied[1], cells, strict=True):
        assert two.encoder_id == one.encoder_id
        assert torch.allclose(one.probed.scores[0], two.probed.scores[0], atol=1e-3)


def test_a_stopped_study_goes_on_and_ends_the_same(studied, encoder_file, clips, tmp_path, monkeypatch):
    _, whole = studied
    monkeypatch.setattr(cache_module, "_CLIPS", 8)
    heard: list[tuple[str, int, int]] = []

    class Stopped(Exception):
        pass

    def stop(*told) -> None:
        heard.append(told)
        if sum(stage == "embedding" for stage, *_ in heard) == 4:
            raise Stopped

    with pytest.raises(Stopped):
        run_study(config(encoder_file, clips), tmp_path, stop)
    embedded = []
    real = cache_module.Cache.embed

    def counted(self, waves):
        embedded.append(len(waves))
        return real(self, waves)

    monkeypatch.setattr(cache_module.Cache, "embed", counted)
    again = run_study(config(encoder_file, clips), tmp_path, lambda *told: heard.append(told))
    assert 0 < sum(embedded) < 60
    assert heard[-1] == ("probing", 2, 2)
    assert {("hashing", 30, 30), ("embedding", 60, 60), ("probing", 0, 2)} <= set(heard)
    tabulate(again, 0.01, resamples=20, progress=lambda *told: heard.append(told))
    assert heard[-2:] == [("scoring", 1, 2), ("scoring", 2, 2)]
    for one, two in zip(whole, again, strict=True):
        assert torch.allclose(one.probed.scores[0], two.probed.scores[0], atol=1e-3)
    monkeypatch.setattr(sweep, "probe", lambda *_, **__: pytest.fail("probed again"))
    monkeypatch.setattr(cache_module.Cache, "embed", lambda *_: pytest.fail("embedded again"))
    torn = [tmp_path / "probes" / f".{name}.npz.0123abcd.tmp" for name in ("young", "old")]
    for path in torn:
        path.touch()
    os.utime(torn[1], (0, 0))
    third = run_study(config(encoder_file, clips), tmp_path)
    assert [path.exists() for path in torn] == [True, False], "another process may still be writing what is young"
    assert all(torch.equal(a.probed.scores[0], b.probed.scores[0]) for a, b in zip(again, third, strict=True))


@pytest.mark.parametrize("aggregate", ["score", "attend", "one"])
def test_other_ways_of_one_answer_for_a_clip(encoder_file, clips, tmp_path, monkeypatch, aggregate):
    probed, real = [], sweep.probe
    monkeypatch.setattr(sweep, "probe", lambda *given, **named: probed.append(given[5]) or real(*given, **named))
    (cell,) = run_study(config(encoder_file, clips, aggregate=aggregate, temporal_supports=(0.5,)), tmp_path)
    assert [each.attentive for each in probed] == [aggregate == "attend"]
    assert cell.probed.scores[0].shape == (2, 12, 3)
    assert torch.allclose(cell.probed.scores[0].sum(2), torch.ones(2, 12, dtype=torch.float64), atol=1e-5)
    assert cell.windows == (1 if aggregate == "one" else 2)


def made_cell(clips, ts: float, valid: float, right: int, peak: float) -> Cell:
    """A cell whose first `right` test clips are right."""
    task = load_task(f"folder:{clips}")
    said = torch.from_numpy(task.targets[task.folds[0].test].copy())
    said[right:] = (said[right:] + 1) % 3
    scores = torch.nn.functional.one_hot(said, 3).double()[None]
    probed = Probed([scores], torch.zeros(1, 1), torch.tensor([[valid]]), torch.zeros(1, 1, 2), torch.zeros(1, 1))
    return Cell(task, "e", "id", 8, View(ts), probed, 1.0, 0, [made_cost(ts, peak)])


def test_validation_clips_choose_and_test_clips_tell(clips):
    cells = [
        made_cell(clips, 0.25, 0.895, 6, 10.0),
        made_cell(clips, 0.5, 0.85, 12, 15.0),
        made_cell(clips, 1.0, 0.9, 9, 20.0),
    ]
    (choice,) = tabulate(cells, 0.01, resamples=300).choices
    assert (choice["best_temporal_support"], choice["cheapest_temporal_support"]) == (1.0, 0.25)
    assert (choice["best_score"], choice["cheapest_score"]) == (0.75, 0.5)
    assert choice["difference"] == pytest.approx(-0.25)
    assert choice["difference_low"] < -0.25 < choice["difference_high"] <= 0
    assert choice["memory_saved"] == 0.5
    (choice,) = tabulate(cells, 0.001, resamples=10).choices
    assert choice["cheapest_temporal_support"] == 1.0
    (choice,) = tabulate(cells, 0.1, "time", resamples=10).choices
    assert choice["cheapest_temporal_support"] == 0.25  # all take as long a second; then the smaller


def test_encoders_are_compared_on_the_same_clips(clips, tmp_path):
    """Each at its best temporal support: `b` is right where `a` is and on three more, so it is never behind."""
    cells = [made_cell(clips, 0.25, 0.8, 12, 10.0), made_cell(clips, 0.5, 0.9, 6, 10.0)]
    cells.append(dataclasses.replace(made_cell(clips, 0.25, 0.7, 9, 10.0), encoder="b"))
    tables = tabulate(cells, 0.01, resamples=300)
    there, back = tables.encoders
    assert (there["encoder"], there["temporal_support"], there["other"]) == ("e", 0.5, "b")
    assert (back["encoder"], back["other"], back["other_temporal_support"]) == ("b", "e", 0.5)
    assert there["difference"] == pytest.approx(-0.25)
    assert there["low"] < -0.25 < there["high"] <= 0
    assert (back["difference"], back["low"], back["high"]) == (-there["difference"], -there["high"], -there["low"])
    (said,) = (line for line in sentences(tables, 0.01) if "against" in line)
    assert said.startswith("tones: e is best on validation clips; against it, on test: b +0.250 (+")
    write_report(tmp_path / "report.html", tables, [], [], choice_cells(tables), [said], {})
    text = (tmp_path / "report.html").read_text()
    assert "One encoder against another" in text
    assert "Against the best temporal support" in text
    one_support = tabulate(cells[1:], 0.01, resamples=10)
    write_report(tmp_path / "report.html", one_support, [], [], choice_cells(one_support), [], {})
    assert "Against the best temporal support" not in (tmp_path / "report.html").read_text()
    alone = tabulate(cells[:2], 0.01, resamples=10)
    assert alone.encoders == []
    assert "against" not in " ".join(sentences(alone, 0.01))


def test_costs_are_those_of_the_largest_batch_and_the_latency_that_of_the_smallest(clips):
    cell = made_cell(clips, 0.5, 0.9, 9, 20.0)
    (large,) = cell.costs
    small = dataclasses.replace(large, batch=1, batch_ms=7.0, peak_mib=5.0)
    for costs in ([large, small], [small, large]):  # as they were asked for
        row = tabulate([dataclasses.replace(cell, windows=3.0, costs=costs)], 0.01, resamples=10).results[0]
        assert (row["batch"], row["latency_ms"], row["peak_mib"]) == (4, 7.0, 20.0)
    assert row["ms_per_clip"] == pytest.approx(3 * large.batch_ms / 4)
    assert row["ms_per_audio_second"] == pytest.approx(large.batch_ms / (4 * 0.5))


def test_a_fold_without_a_validation_score_leaves_the_choice_to_the_others(clips):
    cell = made_cell(clips, 0.5, 0.9, 9, 20.0)
    probed = dataclasses.replace(cell.probed, valid_score=torch.tensor([[0.75], [torch.nan]]))
    assert dataclasses.replace(cell, probed=probed).valid_score == 0.75


def test_rows_say_the_hop_that_was_asked_for_and_how_many_clips_they_are_of(clips):
    cell = made_cell(clips, 0.5, 0.9, 9, 20.0)
    for hop, told in ((None, 0.5), (0.25, 0.25)):
        rows = tabulate([dataclasses.replace(cell, view=View(0.5, hop))], 0.01, resamples=10).results
        assert [row["hop"] for row in rows] == 3 * [told]
        assert [row["test_clips"] for row in rows] == [12, 6, 6]  # all, and in either subset


def test_of_temporal_supports_that_see_all_the_shortest_is_chosen(clips):
    # Clips of 1 s: the same embeddings but for rounding, which must not choose; costs are those of whole windows.
    cells = [made_cell(clips, 0.5, 0.8, 6, 20.0), made_cell(clips, 1.0, 0.9, 9, 10.0), made_cell(clips, 5, 0.91, 9, 1)]
    (choice,) = tabulate(cells, 0.01, resamples=10).choices
    assert (choice["best_temporal_support"], choice["cheapest_temporal_support"]) == (1.0, 1.0)
    assert (choice["best_seconds_seen"], choice["cheapest_seconds_seen"]) == (1.0, 1.0)
    padded = [dataclasses.replace(cell, view=dataclasses.replace(cell.view, remainder="pad")) for cell in cells]
    (choice,) = tabulate(padded, 0.01, resamples=10).choices  # silence is something else to see
    assert (choice["best_temporal_support"], choice["best_seconds_seen"]) == (5.0, 1.0)
    one = [dataclasses.replace(c, view=dataclasses.replace(c.view, aggregate="one")) for c in padded]  # is not padded
    assert tabulate(one, 0.01, resamples=10).choices[0]["best_temporal_support"] == 1.0


def test_where_clips_are_shorter_what_an_embedding_sees_is_said(clips, tmp_path):
    tables = tabulate([made_cell(clips, 0.5, 0.8, 6, 1.0), made_cell(clips, 5.0, 0.9, 9, 2.0)], 0.01, resamples=10)
    assert "5 s (sees 1 s)" in choice_cells(tables)[1][0]
    best, beyond = sentences(tables, 0.01)
    assert "5 s (sees 1 s) is best on validation clips" in best
    assert "no clip is longer than 1 s; beyond that a longer temporal support changes nothing" in beyond
    assert "(here at 5 s)" in beyond
    write_report(tmp_path / "report.html", tables, [], [], choice_cells(tables), [beyond], {})
    text = (tmp_path / "report.html").read_text()
    assert '<button type="button">sees (s)</button>' in text
    assert 'data-value="1.0">1</td>' in text
    tables = tabulate([made_cell(clips, 0.5, 0.8, 6, 1.0), made_cell(clips, 1.0, 0.9, 9, 2.0)], 0.01, resamples=10)
    assert len(sentences(tables, 0.01)) == 1
    write_report(tmp_path / "report.html", tables, [], [], choice_cells(tables), [], {})
    assert "sees" not in "".join(choice_cells(tables)[1][0])
    assert "sees (s)" not in (tmp_path / "report.html").read_text()


def test_no_products_to_count_are_a_dash_and_no_zero(clips, tmp_path):
    some = made_cell(clips, 0.5, 0.9, 9, 1.0)
    none = made_cell(clips, 1.0, 0.9, 9, 1.0)
    none = dataclasses.replace(none, costs=[dataclasses.replace(none.costs[0], macs=0)])
    costs = [*some.costs, *none.costs]
    tables = tabulate([some, none], 0.01, resamples=10)
    for shown, name in ((tables, "results"), (Tables(), "costs")):
        write_report(tmp_path / "report.html", shown, costs, [], choice_cells(tables), [], {})
        table = (tmp_path / "report.html").read_text().split(f'id="{name}"')[1].split("</table>")[0]
        assert "<td>–</td>" in table
        assert ">0</td>" not in table
    assert [row[-1] == "–" for row in cost_cells(costs)[1]] == [False, True]


def test_paired_differences_are_narrower_than_scores(clips):
    cells = [made_cell(clips, 0.5, 0.8, 8, 1.0), made_cell(clips, 1.0, 0.9, 8, 1.0)]
    tables = tabulate(cells, 0.01, resamples=300)
    assert [row["difference"] for row in tables.comparisons] == [0.0, 0.0]
    assert [row["low"] for row in tables.comparisons] == [0.0, 0.0]
    assert tables.results[0]["low"] < tables.results[0]["score"]


def test_tables_are_parquet(studied, tmp_path):
    tables = tabulate(studied[1], 0.01, resamples=20)
    write_table(tmp_path / "results.parquet", tables.results)
    read = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert [row["score"] for row in read] == [row["score"] for row in tables.results]
    assert read[0]["low_folds"] is None  # one fold: nothing to resample
    assert read[0]["peak_mib"] is None


@pytest.fixture
def damaged(clips, tmp_path):
    """The clips, of which two cannot be decoded although their headers are fine: a test clip, and one to learn from."""
    folder = tmp_path / "damaged" / "tones"
    shutil.copytree(clips, folder)
    for name in ("0-0.wav", "1-9.wav"):
        soundfile.write(folder / name, np.full(16_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    return folder


def test_a_partial_study_leaves_out_what_cannot_be_decoded(encoder_file, damaged, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_CLIPS", 8)
    told: list[tuple[str, int, int]] = []
    study = config(encoder_file, damaged, partial=True)
    cells = run_study(study, tmp_path / "out", lambda *told_now: told.append(told_now))
    assert ("embedding", 60, 60) in told
    task = cells[0].task
    assert [(Path(name).name, reason) for name, reason in task.left_out] == [  # copies, each with a name of its own
        ("0-0.wav", "not finite: NaN or infinite samples"),
        ("1-9.wav", "not finite: NaN or infinite samples"),
    ]
    assert cells[0].probed.scores[0].shape == (2, 11, 3)
    assert {path.name for path in task.paths} == {p.name for p in damaged.glob("*.wav")} - {"0-0.wav", "1-9.wav"}
    for i in task.folds[0].test.tolist():  # the split is still that of clips.csv
        assert task.paths[i].name[2] in "0123"
        assert task.targets[i] == int(task.paths[i].name[0])
    rows = tabulate(cells, 0.01, resamples=20).results
    assert [(row["test_clips"], row["clips"], row["left_out"]) for row in rows[:3]] == [
        (11, 28, 2),
        (5, 28, 2),
        (6, 28, 2),
    ]
    again = run_study(study, tmp_path / "out")
    assert again[0].task.left_out == task.left_out
    assert torch.equal(again[0].probed.scores[0], cells[0].probed.scores[0])


def test_the_first_of_several_processes_learns_what_the_others_could_not_decode(
    encoder_file, damaged, tmp_path, monkeypatch
):
    monkeypatch.setattr(cache_module, "_CLIPS", 8)
    monkeypatch.setattr(sweep, "_wait_for_all", lambda *_: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        found.append(run_study(config(encoder_file, damaged, partial=True), tmp_path / "out"))
    assert found[0] == []
    assert [Path(name).name for name, _ in found[1][0].task.left_out] == ["0-0.wav", "1-9.wav"]


def test_the_first_process_does_the_rest_once_the_others_are_through(
    studied, encoder_file, clips, tmp_path, monkeypatch
):
    done = []
    monkeypatch.setattr(sweep, "_wait_for_all", lambda *_: done.append("waited"))
    monkeypatch.setattr(sweep, "cost_sweep", lambda *_: done.append("costs") or {})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    cells = run_study(config(encoder_file, clips, cost=True), tmp_path)  # what the other embeds is on its own disk
    assert done == ["waited", "costs"]
    for one, two in zip(studied[1], cells, strict=True):
        assert torch.allclose(one.probed.scores[0], two.probed.scores[0], atol=1e-3)


def wait_longer_than_torch_would(rank):
    torch.distributed.distributed_c10d.default_pg_timeout = timedelta(seconds=0.5)
    if rank == 0:
        time.sleep(1.5)
    sweep._wait_for_all(rank, 2)
    return "went on"


def test_the_first_to_be_through_waits_for_the_others():
    assert on_ranks(2, wait_longer_than_torch_would) == {0: "went on", 1: "went on"}


def test_without_partial_a_damaged_file_ends_it_and_says_what_helps(encoder_file, damaged, tmp_path):
    with pytest.raises(AudioError, match=r"0-0\.wav: .*--partial"):
        run_study(config(encoder_file, damaged), tmp_path / "out")


def test_a_partial_study_without_test_clips_says_so(encoder_file, damaged, tmp_path):
    for path in damaged.glob("*-[0-3].wav"):
        shutil.copy(damaged / "0-0.wav", path) if path.name != "0-0.wav" else None
    with pytest.raises(DatasetError, match="fold 0 has no test clips without the 13 files"):
        run_study(config(encoder_file, damaged, partial=True), tmp_path / "out")


def test_without_costs_nothing_is_said_of_the_cheapest(clips, tmp_path):
    cells = [
        dataclasses.replace(made_cell(clips, ts, valid, 9, 1.0), costs=[]) for ts, valid in ((0.5, 0.9), (1.0, 0.9))
    ]
    tables = tabulate(cells, 0.5, resamples=10)
    (choice,) = tables.choices
    assert choice["best_temporal_support"] == 0.5
    assert {choice[name] for name in choice if "cheapest" in name or "saved" in name} == {None}
    write_table(tmp_path / "choices.parquet", tables.choices)
    assert pq.read_table(tmp_path / "choices.parquet").column_names == list(choice)
    costed = tabulate([made_cell(clips, 0.5, 0.9, 9, 1.0)], 0.5, resamples=10).results
    for name, rows in (("with", costed), ("without", tables.results)):
        write_table(tmp_path / f"{name}.parquet", rows)
    types = [pq.read_schema(tmp_path / f"{name}.parquet").types for name in ("with", "without")]
    assert types[0] == types[1]


def test_what_came_is_said_of_numbers_below_one():
    with pytest.raises(ConfigError, match=r"batch sizes \(1, 0\), workers 2; expected 1 or more"):
        StudyConfig(("a",), batch_sizes=(1, 0))
    with pytest.raises(ConfigError, match=r"batch sizes \(1, 16\), batch size 0, workers 2; expected 1 or more"):
        StudyConfig(("a",), batch_size=0)
    with pytest.raises(ConfigError, match=r"batch sizes \(\), workers 2; expected 1 or more"):
        StudyConfig(("a",), batch_sizes=())


@pytest.mark.parametrize(
    "change",
    [dict(encoders=()), dict(temporal_supports=(1.0, 1.0)), dict(temporal_supports=(0.0,)), dict(tasks=(), cost=False)],
)
def test_studies_that_cannot_be(change):
    with pytest.raises(ConfigError):
        dataclasses.replace(StudyConfig(("a",), ("folder:x",)), **change)


def test_two_tasks_of_one_name_are_refused(encoder_file, clips, tmp_path):
    with pytest.raises(ConfigError, match="two tasks"):
        run_study(config(encoder_file, clips, tasks=(f"folder:{clips}", f"folder:{clips}/")), tmp_path)
    assert not np.any([path.is_file() for path in tmp_path.rglob("*")])
