"""Scores of weighted clips, so that a bootstrap resample is a row of weights; and the intervals that come of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError

RESAMPLES = 1000
_FEW = 5  # groups of a fold's test clips, below which resampling them says too little: folds are resampled as well
_CELLS = 1 << 24  # resamples x clips held at a time
_TAIL = 0.025  # on either side of a 95 % interval
_ROUNDING = 1e-9


def accuracy(scores: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """scores (N, K), targets (N,) int64, weights (B, N) -> (B,): the weighted share of clips whose best is right."""
    right = (scores.argmax(1) == targets).to(weights.dtype)
    return weights @ right / weights.sum(1)


def mean_average_precision(scores: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """scores and targets (N, K), NaN where unknown, weights (B, N) -> (B,): the mean over classes of average precision.

    As scikit-learn's average_precision_score: the sum over thresholds of precision times the recall gained, equal
    scores under one threshold. Of each class the clips count for which its target is known; classes without weight on
    a positive clip do not count. NaN where none has.
    """
    total, classes = weights.new_zeros(len(weights)), weights.new_zeros(len(weights))
    by_clip = weights.T.contiguous()  # (N, B)
    if torch.equal(weights, weights.round()) and weights.sum(1).max() < 2**24:
        by_clip = by_clip.float()  # adds such numbers as exactly, and faster
    for k in range(scores.shape[1]):
        known = (~targets[:, k].isnan()).nonzero()[:, 0]
        order = known[scores[known, k].argsort(descending=True, stable=True)]
        s, positive = scores[order, k], targets[order, k] > 0
        if not positive.any():
            continue
        threshold = torch.cat([s.new_zeros(1), s[1:] != s[:-1]]).cumsum(0)  # of each clip, by number
        used = threshold[positive].unique()  # where there is recall to gain; P of them
        ends = torch.searchsorted(threshold, used, right=True)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        seen = _sums(by_clip, order[: ends[-1]], starts).to(weights.dtype).cumsum(0)  # (P, B)
        first = torch.searchsorted(threshold[positive], used)
        gained = _sums(by_clip, order[positive], first).to(weights.dtype)
        hits = gained.cumsum(0)
        ap = (gained * hits / seen.clamp(min=1e-30)).sum(0) / hits[-1].clamp(min=1e-30)
        counts = hits[-1] > 0
        total += torch.where(counts, ap, 0.0)
        classes += counts
    return total / torch.where(classes > 0, classes, torch.nan)


def _sums(table: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """(P, B) sums of the rows of `table` (N, B) from each start, in `rows`, to the next."""
    return F.embedding_bag(rows, table, starts, mode="sum")


def resample(random: np.random.Generator, n: int, times: int = 1) -> np.ndarray:
    """(times, n) how often each of `n` stands in a bootstrap resample of them."""
    return random.multinomial(n, np.full(n, 1 / n), size=times)


METRICS = {"accuracy": accuracy, "mAP": mean_average_precision}


@dataclass(frozen=True)
class Draws:
    """Bootstrap resamples of a task's test clips, the same for every embedding, so that differences are paired.

    Row 0 of each array is the sample itself. `clips[f]` (1 + B, N_f) weighs the test clips of fold f: whole groups,
    by their numbers `groups[f]` (N_f,), are drawn with replacement. `seeds` (1 + B, S) and `folds` (1 + B, F) sum to 1.
    """

    clips: list[Tensor]
    groups: list[Tensor]
    seeds: Tensor
    folds: Tensor

    @classmethod
    def of(cls, groups: list[np.ndarray], n_seeds: int, resamples: int = RESAMPLES, seed: int = 0) -> Draws:
        """`groups` are the group names of each fold's test clips."""
        random = np.random.default_rng(seed)
        clips, numbers = [], []
        for names in groups:
            _, inverse = np.unique(names, return_inverse=True)
            numbers.append(torch.from_numpy(inverse))
            n = inverse.max() + 1
            counts = np.ones((1 + resamples, n), np.float64)
            counts[1:] = resample(random, n, resamples)
            clips.append(torch.from_numpy(counts[:, inverse]))
        parts = []
        for n in (n_seeds, len(groups)):
            counts = np.full((1 + resamples, n), 1 / n)
            counts[1:] = resample(random, n, resamples) / n
            parts.append(torch.from_numpy(counts))
        return cls(clips, numbers, *parts)

    def score(
        self, metric: str, scores: list[Tensor], targets: list[Tensor], within: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """`together` of `by_fold`, whose arguments it takes."""
        return self.together(metric, self.by_fold(metric, scores, targets, within), within)

    def by_fold(
        self, metric: str, scores: list[Tensor], targets: list[Tensor], within: list[Tensor] | None = None
    ) -> Tensor:
        """(1 + B, F): each fold's score and its resamples over groups and seeds; NaN where a fold has none.

        `scores[f]` (S, N_f, K), `targets[f]`, and `within[f]` (N_f,) bool, the clips that count. A fold's seeds are
        scored one by one and averaged.

        Raises:
            ConfigError: scores that are not finite.
        """
        measure, found = METRICS[metric], []
        for f, (some, target, weights) in enumerate(zip(scores, targets, self.clips, strict=True)):
            if bad := int((~some.isfinite()).any(2).any(0).sum()):
                raise ConfigError(
                    f"the probes' scores of {bad} of {some.shape[1]} test clips, fold {f}, are not finite; expected "
                    "probabilities; remove the folder probes/ of the study and run it again"
                )
            if within is not None:
                some, target, weights = some[:, within[f]], target[within[f]], weights[:, within[f]]
                if not len(target):
                    found.append(torch.full_like(self.folds[:, f], torch.nan))
                    continue
            rows = max(1, _CELLS // max(1, weights.shape[1]))
            by_seed = torch.stack(
                [torch.cat([measure(one, target, w) for w in weights.split(rows)]) for one in some], 1
            )
            found.append((by_seed * self.seeds).sum(1))
        return torch.stack(found, 1)

    def together(self, metric: str, by_fold: Tensor, within: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(1 + B, F) of `by_fold` -> (1 + B,) twice: the folds' mean, and with the folds resampled as well.

        Where a fold tests on fewer than five groups the first is the second. Where there is one fold, of one group,
        nothing can be resampled: the resamples are NaN. Index 0 is the score itself, the rest its resamples.
        """
        n_groups = [len(groups.unique()) for groups in self._counted(within)]
        plain = by_fold.nanmean(1)
        share = self.folds * ~by_fold.isnan()
        folds = (by_fold.nan_to_num() * share).sum(1) / torch.where(share.sum(1) > 0, share.sum(1), torch.nan)
        if n_groups == [1]:
            plain[1:] = folds[1:] = torch.nan
        elif len(n_groups) > 1 and min(n_groups) < _FEW:
            plain = folds
        return (_centred(plain), _centred(folds)) if metric == "mAP" else (plain, folds)

    def _counted(self, within: list[Tensor] | None) -> list[Tensor]:
        """The groups of each fold's clips that count, of the folds that have some."""
        if within is None:
            return self.groups
        return [groups[part] for groups, part in zip(self.groups, within, strict=True) if part.any()]


def _centred(values: Tensor) -> Tensor:
    """(1 + B,) with the resamples moved so that their mean is the score.

    A resample repeats clips, and a positive clip beside its own copy ranks better than one beside another: average
    precision comes out higher, of many rare classes so much that the score would lie outside its own interval.
    """
    return torch.cat([values[:1], values[1:] - (values[1:].nanmean() - values[0])])


def interval(values: Tensor) -> tuple[float, float]:
    """The 2.5 and 97.5 % percentiles of resampled values (1 + B,), the first left out; NaN resamples do not count."""
    resampled = values[1:][~values[1:].isnan()]
    if not len(resampled):
        return float("nan"), float("nan")
    low, high = resampled.quantile(resampled.new_tensor([_TAIL, 1 - _TAIL])).tolist()
    return low, high


def score_interval(values: Tensor, metric: str, groups: int) -> tuple[float, float]:
    """`interval` of a score (1 + B,) on clips of so many groups, within 0 and 1.

    Where all clips are right no resample has a wrong one, though others may be: then the lower end is the chance of
    being right at which `groups` in a row are so in 2.5 of 100 tests; likewise where all are wrong.
    """
    low, high = interval(values)
    if math.isnan(low):
        return low, high
    if metric == "accuracy":
        bound = _TAIL ** (1 / groups)
        if values[0] > 1 - _ROUNDING:
            return bound, 1.0
        if values[0] < _ROUNDING:
            return 0.0, 1 - bound
    return max(0.0, low), min(1.0, high)  # that of a mAP is shifted


def no_clip_differs(difference: float, low: float, high: float) -> bool:
    """Whether two scores differ in no resample."""
    return all(abs(value) < _ROUNDING for value in (difference, low, high))  # false of NaN, that of one group
