"""The attentive probe: a learned query weighs a clip's windows, and the linear layer sees their weighted mean.

The query is one more column beside the classes: x @ weight gives a row's logits and, last, how much it counts. As the
layer is linear, the weighted mean of a clip's logits is the layer on the weighted mean of its rows. A row counts by the
audio that it saw, too: a query of zero, near which training starts, makes it the linear probe on the mean embedding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .linear import CELLS, FoldProbes, losses


class AttentiveFold(FoldProbes):
    """All attentive probes of one fold; see `FoldProbes`."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.columns = self.n_classes + 1
        order = np.argsort(self.clip, kind="stable")  # a clip's rows stand together
        rows = torch.from_numpy(order).to(self.device)
        self.clip, self.learn, self.share = self.clip[order], self.learn[rows], self.share[rows]
        _, first, place, sizes = np.unique(self.clip, return_index=True, return_inverse=True, return_counts=True)
        self.first, self.sizes, self.place = first, sizes, torch.from_numpy(place).to(self.device)  # (C,), (C,), (R,)
        firsts = rows[torch.from_numpy(first).to(self.device)]
        self.training, self.goal = self.training[firsts], self.goal[firsts]  # of the clips: (C, S), (C, [K])

    def _pool(self, x: Tensor, share: Tensor, place: Tensor, n: int, weight: Tensor, bias: Tensor) -> Tensor:
        """Rows (R, r) of the clips `place` (R,), `share` (R,) of which they are -> logits (n, G, K)."""
        found = self._logits(x, weight, bias)  # (R, G, K + 1)
        logits, counts = found[..., :-1], found[..., -1] + share.log()[:, None]
        peak = counts.detach().new_full((n, counts.shape[1]), -torch.inf)  # so that no exponential overflows
        peak = peak.scatter_reduce(0, place[:, None].expand_as(counts), counts.detach(), "amax")
        part = (counts - peak[place]).exp()
        part = part / part.new_zeros(peak.shape).index_add(0, place, part)[place]  # (R, G)
        return logits.new_zeros(n, *logits.shape[1:]).index_add(0, place, part[..., None] * logits)

    def _clip_blocks(self, g: int) -> list[slice]:
        """Clips whose rows' logits are held at a time; autograd holds them about four times."""
        most = max(int(self.sizes.max()), CELLS // (4 * g * self.columns))
        blocks, start = [], 0
        while start < len(self.first):
            end = max(start + 1, int(np.searchsorted(self.first + self.sizes, self.first[start] + most, side="right")))
            blocks.append(slice(start, end))
            start = end
        return blocks

    def _sum(self, weight: Tensor, bias: Tensor, part: Tensor, block: slice) -> Tensor:
        """(G,) the block's losses of a clip, each times its `part` (C, G)."""
        first = int(self.first[block.start])
        rows = slice(first, int(self.first[block.stop - 1] + self.sizes[block.stop - 1]))
        n = block.stop - block.start
        logits = self._pool(self.learn[rows], self.share[rows], self.place[rows] - block.start, n, weight, bias)
        return (losses(logits, self.goal[block]) * part[block]).sum(0)

    def _gradient(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        part = self._parts(self.training.to(self.dtype), len(bias))
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        with torch.enable_grad():
            given = (weight.detach().requires_grad_(), bias.detach().requires_grad_())
            for block in self._clip_blocks(len(bias)):
                found = torch.autograd.grad(self._sum(*given, part, block).sum(), given)
                d_weight += found[0]
                d_bias += found[1]
        return d_weight, d_bias

    def _loss(self, weight: Tensor, bias: Tensor) -> Tensor:
        part = self._parts((~self.training).to(self.dtype), len(bias))
        return torch.stack([self._sum(weight, bias, part, block) for block in self._clip_blocks(len(bias))]).sum(0)

    def _probabilities(
        self, x: Tensor, clip: np.ndarray, share: Tensor, wanted: np.ndarray, weight: Tensor, bias: Tensor
    ) -> Tensor:
        order = np.argsort(wanted)
        where = torch.from_numpy(order[np.searchsorted(wanted, clip, sorter=order)]).to(x.device)
        logits = self._pool(x, share.to(x), where, len(wanted), weight, bias).double()
        return (logits.sigmoid() if self.multi else logits.softmax(2)).cpu().transpose(0, 1).contiguous()
