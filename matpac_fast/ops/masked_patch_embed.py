"""masked_patch_embed: spectrogram and shuffle -> the student's and the teacher's tokens."""

from __future__ import annotations

from torch import Tensor

from .. import reference


def masked_patch_embed(
    spec: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor, ids_shuffle: Tensor, n_visible: int
) -> tuple[Tensor, Tensor]:
    """visible (B, 1 + V, D) and masked (B, 1 + M, D), position and CLS included."""
    return reference.masked_patch_embed(spec, weight, bias, pos, cls, ids_shuffle, n_visible)
