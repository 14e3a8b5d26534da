"""The attentive probe: it finds the window that matters, and where there is one window it is the linear probe."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from matpac_fast.study import attentive, linear
from matpac_fast.study.attentive import AttentiveFold
from matpac_fast.study.linear import Part, ProbeConfig, Rows, probe
from matpac_fast.tasks import Fold

LINEAR = ProbeConfig(learning_rates=(0.1, 1.0), decays=(1e-3, 1e-2), seeds=2, steps=150)
ATTENTIVE = dataclasses.replace(LINEAR, attentive=True)
EXACT = ProbeConfig(learning_rates=(0.3,), decays=(0.03,), seeds=2, steps=1000, check_every=1000)
CLASSES, SIZE = 3, 10


def hidden(n: int = 150, windows: int = 8, seed: int = 0) -> tuple[Rows, np.ndarray]:
    """Clips of up to `windows` rows, in any order; one of a clip's, marked in the last column, tells its class."""
    random = np.random.default_rng(seed)
    targets = np.arange(n) % CLASSES
    values, clip = [], []
    for i in range(n):
        count = windows - i // 3 % 3
        rows = random.normal(size=(count, SIZE))
        rows[:, -1] = -1.0
        rows[0] = 0.3 * rows[0] + 3.0 * np.eye(SIZE)[targets[i]]
        rows[0, -1] = 1.0
        rows[1:, :CLASSES] += 3.0 * np.eye(CLASSES)[random.integers(CLASSES, size=count - 1)]  # as loud, and idle
        values.append(rows)
        clip += [i] * count
    order = random.permutation(len(clip))
    return Rows(torch.from_numpy(np.concatenate(values)[order]), np.array(clip)[order], np.ones(len(order))), targets


def fold(n: int = 150) -> Fold:
    part = np.arange(n) // 5 % 3
    return Fold(*(np.flatnonzero(part == i) for i in (2, 0, 1)))


def run(rows: Rows, targets: np.ndarray, config: ProbeConfig, metric: str = "accuracy"):
    groups = np.arange(len(targets)).astype(str)
    return probe(rows, targets, groups, [fold(len(targets))], CLASSES, config, metric, dtype=torch.float64)


def accuracy(found, targets: np.ndarray) -> float:
    return float((found.scores[0].argmax(2).numpy() == targets[fold(len(targets)).test]).mean())


def test_it_finds_the_window_that_matters():
    rows, targets = hidden()
    means = torch.stack([rows.values[torch.from_numpy(rows.clip == i)].mean(0) for i in range(len(targets))])
    linear = run(Rows(means, np.arange(len(targets)), np.ones(len(targets))), targets, LINEAR)
    attends = run(rows, targets, ATTENTIVE)
    assert accuracy(attends, targets) > 0.9
    assert accuracy(linear, targets) < 0.8
    assert attends.weights[0].shape == (2, SIZE + 1, CLASSES + 1)
    query = attends.weights[0][:, :-1, -1]
    assert (query.abs().argmax(1) == SIZE - 1).all()
    # The weights are those for features as given.
    logits = rows.values @ attends.weights[0][0, :-1] + attends.weights[0][0, -1]
    for i, wanted in zip(fold().test[:5], attends.scores[0][0], strict=False):
        mine = logits[torch.from_numpy(rows.clip == i)]
        pooled = (mine[:, -1:].softmax(0) * mine[:, :-1]).sum(0)
        torch.testing.assert_close(pooled.softmax(0), wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("several", [False, True])
def test_of_one_window_it_is_the_linear_probe(several):
    rows, targets = hidden()
    marked = (rows.values[:, -1] > 0).numpy()
    rows = Rows(rows.values[marked], rows.clip[marked], rows.seconds[marked])
    metric = "accuracy"
    if several:
        targets, metric = (np.eye(CLASSES, dtype=np.float32)[targets] + 0.0), "mAP"
        targets[::7, 1] = np.nan
    one, other = (run(rows, targets, dataclasses.replace(EXACT, attentive=a), metric) for a in (False, True))
    torch.testing.assert_close(other.scores[0], one.scores[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(other.valid, one.valid, rtol=0, atol=1e-5)
    torch.testing.assert_close(other.weights[0][..., :CLASSES], one.weights[0], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("cells", [1, 1 << 25])  # a clip at a time, and all
def test_loss_and_gradient_are_those_of_clip_after_clip(monkeypatch, several, cells):
    monkeypatch.setattr(attentive, "CELLS", cells)
    rows, targets = hidden(n=30, windows=4)
    if several:
        targets = np.eye(CLASSES, dtype=np.float32)[targets]
        targets[3:9, 0] = np.nan
    config = dataclasses.replace(ATTENTIVE, learning_rates=(0.1,), decays=(0.1,))
    names = np.arange(30)
    made = AttentiveFold(rows, targets, names, fold(30), CLASSES, config, torch.device("cpu"), torch.float64, range(2))
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(made.train.x.shape[1], 2, CLASSES + 1, generator=random, dtype=torch.float64)
    bias = torch.randn(2, CLASSES + 1, generator=random, dtype=torch.float64)
    given = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]

    def mean_loss(part: Part, seed: int, counts: np.ndarray) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i, count in zip(part.clips, counts, strict=True):
            found = part.x[torch.from_numpy(part.clip == i)] @ given[0][:, seed] + given[1][seed]
            logits = (found[:, -1:].softmax(0) * found[:, :-1]).sum(0)
            if several:
                known = ~np.isnan(targets[i])
                wanted = torch.from_numpy(targets[i][known]).double()
                total = total + F.binary_cross_entropy_with_logits(logits[known], wanted, reduction="sum") * count
            else:
                total = total + F.cross_entropy(logits[None], torch.tensor([targets[i]])) * count
        return total / len(part.clips)

    sum(mean_loss(made.train, seed, np.ones(len(made.train.clips))) for seed in range(2)).backward()
    for found, leaf in zip(made._gradient(weight, bias), given, strict=True):
        torch.testing.assert_close(found, leaf.grad)
    expected = torch.stack(
        [mean_loss(made.valid, seed, linear._resampled(names[made.valid.clips], seed)) for seed in range(2)]
    ).detach()
    torch.testing.assert_close(made._loss(weight, bias), expected)


def test_the_order_of_rows_and_the_test_clips_change_nothing():
    rows, targets = hidden()
    before = run(rows, targets, ATTENTIVE)
    order = np.argsort(rows.clip, kind="stable")
    after = run(Rows(rows.values[order], rows.clip[order], rows.seconds[order]), targets, ATTENTIVE)
    torch.testing.assert_close(after.scores[0], before.scores[0], rtol=0, atol=1e-6)
    values = rows.values.clone()
    values[torch.from_numpy(np.isin(rows.clip, fold().test))] = 7.0
    other = run(Rows(values, rows.clip, rows.seconds), targets, ATTENTIVE)
    assert torch.equal(other.weights[0], before.weights[0])
    assert torch.equal(other.valid_score, before.valid_score)


@pytest.mark.parametrize("size", [0.0, 1e4])
def test_rows_count_by_their_seconds_however_large_the_query(size):
    """With a query of zero as in the mean embedding; with a large one no exponential overflows."""
    rows, targets = hidden(30)
    rows = Rows(rows.values, rows.clip, np.random.default_rng(1).uniform(0.1, 1.0, len(rows.clip)))
    made = AttentiveFold(
        rows, targets, np.arange(30), fold(30), CLASSES, ATTENTIVE, torch.device("cpu"), torch.float64, range(2)
    )
    part, n = made.train, len(made.train.first)
    weight = torch.randn(part.x.shape[1], 1, CLASSES + 1, dtype=torch.float64)
    weight[..., -1] *= size
    found = made._pool(part, slice(0, n), weight, torch.zeros(1, CLASSES + 1, dtype=torch.float64))
    assert found.isfinite().all()
    if size == 0:
        mean = torch.zeros(n, part.x.shape[1], dtype=torch.float64)
        mean.index_add_(0, part.place, part.x * part.share[:, None])
        torch.testing.assert_close(found[:, 0], mean @ weight[:, 0, :-1])
