"""Frontend: a log-mel becomes tokens with positions; the student's parameters, which the teacher shares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..reference import hand_out, patches
from .linear import is_plain
from .vit import shorten_positions, sincos_positions


class PatchEmbed(nn.Module):
    """The patch projection, kept as the convolution `proj` whose shape official weights have: (D, 1, p, p)."""

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(1, width, patch_size, stride=patch_size)


class Frontend(nn.Module):
    """Patch embedding, CLS token and fixed positions.

    Args:
        width: channels D of a token.
        patch_size: side p of a square patch, in mels and frames.
        freq, time: patches along each axis of the longest input.
    """

    def __init__(self, width: int, patch_size: int, freq: int, time: int):
        super().__init__()
        self.patch_size, self.freq, self.time = patch_size, freq, time
        self.patch_embed = PatchEmbed(width, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(width, freq, time))
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)

    pos_embed: Tensor

    def split(self, spec: Tensor, ids_shuffle: Tensor, n_visible: int) -> tuple[Tensor, Tensor]:
        """(B, F, T) -> visible (B, 1 + V, D) for the student; masked (B, 1 + M, D), no gradient, for the teacher."""
        proj = self.patch_embed.proj
        if not is_plain(proj, nn.Conv2d) or proj.bias is None:
            head, tokens = self(spec).split([1, ids_shuffle.shape[1]], dim=1)
            return hand_out(head, tokens, ids_shuffle, n_visible)
        pos = shorten_positions(self.pos_embed, self.freq, spec.shape[-1] // self.patch_size, self.cls_token)
        return ops.masked_patch_embed(spec, proj.weight, proj.bias, pos, self.cls_token, ids_shuffle, n_visible)

    def forward(self, spec: Tensor) -> Tensor:
        """(B, F, T) with T a multiple of the patch size -> every token and CLS, (B, 1 + N, D), frequency-major."""
        proj = self.patch_embed.proj
        if is_plain(proj, nn.Conv2d):
            # As a product: cuDNN runs a float32 convolution in TF32, ten bits, unless it is told not to.
            tokens = F.linear(patches(spec, self.patch_size), proj.weight.flatten(1), proj.bias)  # (B, N, D)
        else:  # wrapped, as LoRA does, pruned or hooked
            tokens = proj(spec[:, None]).flatten(2).transpose(1, 2)
        pos = shorten_positions(self.pos_embed, self.freq, spec.shape[-1] // self.patch_size, self.cls_token)
        cls = (self.cls_token + pos[:, :1]).expand(spec.shape[0], -1, -1)
        return torch.cat([cls, tokens + pos[:, 1:]], dim=1)
