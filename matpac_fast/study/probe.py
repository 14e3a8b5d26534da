"""A linear probe: multinomial logistic regression on frozen embeddings, with an interval that says what it is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

# Strengths tried, strongest first, for the mean cross-entropy of standardised features.
L2_GRID = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)


@dataclass(frozen=True)
class Interval:
    """A mean over clips and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy on the test clips, which of them were right (N,) bool, and the L2 strength that was chosen."""

    accuracy: Interval
    correct: Tensor
    l2: float


def fit_logistic(features: Tensor, labels: Tensor, n_classes: int, l2: float, start: Tensor | None = None) -> Tensor:
    """Minimise mean cross-entropy + l2 / 2 * |weight|^2 over weight and (unpenalised) bias.

    features (N, D) float64, labels (N,) int64 -> (n_classes, D + 1), the bias last. scikit-learn's LogisticRegression
    minimises the same with C = 1 / (N * l2). `start` is a guess of that shape. Newton's method to a gradient of 1e-8,
    its linear systems solved by preconditioned conjugate gradients.
    """
    inputs = F.pad(features, (0, 1), value=1.0)  # (N, D + 1)
    n = len(inputs)
    target = F.one_hot(labels, n_classes).to(inputs.dtype)  # (N, K)
    penalty = torch.full_like(inputs[0], l2)
    penalty[-1] = 0.0
    weight = inputs.new_zeros(n_classes, inputs.shape[1]) if start is None else start

    def objective(weight: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax(inputs @ weight.T, dim=1)  # (N, K)
        return (penalty * weight.square()).sum() / 2 - (log_p * target).sum() / n, log_p

    loss, log_p = objective(weight)
    for _ in range(100):
        p = log_p.exp()
        gradient = (p - target).T @ inputs / n + penalty * weight
        if gradient.abs().max() < 1e-8:
            break

        def curvature(direction: Tensor, p: Tensor = p) -> Tensor:
            change = inputs @ direction.T  # of the logits, (N, K)
            return (p * (change - (p * change).sum(1, keepdim=True))).T @ inputs / n + penalty * direction

        diagonal = (p * (1 - p)).T @ inputs.square() / n + penalty
        step = _conjugate_gradients(curvature, -gradient, diagonal.clamp(min=1e-12))
        slope, size = (gradient * step).sum(), 1.0
        tried = objective(weight + step)
        while tried[0] > loss + 1e-4 * size * slope and size > 1e-6:
            size /= 2
            tried = objective(weight + size * step)
        if tried[0] >= loss:  # rounding is all that is left
            break
        weight = weight + size * step
        loss, log_p = tried
    return weight


def _conjugate_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor) -> Tensor:
    """Solve apply(x) = right, the closer the smaller `right` is, as Newton's method needs it near its goal."""
    x, residual = torch.zeros_like(right), right
    enough = right.norm() * min(0.1, right.norm().item() ** 0.5)
    conditioned = direction = residual / diagonal
    energy = (residual * conditioned).sum()
    for _ in range(250):
        image = apply(direction)
        length = energy / (direction * image).sum()
        x = x + length * direction
        residual = residual - length * image
        if residual.norm() <= enough:
            break
        conditioned = residual / diagonal
        energy, before = (residual * conditioned).sum(), energy
        direction = conditioned + energy / before * direction
    return x


class _Problem:
    """Training features made ready once for every strength: standardised, then rotated to their principal axes.

    With an L2 penalty the best weight is a combination of the training rows, so the rotation changes nothing but the
    number of columns, at most N (400 clips of 3840 features cost what 400 features do), and makes them uncorrelated,
    which is what the conjugate gradients' preconditioner wants.
    """

    def __init__(self, features: Tensor, labels: Tensor, n_classes: int) -> None:
        features = features.double()
        self.mean = features.mean(0)
        spread = features.std(0, correction=0)
        # A constant column says nothing and has no spread to divide by. Rounding leaves it a trace of one.
        self.scale = torch.where(spread > 1e-7 * (self.mean.abs() + 1e-30), spread, torch.inf)
        rows = (features - self.mean) / self.scale
        self.basis = torch.linalg.svd(rows, full_matrices=False).Vh.T  # (D, min(N, D))
        self.rows = rows @ self.basis
        self.labels, self.n_classes = labels, n_classes

    def path(self, strengths: tuple[float, ...]) -> list[Tensor]:
        """The weights at each strength, each fit starting from the one before."""
        weights: list[Tensor] = []
        for l2 in strengths:
            start = weights[-1] if weights else None
            weights.append(fit_logistic(self.rows, self.labels, self.n_classes, l2, start))
        return weights

    def logits(self, weight: Tensor, features: Tensor) -> Tensor:
        rows = (features.double() - self.mean) / self.scale @ self.basis
        return F.pad(rows, (0, 1), value=1.0) @ weight.T


def _folds(labels: Tensor, n_folds: int, seed: int) -> Tensor:
    """(N,) labels -> (N,) fold numbers, each class dealt out evenly in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    order = order[labels[order].argsort(stable=True)]
    folds = torch.empty_like(labels)
    folds[order] = torch.arange(len(labels), device="cpu") % n_folds
    return folds


def bootstrap_interval(values: Tensor, groups: Tensor | None = None) -> Interval:
    """Mean of per-clip values (N,) and the 2.5 and 97.5 % percentiles of the mean over clips resampled 10,000 times.

    With `groups` (N,) whole groups are drawn, as of clips of one instrument, which are right or wrong together. For
    one probe give its `correct`; to compare two on the same clips give the difference of theirs, whose interval is
    narrower than the two intervals suggest. Values that are all equal give an interval of no width.
    """
    values = values.double()
    owner = torch.arange(len(values), device="cpu") if groups is None else groups.unique(return_inverse=True)[1]
    counts = owner.bincount().double()
    sums = torch.zeros_like(counts).index_add_(0, owner, values)
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(len(sums), (500, len(sums)), generator=generator, device="cpu") for _ in range(20))
    means = torch.cat([sums[rows].sum(1) / counts[rows].sum(1) for rows in drawn])
    low, high = means.quantile(means.new_tensor([0.025, 0.975])).tolist()
    return Interval(values.mean().item(), low, high)


@contextmanager
def one_thread() -> Iterator[None]:
    """These products are too small to share: on a busy machine threads would wait for each other a hundred times as
    long as they compute. And so the result does not depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    groups: Tensor | None = None,
    l2_grid: tuple[float, ...] = L2_GRID,
    n_folds: int = 5,
    seed: int = 0,
) -> ProbeResult:
    """Fit a linear classifier on the training embeddings and score it on the test embeddings.

    train (N, D) and test (M, D), any float dtype; labels (N,) and (M,) int64 from 0. Features are standardised by the
    training clips; the L2 strength is the one of least cross-entropy over `n_folds` held-out parts of the training
    clips, which sees no test clip. `groups` (M,) of test clips are resampled whole. The arithmetic is float64, and
    the same input gives the same result. Raises ConfigError where shapes do not fit, a feature is not finite, or a
    class has fewer than two training clips.
    """
    for name, features, labels in (("train", train, train_labels), ("test", test, test_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
            raise ConfigError(
                f"{name} must be features (N, D) with labels (N,), N > 0, "
                f"not {(*features.shape,)} with {(*labels.shape,)}"
            )
        if not features.isfinite().all():
            raise ConfigError(f"the {name} features hold values that are not finite: look at the clips they come from")
    if train.shape[1] != test.shape[1]:
        raise ConfigError(f"train has {train.shape[1]} features and test {test.shape[1]}: embed both with one encoder")
    train_labels, test_labels = train_labels.long(), test_labels.long()
    counts = train_labels.bincount()
    if len(counts) < 2 or counts.min() < 2 or test_labels.max() >= len(counts):
        raise ConfigError(f"every class, of at least two, needs two training clips; these have {counts.tolist()}")

    folds = _folds(train_labels, n_folds, seed)
    losses = torch.zeros(len(l2_grid), dtype=torch.float64, device="cpu")
    for fold in range(n_folds):
        held = folds == fold
        if not held.any():
            continue
        problem = _Problem(train[~held], train_labels[~held], len(counts))
        for i, weight in enumerate(problem.path(l2_grid)):
            losses[i] += F.cross_entropy(problem.logits(weight, train[held]), train_labels[held], reduction="sum")
    chosen = int(losses.argmin())
    problem = _Problem(train, train_labels, len(counts))
    weight = problem.path(l2_grid[: chosen + 1])[-1]
    correct = problem.logits(weight, test).argmax(1) == test_labels
    return ProbeResult(bootstrap_interval(correct, groups=groups), correct, l2_grid[chosen])
