"""The probe as papers train it: shuffled batches, Adam at a constant learning rate, until the validation loss rises.

The grid of `FoldProbes` takes steps on all clips at once. As papers: those of MATPAC's and M2D's tables.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .linear import CELLS, FoldProbes, Part, losses


class BatchedFold(FoldProbes):
    """All probes of one fold, one after the other, each a linear layer with the initial weights of nn.Linear.

    A batch is of rows; a row of a clip of several counts by its share of the clip. `steps`, `check_every` and
    `patience` are in passes over the training rows, each in an order of its own.
    """

    def _features(self, values: Tensor) -> None:
        """Standardised, and no more: Adam's way depends on the axes, and the papers' are those of the embedding."""
        scaled = self._standardise(values)
        for part in (self.train, self.valid, self.test):
            part.x = self._together(scaled(part.rows), len(part.rows), values.shape[1])

    def _train(
        self, pairs: Sequence[tuple[float, float]], progress: Callable[[float], None]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found, of = [], len(pairs) * len(self.seeds)
        for rate, decay in pairs:
            for seed in self.seeds:
                told = lambda share, done=len(found): progress((done + share) / of)  # noqa: E731
                found.append(self._one(seed, rate, decay, told))
        losses, weights, biases, passes = zip(*found, strict=True)
        untrained = torch.tensor(passes, device=self.device) == 0
        return torch.stack(losses), torch.stack(weights, 1), torch.stack(biases), untrained

    @torch.enable_grad()
    def _one(
        self, seed: int, rate: float, decay: float, progress: Callable[[float], None]
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """The least validation loss (), the weight (D, K) and bias (K,) that had it, and after how many passes."""
        c, generator = self.config, torch.Generator().manual_seed(seed)
        assert c.batch is not None
        width, n = self.train.x.shape[1], len(self.train.x)
        drawn = torch.rand(width + 1, self.columns, generator=generator, dtype=torch.float64, device="cpu")
        first = ((2 * drawn - 1) / width**0.5).to(self.device, self.dtype)
        weight, bias = first[:-1].clone().requires_grad_(), first[-1].clone().requires_grad_()
        optimizer = torch.optim.Adam([weight, bias], lr=rate, weight_decay=decay)
        held = torch.arange(len(self.valid.x), device=self.device)
        best = (torch.full_like(bias[0].detach(), torch.inf), weight.detach(), bias.detach(), 0)
        stale = 0
        for step in range(c.steps + 1):
            if step % c.check_every == 0 or step == c.steps:
                progress(step / c.steps)
                with torch.no_grad():
                    loss = self._mean(self.valid, held, weight, bias)
                better = bool(loss < best[0])
                best = (loss, weight.detach().clone(), bias.detach().clone(), step) if better else best
                stale = 0 if better else stale + 1
                if stale >= c.patience:
                    break
            if step == c.steps:
                break
            order = torch.randperm(n, generator=generator, device="cpu").to(self.device)
            for rows in order.split(c.batch):
                optimizer.zero_grad()
                # A batch stands for all rows: of a pass, the mean of these gradients is that of the mean clip.
                (self._mean(self.train, rows, weight, bias) * (n / len(rows))).backward()
                # Before 2.13 torch counts its steps on the application's default device.
                with contextlib.nullcontext() if optimizer.state else torch.device("cpu"):
                    optimizer.step()
        return best

    def _mean(self, part: Part, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What some rows of a part add to the mean loss of its clips."""
        loss = weight.new_zeros(())
        for some in rows.split(max(1, CELLS // self.columns)):
            logits = torch.addmm(bias, part.x[some], weight)
            loss = loss + (losses(logits[:, None], part.goal[some]) * part.weight[some]).sum()
        return loss

    def _by_column(self, weight: Tensor) -> Tensor:
        return (weight * self.scale[:, None, None]).transpose(0, 1)  # (S, D, K)
