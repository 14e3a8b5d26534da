"""The linear probe against scikit-learn, and what its numbers promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from matpac_fast.errors import ConfigError
from matpac_fast.study import probe
from matpac_fast.study.probe import bootstrap_interval, fit_logistic, linear_probe


def clouds(n: int, dim: int, classes: int, seed: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Centres from a seed of their own, so that train and test clouds lie in the same places.
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    noise = spread * torch.randn(n, dim, generator=generator)
    # Columns of very different size and offset, which the probe must standardise away.
    return (centres[labels] + noise) * torch.logspace(-3, 3, dim) + 5.0, labels


@pytest.mark.parametrize(("n", "dim", "classes"), [(61, 7, 3), (40, 113, 4), (50, 1, 2)])
@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_weights_agree_with_scikit_learn(n: int, dim: int, classes: int, l2: float) -> None:
    features, labels = clouds(n, dim, classes, seed=0)
    scaled = StandardScaler().fit_transform(features.double().numpy())
    weight = fit_logistic(torch.from_numpy(scaled), labels, classes, l2).numpy()
    oracle = LogisticRegression(C=1 / (n * l2), tol=1e-8, max_iter=10_000).fit(scaled, labels.numpy())
    if classes == 2:
        # scikit-learn has one weight vector for two classes; ours are two, so its penalty counts for half.
        oracle = LogisticRegression(C=2 / (n * l2), tol=1e-8, max_iter=10_000).fit(scaled, labels.numpy())
        coef, intercept = np.concatenate([-oracle.coef_, oracle.coef_]) / 2, None
    else:
        coef, intercept = oracle.coef_, oracle.intercept_ - oracle.intercept_.mean()
    np.testing.assert_allclose(weight[:, :-1], coef, atol=1e-5)
    if intercept is not None:  # the bias is free up to a constant
        np.testing.assert_allclose(weight[:, -1] - weight[:, -1].mean(), intercept, atol=1e-5)


@pytest.mark.parametrize("dim", [6, 200])  # fewer and more features than clips
def test_predictions_agree_with_scikit_learn(dim: int) -> None:
    (train, train_labels), (test, test_labels) = clouds(90, dim, 3, seed=1), clouds(120, dim, 3, seed=2)
    result = linear_probe(train, train_labels, test, test_labels)
    scaler = StandardScaler().fit(train.double().numpy())
    oracle = LogisticRegression(C=1 / (90 * result.l2), tol=1e-8, max_iter=10_000)
    oracle.fit(scaler.transform(train.double().numpy()), train_labels.numpy())
    expected = oracle.predict(scaler.transform(test.double().numpy())) == test_labels.numpy()
    assert np.array_equal(result.correct.numpy(), expected)
    assert 0.4 < result.accuracy.mean < 1.0  # a problem neither trivial nor hopeless, or the test says little


def test_strength_is_chosen_for_unseen_clips() -> None:
    # 40 clips, 300 columns of noise and one weak signal: a strong penalty is right. Two clean columns: a weak one.
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(40) % 2
    noisy = torch.randn(40, 300, generator=generator)
    noisy[:, 0] += labels
    clean = torch.randn(40, 2, generator=generator) * 0.1 + labels[:, None]
    assert linear_probe(noisy, labels, noisy, labels).l2 >= 0.1
    assert linear_probe(clean, labels, clean, labels).l2 <= 0.001


def test_same_bits_twice_and_inputs_unchanged() -> None:
    train, labels = clouds(60, 20, 4, seed=4)
    test, test_labels = clouds(30, 20, 4, seed=5)
    before, threads = (train.clone(), test.clone()), torch.get_num_threads()
    first, second = (linear_probe(train, labels, test, test_labels) for _ in range(2))
    assert first.accuracy == second.accuracy
    assert first.l2 == second.l2
    assert torch.equal(first.correct, second.correct)
    assert torch.get_num_threads() == threads
    assert torch.equal(train, before[0])
    assert torch.equal(test, before[1])


def test_the_applications_default_device_changes_nothing() -> None:
    (train, labels), (test, test_labels) = clouds(60, 20, 4, seed=4), clouds(30, 20, 4, seed=5)
    want = linear_probe(train, labels, test, test_labels)
    with torch.device("meta"):  # as torch.set_default_device("cuda")
        found = linear_probe(train, labels, test, test_labels)
    assert (found.accuracy, found.l2) == (want.accuracy, want.l2)


def test_constant_columns_change_nothing() -> None:
    train, labels = clouds(60, 5, 3, seed=6)
    test, test_labels = clouds(60, 5, 3, seed=7)
    plain = linear_probe(train, labels, test, test_labels)
    for constant in (0.0, 0.1, -1e6):
        # On test clips the column varies: what training could not learn must not be used.
        padded = torch.cat([train, torch.full((60, 1), constant)], 1), torch.cat([test, torch.randn(60, 1) * 100], 1)
        assert torch.equal(linear_probe(padded[0], labels, padded[1], test_labels).correct, plain.correct)


def test_test_labels_do_not_reach_the_fit() -> None:
    train, labels = clouds(60, 5, 3, seed=8)
    test, test_labels = clouds(60, 5, 3, seed=9)
    right = linear_probe(train, labels, test, test_labels)
    wrong = linear_probe(train, labels, test, (test_labels + 1) % 3)
    assert right.l2 == wrong.l2
    assert not (right.correct & wrong.correct).any()


def test_interval_is_that_of_a_proportion() -> None:
    correct = torch.arange(400) % 4 != 0  # 75 % of 400
    interval = bootstrap_interval(correct)
    error = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert interval.mean == 0.75
    assert interval.low == pytest.approx(0.75 - error, abs=0.004)
    assert interval.high == pytest.approx(0.75 + error, abs=0.004)


def test_paired_interval_is_narrower_than_two() -> None:
    generator = torch.Generator().manual_seed(10)
    one = torch.rand(400, generator=generator) < 0.7
    other = one.clone()
    other[:12] = True  # the same clips but for a few
    paired = bootstrap_interval(other.double() - one.double())
    assert paired.high - paired.low < 0.25 * (bootstrap_interval(one).high - bootstrap_interval(one).low) * 2
    assert paired.mean == pytest.approx((other.double().mean() - one.double().mean()).item())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "train": a["train"][:-1]}, "train must be features"),
        (lambda a: {**a, "test": a["test"][:, :-1]}, "one encoder"),
        (lambda a: {**a, "test": a["test"][:0], "test_labels": a["test_labels"][:0]}, "test must be features"),
        (lambda a: {**a, "train": a["train"] * torch.nan}, "not finite"),
        (lambda a: {**a, "train_labels": a["train_labels"] * 0}, "every class"),
        (lambda a: {**a, "train_labels": a["train_labels"] * 2}, "every class"),
        (lambda a: {**a, "train_labels": a["train_labels"].index_fill(0, torch.tensor(0), 2)}, "every class"),
        (lambda a: {**a, "test_labels": a["test_labels"] + 1}, "every class"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, message: str) -> None:
    train, labels = clouds(12, 3, 2, seed=11)
    arguments = {"train": train, "train_labels": labels, "test": train.clone(), "test_labels": labels.clone()}
    with pytest.raises(ConfigError, match=message):
        linear_probe(**change(arguments))


def test_held_out_parts_have_as_much_of_each_class():
    labels = torch.arange(30) % 3
    assert (labels * 5 + probe._folds(labels, 5, seed=0)).bincount().tolist() == [2] * 15


def test_groups_are_resampled_whole() -> None:
    correct = torch.arange(400) % 8 < 3
    every, alike = torch.arange(400), torch.arange(400) % 8  # of eight groups three are right
    alone, apart = bootstrap_interval(correct), bootstrap_interval(correct, groups=every)
    assert (alone.mean, alone.low, alone.high) == (apart.mean, apart.low, apart.high)
    together = bootstrap_interval(correct, groups=alike)
    assert together.mean == alone.mean == 0.375
    assert together.low == pytest.approx(0.125)
    assert together.high == pytest.approx(0.75)
    uneven = bootstrap_interval(torch.tensor([1.0, 1.0, 1.0, 0.0]), groups=torch.tensor([5, 5, 5, 2]))
    assert (uneven.low, uneven.mean, uneven.high) == (0.0, 0.75, 1.0)
