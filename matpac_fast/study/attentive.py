"""The attentive probe: a learned query weighs a clip's windows, and the linear layer sees their weighted mean.

The query is one more column beside the classes: x @ weight gives a row's logits and, last, how much it counts. As the
layer is linear, the weighted mean of a clip's logits is the layer on the weighted mean of its rows. A row counts by the
audio that it saw, too: a query of zero, near which training starts, makes it the linear probe on the mean embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .linear import CELLS, FoldProbes, Part, losses


class Clips(Part):
    """A part that knows of each clip its `first` row (C,) and its `sizes` (C,), and of each row the `place` (R,) of its
    clip among those C; `goal` and `weight` are of the clips."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        _, first, place, sizes = np.unique(self.clip, return_index=True, return_inverse=True, return_counts=True)
        self.first, self.sizes, self.place = first, sizes, torch.from_numpy(place).to(self.goal.device)
        self.goal = self.goal[torch.from_numpy(first).to(self.goal.device)]  # (C, [K])
        self.clip_of = self.clip[first]
        self.weight = torch.full_like(self.weight[: len(first)], 1 / len(first))  # (C, 1)
        self.log_share = self.share.log().to(self.weight)[:, None]  # (R, 1)

    def blocks(self, rows: int) -> list[slice]:
        """Clips that have so many rows at most, but one at least."""
        most = max(int(self.sizes.max()), rows)
        blocks, start = [], 0
        while start < len(self.first):
            end = max(start + 1, int(np.searchsorted(self.first + self.sizes, self.first[start] + most, side="right")))
            blocks.append(slice(start, end))
            start = end
        return blocks


class AttentiveFold(FoldProbes):
    """All attentive probes of one fold; see `FoldProbes`."""

    part = Clips
    train: Clips  # pyright: ignore[reportIncompatibleVariableOverride]
    valid: Clips  # pyright: ignore[reportIncompatibleVariableOverride]
    test: Clips  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.columns = self.n_classes + 1

    def _pool(self, part: Clips, block: slice, weight: Tensor, bias: Tensor) -> Tensor:
        """Logits (n, G, K) of the n clips of a block of `part`."""
        first, last = int(part.first[block.start]), block.stop - 1
        rows = slice(first, int(part.first[last] + part.sizes[last]))
        found = self._logits(part.x[rows], weight, bias)  # (R, G, K + 1)
        place, n = part.place[rows] - block.start, block.stop - block.start
        logits, counts = found[..., :-1], found[..., -1] + part.log_share[rows]
        peak = counts.detach().new_full((n, counts.shape[1]), -torch.inf)  # so that no exponential overflows
        peak = peak.scatter_reduce(0, place[:, None].expand_as(counts), counts.detach(), "amax")
        shares = (counts - peak[place]).exp()
        shares = shares / shares.new_zeros(peak.shape).index_add(0, place, shares)[place]  # (R, G)
        return logits.new_zeros(n, *logits.shape[1:]).index_add(0, place, shares[..., None] * logits)

    def _sums(self, part: Clips, weight: Tensor, bias: Tensor) -> Iterator[Tensor]:
        """(G,) of each block of clips the share in the mean loss of a clip; autograd holds its logits four times."""
        for block in part.blocks(CELLS // (4 * len(bias) * self.columns)):
            found = losses(self._pool(part, block, weight, bias), part.goal[block])
            yield (found * part.shares(block, len(bias))).sum(0)

    def _gradient(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        with torch.enable_grad():
            given = (weight.detach().requires_grad_(), bias.detach().requires_grad_())
            for loss in self._sums(self.train, *given):
                found = torch.autograd.grad(loss.sum(), given)
                d_weight += found[0]
                d_bias += found[1]
        return d_weight, d_bias

    def _loss(self, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.stack(list(self._sums(self.valid, weight, bias))).sum(0)

    def _probabilities(self, part: Clips, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        said = []
        for block in part.blocks(CELLS // (4 * len(bias) * self.columns)):
            logits = self._pool(part, block, weight, bias).double()
            said.append((logits.sigmoid() if self.multi else logits.softmax(2)).cpu())
        order = torch.from_numpy(np.searchsorted(part.clip_of, part.clips))  # from that of the rows to that asked for
        return torch.cat(said)[order].transpose(0, 1).contiguous()
