"""mask_shuffle: which patches are visible, as a pure function of (seed, step, index)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._check import check_tensor


def mask_shuffle(seed: int, step: int, index: Tensor, n_tokens: int) -> Tensor:
    """Random permutations of the tokens: (B,) int64 sample indices -> (B, n_tokens) int64."""
    check_tensor("mask_shuffle", "index", index, ndim=1, dtypes=(torch.int64,))
    if n_tokens < 1:
        raise ValueError(f"mask_shuffle: n_tokens is {n_tokens}; expected at least 1")
    return reference.mask_shuffle(seed, step, index, n_tokens)
