"""A choice of temporal support looks at no clip that its score is told of: where folds rotate, each has its own."""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path

import numpy as np
import pytest
import torch

from matpac_fast.cli._study_words import choice_cells, sentences
from matpac_fast.study.cache import View
from matpac_fast.study.cell import Cell
from matpac_fast.study.choose import Choice, best_encoder, choose
from matpac_fast.study.linear import Probed
from matpac_fast.study.metrics import Draws, interval
from matpac_fast.study.results import tabulate
from matpac_fast.study.study_page import write_report
from matpac_fast.tasks.task import Task, rotate_folds
from tests.study.conftest import made_cost

SUPPORTS = (1.0, 2.0, 3.0)


def rotating(n_folds: int, clips: int) -> Task:
    """`clips` of two classes in each of `n_folds` folds, the next one of which validates."""
    n = n_folds * clips
    names = np.array([f"clip {i:03d}" for i in range(n)])
    folds = rotate_folds(np.repeat(np.arange(n_folds), clips))
    paths = [Path(f"/x/{name}.wav") for name in names]
    return Task("t", "single", ("a", "b"), paths, np.arange(n) % 2, names, folds, np.full(n, 20.0))


def cell(task: Task, ts: float, right: np.ndarray, valid: list[float] | None = None, encoder: str = "e") -> Cell:
    """Whose probes are right of the clips `right` (N,) bool; validation scores are those of these clips, or `valid`."""
    said = torch.from_numpy(np.where(right, task.targets, 1 - task.targets))
    scores = [torch.nn.functional.one_hot(said[fold.test], 2).double()[None] for fold in task.folds]
    found = [[right[fold.valid].mean()] for fold in task.folds] if valid is None else [[v] for v in valid]
    n = len(task.folds)
    probed = Probed(scores, torch.zeros(n, 1), torch.tensor(found), torch.zeros(n, 1, 2), torch.zeros(n, 1))
    return Cell(task, encoder, "id", 8, View(ts), probed, 1.0, 0, [made_cost(ts, ts)])


def made(task: Task, right: list[list[float]], **options) -> list[Cell]:
    """A cell for each temporal support, of which the first clips of each fold are right, `right[ts][fold]` of them."""
    size = len(task.folds[0].test)
    masks = [np.concatenate([np.arange(size) < round(share * size) for share in shares]) for shares in right]
    return [cell(task, ts, mask, **options) for ts, mask in zip(SUPPORTS, masks, strict=False)]


def test_each_fold_is_scored_at_the_choice_of_its_own_validation_clips():
    # Fold f validates on fold f + 1: 0 and 2 choose 1 s, 1 chooses 2 s; all together 2 s, which tests best.
    task = rotating(3, 10)
    tables = tabulate(made(task, [[0.5, 0.9, 0.4], [0.4, 0.8, 1.0]]), 0.01, resamples=200)
    (choice,) = tables.choices
    assert [row["score"] for row in tables.results] == pytest.approx([0.6, 2.2 / 3])
    assert (choice["best_temporal_support"], choice["best_by_fold"]) == (2.0, [1.0, 2.0, 1.0])
    assert choice["best_score"] == pytest.approx((0.5 + 0.8 + 0.4) / 3)
    assert choice["best_low"] < choice["best_score"] < choice["best_high"]
    assert [row["difference"] for row in tables.comparisons] == pytest.approx([0.6 - 1.7 / 3, 2.2 / 3 - 1.7 / 3])
    assert {row["best_temporal_support"] for row in tables.comparisons} == {2.0}


def test_with_one_fold_the_choice_is_a_cell_and_its_numbers_are_the_cells():
    task = dataclasses.replace(rotating(3, 10), folds=rotating(3, 10).folds[:1])
    cells = made(task, [[0.5, 0.9, 0.4], [0.9, 0.8, 1.0]])
    tables = tabulate(cells, 0.01, resamples=200)
    (choice,) = tables.choices
    row = tables.results[0]
    assert (choice["best_temporal_support"], choice["best_by_fold"]) == (1.0, [1.0])
    assert [choice[f"best_{name}"] for name in ("score", "low", "high")] == [row["score"], row["low"], row["high"]]
    assert [row["difference"] for row in tables.comparisons] == [0.0, pytest.approx(0.4)]
    draws = Draws.of([task.groups[task.folds[0].test]], 1, 200)
    targets = [torch.from_numpy(task.targets[task.folds[0].test])]
    scored = [draws.score("accuracy", each.probed.scores, targets)[0] for each in cells]
    assert (tables.comparisons[1]["low"], tables.comparisons[1]["high"]) == interval(scored[1] - scored[0])


def test_the_cheapest_too_is_chosen_and_compared_fold_by_fold():
    task = rotating(3, 10)
    cells = made(task, [[0.5, 0.9, 0.4], [0.4, 0.8, 1.0]])
    (choice,) = tabulate(cells, 0.15, resamples=50).choices  # within it fold 1 alone has nothing cheaper
    assert (choice["cheapest_temporal_support"], choice["cheapest_by_fold"]) == (1.0, [1.0, 2.0, 1.0])
    assert choice["difference"] == 0.0
    (choice,) = tabulate(cells, 0.6, resamples=50).choices
    assert (choice["cheapest_temporal_support"], choice["cheapest_by_fold"]) == (1.0, [1.0, 1.0, 1.0])
    assert choice["cheapest_score"] == pytest.approx(0.6)
    assert choice["difference"] == pytest.approx((0.9 - 0.8) / 3)
    assert choice["memory_saved"] == 0.5  # of the two that are recommended


def test_the_cheapest_is_of_least_cost_not_of_least_temporal_support():
    """As where short windows overlap: the cost need not rise with the temporal support."""
    cells = made(rotating(3, 10), [[0.5, 0.5, 0.5]] * 3)
    best, cheapest = choose(cells, [3.0, 1.0, 2.0], 0.01)
    assert (best.taken, best.by_fold) == (0, [0, 0, 0])
    assert cheapest is not None
    assert (cheapest.taken, cheapest.by_fold) == (1, [1, 1, 1])


def test_there_is_no_cheapest_where_a_cost_that_matters_is_not_known():
    cells = made(rotating(3, 10), [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.1, 0.1, 0.1]])
    best, cheapest = choose(cells, [None, 1.0, 2.0], 0.01)
    assert best.taken == 0
    assert cheapest is None
    _, cheapest = choose(cells, [3.0, 1.0, None], 0.01)  # the third is too bad to be it
    assert cheapest is not None
    assert cheapest.taken == 1
    best, cheapest = choose(made(rotating(3, 10), [[0.5, 0.9, 0.4], [0.4, 0.8, 1.0]]), [None, None], 0.01)
    assert best == Choice(1, [0, 1, 0])
    assert cheapest is None


def test_of_temporal_supports_that_see_every_clip_whole_the_first_is_chosen():
    """Their embeddings are the same: what one scores or costs more than the other is chance."""
    task = dataclasses.replace(rotating(3, 10), seconds=np.linspace(8.0, 20.0, 30))
    right = [np.arange(30) % 10 < n for n in (1, 2, 5, 6, 7)]
    cells = [cell(task, ts, mask) for ts, mask in zip((5.0, 10.0, 20.0, 25.0, 30.0), right, strict=True)]
    assert [each.sees_all for each in cells] == [False, False, True, True, True]
    best, cheapest = choose(cells, [0.5, 0.6, 4.0, 3.0, 2.0], 0.2)
    assert cheapest is not None
    for choice in (best, cheapest):
        assert (choice.taken, choice.by_fold) == (2, [2, 2, 2])


def test_encoders_are_compared_at_their_choices_fold_by_fold(tmp_path):
    task = rotating(3, 10)
    cells = made(task, [[0.5, 0.9, 0.4], [0.4, 0.8, 1.0]])
    cells += made(task, [[0.7, 0.7, 0.7]], encoder="other")
    tables = tabulate(cells, 0.01, resamples=200)
    there, back = tables.encoders
    assert (there["temporal_support"], there["other_temporal_support"]) == (2.0, 1.0)
    assert there["difference"] == pytest.approx(1.7 / 3 - 0.7) == -back["difference"]
    one, other = tables.choices  # of all, each fold: 0 and 1 choose `e`, 2 chooses `other`
    assert one["best_encoder"] == other["best_encoder"] == "e"
    assert one["against_best"] == pytest.approx(1.7 / 3 - 2.0 / 3)
    assert other["against_best"] == pytest.approx(0.7 - 2.0 / 3)
    said = sentences(tables, 0.01)
    assert said[0].startswith(
        "t, e: 2 s is best on the validation clips of all 3 folds; each fold's own choice (1 s in folds 0, 2; 2 s in "
        "fold 1) scores 0.567 ("
    )
    assert said[0].endswith("; nothing cheaper is within 0.01 of 2 s.")
    assert said[1].startswith("t, other: 1 s is best on the validation clips of all 3 folds, and of each; 0.700 (")
    assert "t: e is best on validation clips; against each fold's own best, on test: other +0.033 (" in said[2]
    write_report(tmp_path / "report.html", tables, [], [], choice_cells(tables), said, {})
    assert "each fold's own validation clips choose" in html.unescape((tmp_path / "report.html").read_text())


def test_what_every_fold_chooses_differs_from_itself_in_no_resample():
    """Differences are of the same clips and the same folds: else chance alone would lie between them."""
    task = rotating(3, 10)
    cells = made(task, [[0.5, 0.9, 0.4], [0.4, 0.8, 0.3]]) + made(task, [[0.3, 0.3, 0.3]], encoder="other")
    tables = tabulate(cells, 0.01, resamples=50)
    assert [tables.comparisons[0][name] for name in ("difference", "low", "high")] == [0.0] * 3
    assert [tables.choices[0][f"against_best{end}"] for end in ("", "_low", "_high")] == [0.0] * 3


def test_the_best_encoder_is_that_of_all_folds_whatever_one_fold_prefers():
    task = rotating(3, 10)
    encoders = [made(task, [shares]) for shares in ([0.5, 0.9, 0.6], [0.9, 0.4, 0.9])]  # fold f validates on f + 1
    found = best_encoder([(cells, Choice(0, [0, 0, 0])) for cells in encoders])
    assert found == Choice(1, [0, 1, 1])


def test_a_fold_without_a_validation_score_prefers_none():
    task = rotating(3, 10)
    valid = ([0.5, float("nan"), 0.5], [0.9, float("nan"), 0.9])
    cells = [cell(task, ts, np.ones(30, bool), v) for ts, v in zip(SUPPORTS, valid, strict=False)]
    (choice,) = tabulate(cells, 0.01, resamples=10).choices
    assert (choice["best_temporal_support"], choice["best_by_fold"]) == (2.0, [2.0, 1.0, 2.0])


def test_where_no_temporal_support_is_better_the_choice_scores_what_they_all_do():
    """Chance alone makes their scores, so a choice that sees test clips comes out above the mean of all."""
    random, by_fold, pooled = np.random.default_rng(0), [], []
    task = rotating(5, 20)
    for _ in range(150):
        masks = random.random((6, 100)) < 0.7
        cells = [cell(task, float(ts + 1), mask) for ts, mask in enumerate(masks)]
        tables = tabulate(cells, 0.01, resamples=1)
        (choice,) = tables.choices
        scores = [row["score"] for row in tables.results]
        pooled.append(scores[int(choice["best_temporal_support"]) - 1] - 0.7)
        by_fold.append(choice["best_score"] - 0.7)
    error = np.std(by_fold) / 150**0.5
    assert np.mean(pooled) > 0.03
    assert abs(np.mean(by_fold)) < 3 * error < 0.015
