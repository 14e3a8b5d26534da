"""Metrics are scikit-learn's, weights are resamples, and intervals cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score

from matpac_fast.errors import ConfigError
from matpac_fast.study.metrics import (
    Draws,
    accuracy,
    interval,
    mean_average_precision,
    no_clip_differs,
    score_interval,
)


def problem(seed: int, n: int = 60, k: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores with ties, targets with unknown ones, and whole-number weights, among them 0."""
    random = np.random.default_rng(seed)
    targets = (random.random((n, k)) < 0.4).astype(np.float32)
    scores = np.round(random.normal(size=(n, k)) + targets, 1)
    targets[random.random((n, k)) < 0.3] = np.nan
    return tuple(map(torch.from_numpy, (scores, targets, random.integers(0, 4, (5, n)).astype(np.float64))))


@pytest.mark.parametrize("seed", range(3))
def test_mean_average_precision_is_scikit_learns(seed):
    scores, targets, weights = problem(seed)
    found = mean_average_precision(scores, targets, weights)
    for value, w in zip(found, weights, strict=True):
        each = []
        for k in range(scores.shape[1]):
            known = ~targets[:, k].isnan()
            each.append(average_precision_score(targets[known, k], scores[known, k], sample_weight=w[known]))
        assert value.item() == pytest.approx(np.mean(each), abs=1e-12)


def test_a_weight_is_a_number_of_copies():
    scores, targets, weights = problem(7)
    copies = torch.repeat_interleave(torch.arange(len(scores)), weights[0].long())
    once = torch.ones(1, len(copies), dtype=torch.float64)
    expected = mean_average_precision(scores[copies], targets[copies], once)
    assert mean_average_precision(scores, targets, weights)[0].item() == pytest.approx(expected.item(), abs=1e-12)


def test_classes_that_nobody_has_do_not_count():
    scores, targets, weights = problem(1)
    targets[:, 2] = torch.where(targets[:, 2].isnan(), torch.nan, 0.0)
    kept = [0, 1, 3]
    assert torch.equal(
        mean_average_precision(scores, targets, weights),
        mean_average_precision(scores[:, kept], targets[:, kept], weights),
    )
    assert mean_average_precision(scores, torch.zeros_like(scores), weights).isnan().all()


def test_classes_whose_positive_clips_were_not_drawn_do_not_count():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.7], [0.3, 0.2]])
    targets = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    weights = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    found = mean_average_precision(scores, targets, weights)
    assert found[:2].tolist() == pytest.approx([(1 / 2 + 1) / 2, 1.0])  # of the second the second class alone
    assert found[2].isnan()


def test_accuracy_is_scikit_learns():
    random = np.random.default_rng(0)
    scores, targets = torch.from_numpy(random.normal(size=(50, 3))), torch.from_numpy(random.integers(0, 3, 50))
    weights = torch.from_numpy(random.random((4, 50)))
    found = accuracy(scores, targets, weights)
    for value, w in zip(found, weights, strict=True):
        want = accuracy_score(targets.numpy(), scores.argmax(1).numpy(), sample_weight=w.numpy())
        assert value.item() == pytest.approx(want, abs=1e-12)


def test_intervals_cover_the_truth_as_often_as_they_say():
    random, truth, covered = np.random.default_rng(0), 0.7, 0
    for trial in range(200):
        right = torch.from_numpy(random.random(120) < truth)
        scores = torch.nn.functional.one_hot((~right).long(), 2).double()[None]
        draws = Draws.of([np.arange(120)], 1, resamples=300, seed=trial)
        low, high = interval(draws.score("accuracy", [scores], [torch.zeros(120, dtype=torch.int64)])[0])
        covered += low <= truth <= high
    assert 180 <= covered <= 199  # 95 % of 200, give or take three standard deviations


def test_an_interval_is_of_the_resamples_that_are_numbers():
    assert interval(torch.tensor([9.0, 1.0, torch.nan, 1.0, 1.0])) == (1.0, 1.0)
    values = torch.arange(-1.0, 1001.0)
    with torch.device("meta"):  # as torch.set_default_device("cuda")
        assert interval(values) == (25.0, 975.0)  # of 0 to 1000, the middle 95 %


def test_of_many_rare_classes_the_score_lies_in_its_interval():
    random, found = np.random.default_rng(0), []
    for trial in range(40):
        targets = torch.from_numpy((random.random((2, 200, 20)) < 0.05).astype(np.float64))  # of two folds
        scores = torch.from_numpy(random.normal(size=(2, 200, 20))) + 0.7 * targets
        draws = Draws.of([np.arange(200), np.arange(200)], 1, resamples=100, seed=trial)
        for values in draws.score("mAP", [*scores[:, None]], [*targets]):
            found.append((values[0].item(), *interval(values)))
    score, low, high = np.array(found).T
    assert ((low < score) & (score < high)).all()
    covered = (low <= score.mean()) & (score.mean() <= high)  # what such a sample scores on average
    assert covered[::2].mean() > 0.85


def test_clips_of_a_group_are_drawn_together():
    groups = np.repeat(np.arange(10), 6)
    draws = Draws.of([groups], 1, resamples=50)
    by_group = draws.clips[0].reshape(51, 10, 6)
    assert (by_group == by_group[:, :, :1]).all()
    assert (draws.clips[0].sum(1) == 60).all()
    right = torch.from_numpy(groups < 6)
    scores = torch.nn.functional.one_hot((~right).long(), 2).double()[None]
    target = torch.zeros(60, dtype=torch.int64)
    wide = interval(draws.score("accuracy", [scores], [target])[0])
    narrow = interval(Draws.of([np.arange(60)], 1, resamples=50).score("accuracy", [scores], [target])[0])
    assert wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])


def test_folds_and_seeds_are_averaged_and_resampled():
    target = torch.zeros(10, dtype=torch.int64)
    right = torch.tensor([[1.0, 0.0]]).double().expand(10, 2)
    wrong = right.flip(1)
    scores = [torch.stack([right, wrong]), torch.stack([right, right])]  # of two seeds in each of two folds
    draws = Draws.of([np.arange(10), np.arange(10)], 2, resamples=400)
    plain, folds = draws.score("accuracy", scores, [target, target])
    assert plain[0] == folds[0] == 0.75
    assert interval(plain) == (0.5, 1.0)  # one seed drawn twice, or the other
    assert folds[1:].min() == 0.0  # only the wrong seed of the worse fold
    same, _ = draws.score("accuracy", scores, [target, target])
    assert torch.equal(same, plain)


def test_subsets_score_their_clips_alone():
    target = torch.zeros(10, dtype=torch.int64)
    right = torch.tensor([[1.0, 0.0]]).double().expand(10, 2).clone()
    right[5:] = right[5:].flip(1)
    draws = Draws.of([np.arange(10), np.arange(10)], 1, resamples=20)
    within = [torch.arange(10) < 5, torch.zeros(10, dtype=torch.bool)]  # the second fold has none of them
    plain, folds = draws.score("accuracy", [right[None], right[None]], [target, target], within)
    assert plain[0] == folds[0] == 1.0


def test_a_fold_without_a_positive_clip_leaves_the_score_to_the_others():
    scores = torch.tensor([[0.1], [0.9], [0.5]], dtype=torch.float64)[None]
    targets = [torch.tensor([[1.0], [0.0], [0.0]]), torch.zeros(3, 1)]
    plain, folds = Draws.of([np.arange(3), np.arange(3)], 1, resamples=50).score("mAP", [scores, scores], targets)
    assert plain[0] == folds[0] == pytest.approx(1 / 3)
    # A resample that missed the clip has no score, and leaves the interval to the others.
    assert 0 < plain.isnan().sum() < 50
    low, high = interval(plain)
    assert low < 1 / 3 < high


@pytest.mark.parametrize("metric", ["accuracy", "mAP"])
def test_scores_that_are_no_numbers_are_no_answer(metric):
    scores = torch.full((1, 10, 2), 0.5, dtype=torch.float64)
    target = torch.zeros(10, dtype=torch.int64) if metric == "accuracy" else torch.ones(10, 2)
    scores[0, 3, 1] = torch.nan
    with pytest.raises(ConfigError, match="scores of 1 of 10 test clips, fold 0, are not finite"):
        Draws.of([np.arange(10)], 1, resamples=5).score(metric, [scores], [target])


def leave_one_out(random, n_groups: int, clips: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(scores, target) of each fold, whose clips are right by a chance of the fold's own, 0.6 in the mean."""
    folds = []
    for chance in random.beta(6, 4, n_groups):
        target = torch.from_numpy(random.integers(0, 2, clips))
        right = torch.from_numpy(random.random(clips) < chance)
        best = torch.where(right, target, 1 - target)
        folds.append((torch.nn.functional.one_hot(best, 2).double()[None], target))
    return folds


def test_where_a_fold_tests_on_few_groups_the_interval_is_over_folds():
    """Of one group a resample is the group: the interval would have no width, and cover 5 times in 100."""
    random, covered = np.random.default_rng(0), 0
    for trial in range(100):
        folds = leave_one_out(random, 12, 40)
        draws = Draws.of([np.zeros(40)] * 12, 1, resamples=300, seed=trial)
        plain, over_folds = draws.score("accuracy", *map(list, zip(*folds, strict=True)))
        assert torch.equal(plain, over_folds)
        low, high = interval(plain)
        covered += low <= 0.6 <= high
    assert 85 <= covered <= 99


def test_of_one_group_there_is_no_interval():
    ((scores, target),) = leave_one_out(np.random.default_rng(0), 1, 40)
    plain, _ = Draws.of([np.zeros(40)], 1, resamples=20).score("accuracy", [scores], [target])
    assert 0 < plain[0] < 1
    assert all(map(math.isnan, interval(plain)))
    said = torch.nn.functional.one_hot(target, 2).double()[None]
    for average in Draws.of([np.zeros(40)], 1, resamples=20).score("mAP", [said], [said[0].float()]):
        assert average[0] == 1.0
        assert average[1:].isnan().all()
    two = Draws.of([np.arange(40) % 2], 1, resamples=20)
    assert all(map(math.isnan, interval(two.score("accuracy", [scores], [target], [torch.arange(40) % 2 == 0])[0])))


@pytest.mark.parametrize("seeds", [1, 3, 7])
def test_where_all_clips_are_right_or_wrong_the_interval_is_the_exact_one(seeds):
    right = torch.tensor([[1.0, 0.0]]).double().expand(seeds, 40, 2)
    draws = Draws.of([np.arange(40) // 2], seeds, resamples=20)
    for scores, want in ((right, (0.025 ** (1 / 20), 1.0)), (right.flip(2), (0.0, 1 - 0.025 ** (1 / 20)))):
        values, _ = draws.score("accuracy", [scores], [torch.zeros(40, dtype=torch.int64)])
        assert interval(values)[0] == pytest.approx(interval(values)[1])  # which says nothing of other clips
        assert score_interval(values, "accuracy", 20) == pytest.approx(want)
    one_group = torch.tensor([1.0, torch.nan, torch.nan])
    assert all(map(math.isnan, score_interval(one_group, "accuracy", 1)))


def test_the_exact_interval_is_of_the_score_and_not_of_a_resample():
    values = torch.tensor([0.9, 1.0, 1.0, 0.8, 0.8], dtype=torch.float64)
    assert score_interval(values, "accuracy", 20) == interval(values)
    assert score_interval(1 - values, "accuracy", 20) == interval(1 - values)
    assert score_interval(torch.ones_like(values), "mAP", 20) == (1.0, 1.0)  # of which no such chance is known


@pytest.mark.parametrize(
    ("difference", "low", "high", "none"),
    [(0.0, 0.0, 0.0, True), (0.1, 0.0, 0.2, False), (0.0, -0.1, 0.0, False), (0.0, 0.0, 0.1, False)],
)
def test_no_clip_differs_where_no_resample_does(difference, low, high, none):
    assert no_clip_differs(difference, low, high) is none
    assert not no_clip_differs(difference, float("nan"), float("nan"))


def test_the_exact_interval_covers_a_truth_that_resamples_would_miss():
    """Of an encoder that is right in 95 of 100, 20 clips are all right in more than a third of tests."""
    random, missed = np.random.default_rng(0), 0
    draws = Draws.of([np.arange(20)], 1, resamples=200)
    for _ in range(200):
        right = torch.from_numpy(random.random(20) < 0.95)
        scores = torch.nn.functional.one_hot((~right).long(), 2).double()[None]
        values, _ = draws.score("accuracy", [scores], [torch.zeros(20, dtype=torch.int64)])
        missed += score_interval(values, "accuracy", 20)[0] > 0.95
    assert missed == 0


def test_an_interval_of_mean_average_precision_ends_at_0_and_1():
    values = torch.tensor([0.97, *np.linspace(0.9, 1.04, 100)])
    assert interval(values)[1] > 1
    assert score_interval(values, "mAP", 100)[1] == 1.0
    assert score_interval(values - 0.94, "mAP", 100)[0] == 0.0
    assert score_interval(values - 0.5, "mAP", 100) == interval(values - 0.5)
