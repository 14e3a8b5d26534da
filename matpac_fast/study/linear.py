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
from .metrics import METRICS
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
    a loop, since their features are standardised and rotated each by its own training clips; the grid and the seeds are
    one product. Single-label: softmax cross-entropy; multi-label: sigmoid cross-entropy over the known labels.

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
    parts = [part for fold in folds for part in (fold.train, fold.valid, fold.test) if part is not None]
    used = np.unique(np.concatenate(parts))
    if len(lacking := used[per_clip[used] == 0]):
        raise ConfigError(
            f"probe: {len(lacking)} of {len(used)} clips have no embedding, such as clip {lacking[0]}; "
            "expected one or more of each"
        )
    n, width = rows.values.shape
    if config.batch is None:
        work = n * min(n, width) * len(config.learning_rates) * len(config.decays) * config.seeds * n_classes
    else:  # one probe after the other
        work = min(n, config.batch) * width * n_classes
    found = []
    with one_thread() if work < _SHARED else contextlib.nullcontext():
        for i, fold in enumerate(folds):
            probes = kind(rows, targets, groups, fold, n_classes, config, torch.device(device), dtype)
            found.append(probes.run(metric, lambda share, done=i: progress((done + share) / len(folds))))
    scores, *others, weights = zip(*found, strict=True)
    return Probed(list(scores), *map(torch.stack, others), weights=list(weights))


def _sum(blocks: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, blocks)


def losses(logits: Tensor, goal: Tensor) -> Tensor:
    """(R, G) of G probes' logits (R, G, K) for goals (R,) int64, or (R, K) of 0, 1 and, where nobody knows, NaN."""
    if goal.ndim == 1:
        return logits.logsumexp(2) - logits.gather(2, goal[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]
    wanted = goal.nan_to_num()[:, None].expand_as(logits)
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return torch.where(goal.isnan()[:, None], 0.0, each).sum(2)


class FoldProbes:
    """All probes of one fold. G = learning rates x decays x seeds, in this order."""

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
    ):
        self.config, self.n_classes, self.device, self.dtype = config, n_classes, device, dtype
        self.columns = n_classes  # of the weights
        self.multi = targets.ndim == 2
        self.targets = torch.from_numpy(targets)
        learn = fold.train if fold.valid is None else np.concatenate([fold.train, fold.valid])
        self.valid_of = [self._validation(fold, learn, groups, targets, seed) for seed in range(config.seeds)]
        learn_rows, test_rows = (np.flatnonzero(np.isin(rows.clip, part)) for part in (learn, fold.test))
        self.clip, self.test_clip, self.test = rows.clip[learn_rows], rows.clip[test_rows], fold.test
        self._features(rows.values, torch.from_numpy(learn_rows), torch.from_numpy(test_rows))
        shares = torch.from_numpy(rows.shares())
        self.share, self.test_share = shares[learn_rows].to(device, dtype), shares[test_rows]  # (R,) of its clip
        masks = np.stack([~np.isin(self.clip, valid) for valid in self.valid_of], 1)
        self.training = torch.from_numpy(masks).to(device)  # (R, S)
        self.goal = self._goal(self.clip)  # (R, K) or (R,)

    def _validation(
        self, fold: Fold, learn: np.ndarray, groups: np.ndarray, targets: np.ndarray, seed: int
    ) -> np.ndarray:
        """The validation clips, sorted: the task's, or some that the seed draws."""
        if fold.valid is not None:
            return np.sort(fold.valid)
        strata = targets[learn] if not self.multi else np.nan_to_num(targets[learn]).argmax(1)
        parts = min(_HELD_OUT, len(np.unique(groups[learn])))
        if parts < 2:
            raise ConfigError("probe: one group of training clips; expected two or more, to train and to validate on")
        dealt = deal_groups(groups[learn], strata, parts, seed)
        for part in range(parts):
            held = dealt == part
            if self.multi:  # without a class that both sides have there is nothing to score
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

    def _features(self, values: Tensor, learn: Tensor, test: Tensor) -> None:
        """Standardise, rotate to the learning rows' principal axes, and scale to rows of unit length on average.

        With an L2 penalty the best weight is a combination of the rows learnt from, so the rotation loses nothing: it
        leaves as many columns as there are rows, and uncorrelated ones, which Adam wants. The scale makes a learning
        rate mean the same for embeddings of every width; the penalty is that of the features before it.

        values (R, D), of which `learn` and `test` are rows. In float64, some rows at a time: a collection of short
        windows does not fit into memory several times. Fewer rows than columns are always together.
        """
        n, width = len(learn), values.shape[1]
        scaled = self._standardise(values, learn)
        wide = n < width
        gram = _sum(block @ block.T if wide else block.T @ block for block in scaled(learn))
        eigenvalues, vectors = torch.linalg.eigh(gram)
        kept = eigenvalues > eigenvalues[-1].clamp(min=1e-30) * _RANK**2
        self.basis = vectors[:, kept]
        if wide:
            self.basis = next(scaled(learn)).T @ (self.basis / eigenvalues[kept].sqrt())  # (D, r)
        self.size = (gram.trace() / n).sqrt().clamp(min=1e-30)
        self.basis = self.basis / self.size

        self.learn, self.tested = (
            self._together((block @ self.basis for block in scaled(which)), len(which), self.basis.shape[1])
            for which in (learn, test)
        )

    def _standardise(self, values: Tensor, learn: Tensor) -> Callable[[Tensor], Iterator[Tensor]]:
        """Take mean and scale from the rows `learn`; returns rows -> them standardised, block by block, in float64."""
        n, width = len(learn), values.shape[1]
        step = max(width, _FEATURES // width)

        def blocks(which: Tensor) -> Iterator[Tensor]:
            return (values[rows].to(self.device, torch.float64) for rows in which.split(step))

        self.mean = values.new_zeros(width, dtype=torch.float64, device=self.device)
        self.scale = torch.ones_like(self.mean)
        if self.config.standardize:
            self.mean = _sum(block.sum(0) for block in blocks(learn)) / n
            spread = (_sum((block - self.mean).square().sum(0) for block in blocks(learn)) / n).sqrt()
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

    def _goal(self, clip: np.ndarray) -> Tensor:
        goal = self.targets[torch.from_numpy(clip)]
        return goal.to(self.device, self.dtype) if self.multi else goal.to(self.device)

    def run(self, metric: str, progress: Callable[[float], None]) -> tuple[Tensor, ...]:
        """Of the fold what `Probed` has of it, in its order."""
        pairs = [(lr, decay) for lr in self.config.learning_rates for decay in self.config.decays]
        loss, weight, bias, untrained = self._train(pairs, progress)
        seeds = self.config.seeds
        choice = loss.view(len(pairs), seeds).argmin(0)  # (S,)
        picked = choice * seeds + torch.arange(seeds, device=self.device)
        if n := int(untrained[picked].sum()):
            rates = self.config.learning_rates
            at = f"learning rate{'s' if len(rates) > 1 else ''} {', '.join(f'{rate:g}' for rate in rates)}"
            warnings.warn(
                f"probe: no step lowered the validation loss at {at} for {n} of {seeds} seed{'s' * (seeds > 1)}, whose "
                "scores are those of untrained weights, as they were drawn; try smaller learning rates, such as "
                f"{min(rates) / 10:g}, or larger decays",
                stacklevel=2,
            )
        weight, bias = weight[:, picked], bias[picked]  # (r, S, K), (S, K)
        chosen = torch.tensor([pairs[i] for i in choice.tolist()], dtype=torch.float64, device="cpu")
        scores = self._probabilities(self.tested, self.test_clip, self.test_share, self.test, weight, bias)
        return (
            scores,
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
        s, k, r = c.seeds, self.columns, self.learn.shape[1]
        g = len(pairs) * s
        rate = torch.tensor([lr for lr, _ in pairs for _ in range(s)], device=self.device, dtype=self.dtype)
        decay = torch.tensor([d for _, d in pairs for _ in range(s)], device=self.device, dtype=self.dtype)
        drawn = [torch.Generator().manual_seed(seed) for seed in range(s)]
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

    def _parts(self, counts: Tensor, n: int) -> Tensor:
        """What each row or clip counts for each seed (R, S) -> (R, n) its shares in the mean over them."""
        return (counts / counts.sum(0)).repeat(1, n // self.config.seeds)

    def _gradient(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Of the mean loss of a training clip, by every probe's weight and bias."""
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        part = self._parts(self.share[:, None] * self.training, len(bias))  # (R, G)
        for block in self._blocks(len(self.learn), len(bias)):
            x, goal = self.learn[block], self.goal[block]
            logits = self._logits(x, weight, bias)
            if self.multi:
                slope = torch.where(goal.isnan()[:, None], 0.0, logits.sigmoid() - goal[:, None])
            else:
                slope = logits.softmax(2)
                slope -= F.one_hot(goal, self.n_classes)[:, None].to(slope.dtype)
            slope *= part[block, :, None]
            d_weight += (x.T @ slope.flatten(1)).unflatten(1, bias.shape)
            d_bias += slope.sum(0)
        return d_weight, d_bias

    def _loss(self, weight: Tensor, bias: Tensor) -> Tensor:
        """(G,) mean loss of a validation clip, without the penalty."""
        held = self._parts(self.share[:, None] * ~self.training, len(bias))  # (R, G)
        loss = torch.zeros_like(bias[:, 0])
        for block in self._blocks(len(self.learn), len(bias)):
            used = (held[block] > 0).any(1)
            logits = self._logits(self.learn[block][used], weight, bias)
            loss += (losses(logits, self.goal[block][used]) * held[block][used]).sum(0)
        return loss

    def _probabilities(
        self, x: Tensor, clip: np.ndarray, share: Tensor, wanted: np.ndarray, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """(S, N, K) float64, the mean over each wanted clip's rows, in the order of `wanted`."""
        order = np.argsort(wanted)
        where = torch.from_numpy(order[np.searchsorted(wanted, clip, sorter=order)])
        total = torch.zeros(len(wanted), *bias.shape, dtype=torch.float64, device="cpu")
        for block in self._blocks(len(x), len(bias)):
            logits = self._logits(x[block], weight, bias).double()
            said = (logits.sigmoid() if self.multi else logits.softmax(2)).cpu()
            total.index_add_(0, where[block], said * share[block, None, None].to(said))
        return total.transpose(0, 1).contiguous()

    def _valid_scores(self, metric: str, weight: Tensor, bias: Tensor) -> Tensor:
        """(S,) each seed's score on its validation clips."""
        found = []
        for seed, valid in enumerate(self.valid_of):
            rows = np.flatnonzero(np.isin(self.clip, valid))
            one = slice(seed, seed + 1)
            share = self.share[torch.from_numpy(rows).to(self.share.device)]
            p = self._probabilities(self.learn[rows], self.clip[rows], share, valid, weight[:, one], bias[one])[0]
            found.append(METRICS[metric](p, self.targets[torch.from_numpy(valid)], p.new_ones(1, len(valid))))
        return torch.cat(found)

    def _given(self, weight: Tensor, bias: Tensor) -> Tensor:
        """(S, D + 1, K) float64 for the features as they were given, bias last."""
        by_column = self._by_column(weight.double())
        shift = bias.double() - torch.einsum("d,sdk->sk", self.mean, by_column)
        return torch.cat([by_column, shift[:, None]], 1).cpu()

    def _by_column(self, weight: Tensor) -> Tensor:
        """(r, S, K) -> (S, D, K), for the features as they were given."""
        return torch.einsum("dr,rsk->sdk", self.basis, weight) * self.scale[:, None]
