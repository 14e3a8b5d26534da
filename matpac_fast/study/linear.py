"""Probes for a whole grid of learning rate, decay and seed at once, as one batched product; here, linear ones."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError
from ..tasks.task import Fold, deal_groups
from .metrics import METRICS, resample
from .probe import one_thread
from .probed import ProbeConfig, Probed, Rows

CELLS = 1 << 25  # logits held at a time
_HELD_OUT = 6  # one part in so many of the training groups validates where the task has no validation clips
_FEATURES = 1 << 24  # of the features in float64, held at a time
_SHARED = 1 << 26  # multiply-adds of a step's product from which threads gain more than they lose by waiting
_RANK = 1e-6  # singular values below this share of the largest are rounding


def probe(
    rows: Rows,
    targets: np.ndarray,
    groups: np.ndarray,
    folds: Sequence[Fold],
    n_classes: int,
    config: ProbeConfig,
    metric: Literal["accuracy", "mAP"],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[float], None] = lambda share: None,
) -> Probed:
    """Train every probe of the grid for every fold and seed, and score the chosen ones on each fold's test clips.

    The test clips of a fold take no part in its training, standardisation or choice. Full-batch Adam; the folds have
    a loop, since their features are standardised and rotated each by its own training clips, and so have seeds that
    hold out validation clips of their own; the grid, and seeds that share them, are one product. Single-label: softmax
    cross-entropy; multi-label: sigmoid cross-entropy over the known labels.

    Args:
        rows: embeddings on any device.
        targets: (N,) int64, or (N, K) float32 with NaN where unknown, of the clips.
        groups: (N,) of the clips; never parted where validation clips are drawn.
        progress: told the share that is done, from 0 to 1; a fold that stops early jumps to its end.

    Raises:
        ConfigError: an embedding that is not finite, or none of a clip; no clips to validate on.
    """
    if not rows.values.isfinite().all():
        raise ConfigError("probe: embeddings that are not finite; look at the audio, or at the encoder's dtype")
    from .attentive import AttentiveFold
    from .batches import BatchedFold

    kind = AttentiveFold if config.attentive else FoldProbes if config.batch is None else BatchedFold
    per_clip = np.bincount(rows.clip, minlength=len(targets))
    used = np.unique(np.concatenate([part for f in folds for part in (f.train, f.valid, f.test) if part is not None]))
    if len(lacking := used[per_clip[used] == 0]):
        raise ConfigError(
            f"probe: {len(lacking)} of {len(used)} clips have no embedding, such as clip {lacking[0]}; "
            "expected one or more of each"
        )
    splits = [split(fold, targets, groups, config.seeds) for fold in folds]
    n, width = rows.values.shape
    if config.batch is None:
        together = max(len(seeds) for parts in splits for _, seeds in parts)
        work = n * min(n, width) * len(config.learning_rates) * len(config.decays) * together * n_classes
    else:  # one probe after the other
        work = min(n, config.batch) * width * n_classes
    found, done, total = [], 0, sum(map(len, splits))
    with one_thread() if work < _SHARED else contextlib.nullcontext():
        for parts in splits:
            some = []
            for part, seeds in parts:
                told = lambda share, done=done: progress((done + share) / total)  # noqa: E731
                some.append(
                    kind(rows, targets, groups, part, n_classes, config, torch.device(device), dtype, seeds).run(
                        metric, told
                    )
                )
                done += 1
            found.append([torch.cat(each) for each in zip(*some, strict=True)])
    scores, *others, weights = zip(*found, strict=True)
    probed = Probed(list(scores), *map(torch.stack, others), weights=list(weights))
    for untrained in probed.untrained:
        _warn(untrained, config)
    return probed


def _warn(untrained: Tensor, config: ProbeConfig) -> None:
    if n := int(untrained.sum()):
        rates = config.learning_rates
        at = f"learning rate{'s' if len(rates) > 1 else ''} {', '.join(f'{rate:g}' for rate in rates)}"
        warnings.warn(
            f"probe: no step lowered the validation loss at {at} for {n} of {config.seeds} "
            f"seed{'s' * (config.seeds > 1)}, whose scores are those of untrained weights, as they were drawn; try "
            f"smaller learning rates, such as {min(rates) / 10:g}, or larger decays",
            stacklevel=3,
        )


def split(fold: Fold, targets: np.ndarray, groups: np.ndarray, seeds: int) -> list[tuple[Fold, range]]:
    """Folds with validation clips, and the seeds that train on each: all, where the task has validation clips; else
    each seed holds out some of the training clips."""
    if fold.valid is not None:
        return [(fold, range(seeds))]
    held = [_held_out(fold.train, targets, groups, seed) for seed in range(seeds)]
    return [
        (Fold(fold.train[~np.isin(fold.train, valid)], fold.test, valid), range(seed, seed + 1))
        for seed, valid in enumerate(held)
    ]


def _held_out(learn: np.ndarray, targets: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """The clips, sorted, that a seed draws from `learn` to validate on; never parts of a group."""
    multi = targets.ndim == 2
    strata = targets[learn] if not multi else np.nan_to_num(targets[learn]).argmax(1)
    parts = min(_HELD_OUT, len(np.unique(groups[learn])))
    if parts < 2:
        raise ConfigError("probe: one group of training clips; expected two or more, to train and to validate on")
    dealt = deal_groups(groups[learn], strata, parts, seed)
    for part in range(parts):
        held = dealt == part
        if multi:  # without a class that both sides have there is nothing to score
            trained, validated = (np.nansum(targets[learn[side]], 0) > 0 for side in (~held, held))
            usable = bool((trained & validated).any())
        else:  # a group with a class of its own stays, whole, with the training clips
            alone = held & ~np.isin(targets[learn], targets[learn[~held]])
            held &= ~np.isin(groups[learn], groups[learn[alone]])
            usable = bool(held.any())
        if usable:
            return np.sort(learn[held])
    raise ConfigError(
        "probe: no class has training clips in two groups, or each group has a class of its own; expected a group "
        "whose classes others have too, to hold out and validate on, or validation clips of the task's own, as the "
        "split valid of a clips.csv"
    )


def _resampled(groups: np.ndarray, seed: int) -> np.ndarray:
    """(N,) how often each clip of these groups stands in a resample of them, drawn whole, over the mean of it."""
    _, group = np.unique(groups, return_inverse=True)
    counts = resample(np.random.default_rng(seed), int(group.max()) + 1)[0, group]
    return counts / counts.mean()


def _sum(blocks: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, blocks)


def losses(logits: Tensor, goal: Tensor) -> Tensor:
    """(R, G) of G probes' logits (R, G, K) for goals (R,) int64, or (R, K) of 0, 1 and, where nobody knows, NaN."""
    if goal.ndim == 1:
        return logits.logsumexp(2) - logits.gather(2, goal[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]
    wanted = goal.nan_to_num()[:, None].expand_as(logits)
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return torch.where(goal.isnan()[:, None], 0.0, each).sum(2)


class Part:
    """The rows of some clips, clip by clip; `weight` (R, 1) is each one's share in the mean over the clips, or (R, S)
    where these count otherwise for each seed.

    `x` (R, r) features, as the probes see them; `clip` (R,); `share` (R,) float64 of the row's clip, on the CPU;
    `goal` (R,) int64, or (R, K), of the row's clip.
    """

    x: Tensor

    def __init__(self, clips: np.ndarray, rows: Rows, targets: Tensor, device: torch.device, dtype: torch.dtype):
        self.clips = np.ascontiguousarray(clips)
        where = np.flatnonzero(np.isin(rows.clip, clips))
        where = where[np.argsort(rows.clip[where], kind="stable")]
        self.rows, self.clip = torch.from_numpy(where), rows.clip[where]
        self.share = torch.from_numpy(rows.shares[where])
        self.weight = (self.share / self.share.sum()).to(device, dtype)[:, None]
        self.clip_of = self.clip  # of what is weighed
        goal = targets[torch.from_numpy(self.clip)]
        self.goal = goal.to(device, dtype) if targets.ndim == 2 else goal.to(device)

    def number(self, clip: np.ndarray) -> np.ndarray:
        """Where each of these clips stands among the part's, which need not be sorted."""
        order = np.argsort(self.clips)
        return order[np.searchsorted(self.clips, clip, sorter=order)]

    def weigh(self, counts: np.ndarray) -> None:
        """Have clips count as often as `counts` (N, S), of mean 1, says of each seed."""
        self.weight = self.weight * torch.from_numpy(counts[self.number(self.clip_of)]).to(self.weight)

    def shares(self, block: slice, g: int) -> Tensor:
        """The weights of some rows in each of G probes, which are by seed last."""
        return self.weight[block].repeat(1, g // self.weight.shape[1])


class FoldProbes:
    """The probes of a fold, of the seeds that share its validation clips. G = learning rates x decays x seeds, in this
    order. All that is fitted, means and axes too, is fitted to the training clips alone: to axes that validation clips
    helped to find, these fit better than any other clips, the more so the more columns there are to a row."""

    part = Part

    def __init__(
        self,
        rows: Rows,
        targets: np.ndarray,
        groups: np.ndarray,
        fold: Fold,
        n_classes: int,
        config: ProbeConfig,
        device: torch.device,
        dtype: torch.dtype,
        seeds: Sequence[int],
    ):
        self.config, self.n_classes, self.device, self.dtype, self.seeds = config, n_classes, device, dtype, seeds
        self.columns = n_classes  # of the weights
        self.multi = targets.ndim == 2
        self.targets = torch.from_numpy(targets)
        assert fold.valid is not None
        self.train, self.valid, self.test = (
            self.part(clips, rows, self.targets, device, dtype) for clips in (fold.train, fold.valid, fold.test)
        )
        if len(seeds) > 1 and config.batch is None:
            self.valid.weigh(np.stack([_resampled(groups[self.valid.clips], seed) for seed in seeds], 1))
        self._features(rows.values)

    def _features(self, values: Tensor) -> None:
        """Standardise, rotate to the training rows' principal axes, and scale to rows of unit length on average.

        With an L2 penalty the best weight is a combination of the rows trained on, so the rotation loses nothing: it
        leaves as many columns as there are rows, and uncorrelated ones, which Adam wants. The scale makes a learning
        rate mean the same for embeddings of every width; the penalty is that of the features before it.

        In float64, some rows at a time: a collection of short windows does not fit into memory several times. Fewer
        rows than columns are always together.
        """
        learn = self.train.rows
        n, width = len(learn), values.shape[1]
        scaled = self._standardise(values)
        wide = n < width
        gram = _sum(block @ block.T if wide else block.T @ block for block in scaled(learn))
        eigenvalues, vectors = torch.linalg.eigh(gram)
        kept = eigenvalues > eigenvalues[-1].clamp(min=1e-30) * _RANK**2
        self.basis = vectors[:, kept]
        if wide:
            self.basis = next(scaled(learn)).T @ (self.basis / eigenvalues[kept].sqrt())  # (D, r)
        self.size = (gram.trace() / n).sqrt().clamp(min=1e-30)
        self.basis = self.basis / self.size
        for part in (self.train, self.valid, self.test):
            rotated = (block @ self.basis for block in scaled(part.rows))
            part.x = self._together(rotated, len(part.rows), self.basis.shape[1])

    def _standardise(self, values: Tensor) -> Callable[[Tensor], Iterator[Tensor]]:
        """Take mean and scale from the training rows; returns rows -> them standardised, block by block, in float64."""
        n, width = len(self.train.rows), values.shape[1]
        step = max(width, _FEATURES // width)

        def blocks(which: Tensor) -> Iterator[Tensor]:
            return (values[rows].to(self.device, torch.float64) for rows in which.split(step))

        self.mean = values.new_zeros(width, dtype=torch.float64, device=self.device)
        self.scale = torch.ones_like(self.mean)
        if self.config.standardize:
            self.mean = _sum(block.sum(0) for block in blocks(self.train.rows)) / n
            spread = (_sum((block - self.mean).square().sum(0) for block in blocks(self.train.rows)) / n).sqrt()
            # A column that does not vary says nothing, and has no spread to divide by.
            self.scale = torch.where(spread > 1e-7 * (self.mean.abs() + 1e-30), 1 / spread, 0.0)
        return lambda which: ((block - self.mean) * self.scale for block in blocks(which))

    def _together(self, blocks: Iterable[Tensor], n: int, width: int) -> Tensor:
        out = torch.empty(n, width, dtype=self.dtype, device=self.device)
        start = 0
        for block in blocks:
            out[start : start + len(block)] = block
            start += len(block)
        return out

    def run(self, metric: str, progress: Callable[[float], None]) -> tuple[Tensor, ...]:
        """Of the fold what `Probed` has of it, in its order, seed by seed."""
        pairs = [(lr, decay) for lr in self.config.learning_rates for decay in self.config.decays]
        loss, weight, bias, untrained = self._train(pairs, progress)
        seeds = len(self.seeds)
        choice = loss.view(len(pairs), seeds).argmin(0)  # (S,)
        picked = choice * seeds + torch.arange(seeds, device=self.device)
        weight, bias = weight[:, picked], bias[picked]  # (r, S, K), (S, K)
        chosen = torch.tensor([pairs[i] for i in choice.tolist()], dtype=torch.float64, device="cpu")
        return (
            self._probabilities(self.test, weight, bias),
            loss[picked].cpu(),
            self._valid_scores(metric, weight, bias),
            chosen,
            untrained[picked].cpu(),
            self._given(weight, bias),
        )

    def _train(
        self, pairs: Sequence[tuple[float, float]], progress: Callable[[float], None]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each pair and seed the least validation loss (G,), the weight (r, G, K) and bias (G, K) of it, and whether
        these are as they were drawn (G,)."""
        c = self.config
        s, k, r = len(self.seeds), self.columns, self.train.x.shape[1]
        g = len(pairs) * s
        rate = torch.tensor([lr for lr, _ in pairs for _ in range(s)], device=self.device, dtype=self.dtype)
        decay = torch.tensor([d for _, d in pairs for _ in range(s)], device=self.device, dtype=self.dtype)
        drawn = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        first = [torch.randn(r, k, generator=one, dtype=torch.float64, device="cpu") for one in drawn]
        # Small beside what training makes of them: seeds differ, and none starts far from no opinion.
        weight = 0.01 * torch.stack(first, 1).to(self.device, self.dtype).repeat(1, len(pairs), 1)  # (r, G, K)
        bias = torch.zeros(g, k, device=self.device, dtype=self.dtype)
        state = [torch.zeros_like(t) for t in (weight, weight, bias, bias)]
        best_loss = torch.full((g,), torch.inf, device=self.device, dtype=self.dtype)
        best_weight, best_bias = weight.clone(), bias.clone()
        untrained = torch.ones(g, dtype=torch.bool, device=self.device)
        stale = 0
        for step in range(c.steps + 1):
            if step % c.check_every == 0 or step == c.steps:
                progress(step / c.steps)
                loss = self._loss(weight, bias)
                better = loss < best_loss
                best_loss = torch.where(better, loss, best_loss)
                untrained &= ~better | (step == 0)
                best_weight = torch.where(better[None, :, None], weight, best_weight)
                best_bias = torch.where(better[:, None], bias, best_bias)
                stale = 0 if better.any() else stale + 1
                if stale >= c.patience:
                    break
            if step == c.steps:
                break
            d_weight, d_bias = self._gradient(weight, bias)
            d_weight += (decay / float(self.size) ** 2)[:, None] * weight
            now = rate * (0.5 + 0.5 * np.cos(np.pi * step / c.steps))  # down to 0, so that the last steps settle
            for value, gradient, i in ((weight, d_weight, 0), (bias, d_bias, 2)):
                mean, square = state[i], state[i + 1]
                mean.lerp_(gradient, 0.1)
                square.lerp_(gradient.square(), 0.01)
                update = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
                value -= now[:, None] * update
        return best_loss, best_weight, best_bias, untrained

    def _logits(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.addmm(bias.flatten(), x, weight.flatten(1)).unflatten(1, bias.shape)  # (R, G, K)

    def _blocks(self, rows: int, g: int) -> list[slice]:
        step = max(1, CELLS // (g * self.columns))
        return [slice(i, i + step) for i in range(0, rows, step)]

    def _gradient(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Of the mean loss of a training clip, by every probe's weight and bias."""
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for block in self._blocks(len(self.train.x), len(bias)):
            x, goal = self.train.x[block], self.train.goal[block]
            logits = self._logits(x, weight, bias)
            if self.multi:
                slope = torch.where(goal.isnan()[:, None], 0.0, logits.sigmoid() - goal[:, None])
            else:
                slope = logits.softmax(2)
                slope -= F.one_hot(goal, self.n_classes)[:, None].to(slope.dtype)
            slope *= self.train.weight[block, :, None]
            d_weight += (x.T @ slope.flatten(1)).unflatten(1, bias.shape)
            d_bias += slope.sum(0)
        return d_weight, d_bias

    def _loss(self, weight: Tensor, bias: Tensor) -> Tensor:
        """(G,) mean loss of a validation clip, without the penalty."""
        loss = torch.zeros_like(bias[:, 0])
        for block in self._blocks(len(self.valid.x), len(bias)):
            logits = self._logits(self.valid.x[block], weight, bias)
            loss += (losses(logits, self.valid.goal[block]) * self.valid.shares(block, len(bias))).sum(0)
        return loss

    def _probabilities(self, part: Part, weight: Tensor, bias: Tensor) -> Tensor:
        """(S, N, K) float64, the mean over each clip's rows, in the order of the part's clips."""
        where = torch.from_numpy(part.number(part.clip))
        total = torch.zeros(len(part.clips), *bias.shape, dtype=torch.float64, device="cpu")
        for block in self._blocks(len(part.x), len(bias)):
            logits = self._logits(part.x[block], weight, bias).double()
            said = (logits.sigmoid() if self.multi else logits.softmax(2)).cpu()
            total.index_add_(0, where[block], said * part.share[block, None, None])
        return total.transpose(0, 1).contiguous()

    def _valid_scores(self, metric: str, weight: Tensor, bias: Tensor) -> Tensor:
        """(S,) each seed's score on the validation clips."""
        targets = self.targets[torch.from_numpy(self.valid.clips)]
        scores = self._probabilities(self.valid, weight, bias)
        return torch.cat([METRICS[metric](one, targets, one.new_ones(1, len(targets))) for one in scores])

    def _given(self, weight: Tensor, bias: Tensor) -> Tensor:
        """(S, D + 1, K) float64 for the features as they were given, bias last."""
        by_column = self._by_column(weight.double())
        shift = bias.double() - torch.einsum("d,sdk->sk", self.mean, by_column)
        return torch.cat([by_column, shift[:, None]], 1).cpu()

    def _by_column(self, weight: Tensor) -> Tensor:
        """(r, S, K) -> (S, D, K), for the features as they were given."""
        return torch.einsum("dr,rsk->sdk", self.basis, weight) * self.scale[:, None]
