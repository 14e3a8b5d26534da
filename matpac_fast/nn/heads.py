"""The classification head: an MLP onto the unit sphere, and the prototypes that its points are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .linear import is_plain, linear, linear_gelu


class Prototypes(nn.Module):
    """K weight-normed directions, stored as the official `weight_g` (K, 1) and `weight_v` (K, d)."""

    def __init__(self, width: int, prototypes: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(prototypes, width))
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)

    def matrix(self) -> Tensor:
        """(K, d): each row of `weight_v` scaled to the length in `weight_g`."""
        return self.weight_g * F.normalize(self.weight_v, dim=1, eps=0.0)


class ClassificationHead(nn.Module):
    """MLP D -> hidden -> hidden -> bottleneck with GELU, L2 norm, then prototypes (DINO's head, 2104.14294)."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.last_layer = Prototypes(bottleneck, prototypes)

    def forward(self, x: Tensor) -> Tensor:
        """Latents (..., D) -> unit features (..., bottleneck), to be multiplied with `last_layer.matrix()`."""
        gelus = [layer for layer in self.mlp if is_plain(layer, nn.GELU) and layer.approximate == "none"]
        if len(self.mlp) == 5 and gelus == [self.mlp[1], self.mlp[3]] and is_plain(self.mlp, nn.Sequential):
            first, _, second, _, last = self.mlp
            x = linear(last, linear_gelu(second, linear_gelu(first, x)))  # pyright: ignore[reportArgumentType]
        else:  # somebody has changed it
            x = self.mlp(x)
        return F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
