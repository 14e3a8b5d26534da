"""timm's transformer block in plain torch, for the official code: nothing of matpac_fast, so that no kernel of ours
speeds up what ours are compared with.

Of a current timm, whose attention is fused, and of 0.4.12, which the official package pins, whose attention stores the
scores. Dropout and what else the official sizes leave out do nothing there and are left out here.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, fused: bool):
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """The arguments are timm's, of which the official code gives these."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int, qkv_bias: bool, norm_layer: Any, fused: bool = True):
        super().__init__()
        assert qkv_bias, "the official code always has it"
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, fused)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, mlp_ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
