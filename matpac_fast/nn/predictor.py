"""Predictor: from the visible tokens' latents to a guess of the teacher's latents of the masked ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .linear import linear
from .vit import Block, init_weights, shorten_positions, sincos_positions, through


class Predictor(nn.Module):
    """Linear D -> P, mask tokens, positions, blocks of width P, LayerNorm and Linear P -> D (or MCL heads).

    The official predictor restores the patches' order, runs its blocks and shuffles again. A transformer does not see
    the order of its tokens, only their positions: here the tokens stay shuffled, visible first, and the *positions* are
    gathered instead. So no inverse permutation is needed, the masked tokens are a slice, and the last block takes
    its queries and its MLP from that slice only: nothing else of its output is read.

    Args:
        width, out_width: P and D.
        depth, num_heads, mlp_ratio: of the blocks.
        freq, time: patches along each axis of the longest input.
        mcl_heads: 0 for MATPAC's one output; H parallel outputs for MATPAC++ (multiple choice learning).
    """

    def __init__(
        self,
        width: int,
        out_width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: int,
        freq: int,
        time: int,
        mcl_heads: int,
    ):
        super().__init__()
        self.freq = freq
        self.embed = nn.Linear(out_width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(width, freq, time))
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, out_width)
        self.mcl_heads = nn.ModuleList(nn.Linear(width, out_width) for _ in range(mcl_heads))
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(init_weights)
        if mcl_heads:
            # Official MATPAC++ checkpoints carry this layer and never use it; kept, so that they go out as they came.
            self.out.requires_grad_(False)

    pos_embed: Tensor

    def forward(self, visible: Tensor, ids_shuffle: Tensor) -> Tensor:
        """Latents (B, 1 + V, D), shuffle (B, N) -> predictions (B, M, D), or (B, M, H, D) with MCL heads.

        Row m is the prediction for token `ids_shuffle[:, V + m]`.
        """
        n = ids_shuffle.shape[1]
        v = visible.shape[1] - 1
        pos = shorten_positions(self.pos_embed, self.freq, n // self.freq, self.mask_token)
        shuffled_pos = pos[0, 1:][ids_shuffle]  # (B, N, P)
        x = linear(self.embed, visible)
        seen = x[:, 1:] + shuffled_pos[:, :v]
        hidden = self.mask_token + shuffled_pos[:, v:]
        x = torch.cat([x[:, :1] + pos[:, :1], seen, hidden], dim=1)  # (B, 1 + N, P)
        x = through(self.blocks, self.norm, x, first_query=1 + v)  # (B, M, P)
        if not self.mcl_heads:
            return linear(self.out, x)
        return torch.stack([linear(head, x) for head in self.mcl_heads], dim=2)  # pyright: ignore[reportArgumentType]
