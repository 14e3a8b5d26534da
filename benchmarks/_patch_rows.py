"""A rival of masked_patch_embed's forward kernel: a program per block of rows, whose patches are gathered once.

The kernel in the package gathers them anew for each block of columns. Only for patches of 16 x 16, and not yet measured
on a GPU: benchmarks/tune.py does.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from matpac_fast.kernels.masked_patch_embed import _dot, _patch_corners

CANDIDATES = [
    {"BLOCK_M": m, "BLOCK_N": n, "SPLIT": split, "num_warps": warps, "num_stages": stages}
    for m, n, split, warps, stages in (
        (64, 64, 1, 4, 2),
        (64, 64, 1, 4, 1),
        (64, 64, 2, 4, 2),
        (64, 64, 3, 4, 1),
        (64, 64, 6, 4, 1),
        (64, 128, 1, 4, 2),
        (64, 128, 3, 4, 1),
        (64, 128, 1, 8, 2),
        (128, 64, 1, 8, 2),
    )
]


@triton.jit
def patch_rows_kernel(
    spec, weight, bias, pos, cls, ids, visible, masked,
    n_rows, n_patches, n_visible, n_ids, grid_time, width, stride_b, stride_f,
    PATCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, AREA: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """SPLIT programs share the columns of a block of rows."""
    row = tl.program_id(0) // SPLIT * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < n_rows
    sample, place = row // (n_ids + 2), row % (n_ids + 2)
    is_visible = place <= n_visible
    is_cls = (place == 0) | (place == n_visible + 1)
    position = tl.where(is_visible, place - 1, place - 2)
    corner, patch_id, found = _patch_corners(
        ids, sample, position, in_rows & (is_cls == 0), n_patches, grid_time, stride_b, stride_f, n_ids, PATCH
    )
    known = found | (in_rows & is_cls)
    token_row = tl.where(is_cls, 0, 1 + patch_id)
    k = tl.arange(0, AREA)
    in_patch = ((k // PATCH) * stride_f + k % PATCH)[None, :]
    a = tl.load(spec + corner[:, None] + in_patch, mask=found[:, None], other=0.0).to(weight.dtype.element_ty)
    out = tl.where(
        is_visible,
        visible + (sample * (1 + n_visible) + place) * width,
        masked + (sample * (1 + n_ids - n_visible) + place - n_visible - 1) * width,
    )
    for start in range(tl.program_id(0) % SPLIT * BLOCK_N, width, SPLIT * BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        in_width = column < width
        b = tl.load(weight + column[None, :] * AREA + k[:, None], mask=in_width[None, :], other=0.0)
        at = pos + token_row[:, None] * width + column[None, :]
        acc = tl.load(at, mask=known[:, None] & in_width[None, :], other=0.0).to(tl.float32)
        bias_row = tl.load(bias + column, mask=in_width, other=0.0).to(tl.float32)
        cls_row = tl.load(cls + column, mask=in_width, other=0.0).to(tl.float32)
        acc += tl.where(is_cls[:, None], cls_row[None, :], bias_row[None, :])
        acc = _dot(a, b, tl.where(known[:, None], acc, float("nan")))
        mask = in_rows[:, None] & in_width[None, :]
        tl.store(out[:, None] + column[None, :], acc.to(visible.dtype.element_ty), mask=mask)


def masked_patch_embed(
    spec: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls: Tensor,
    ids_shuffle: Tensor,
    n_visible: int,
    dtype: torch.dtype,
    options: dict[str, int],
) -> tuple[Tensor, Tensor]:
    """As kernels/masked_patch_embed.py's, for batches whose offsets fit into 32 bits."""
    (batch, n_ids), (width, patch) = ids_shuffle.shape, (weight.shape[0], weight.shape[-1])
    freq, time = spec.shape[1] // patch, spec.shape[2] // patch
    visible = spec.new_empty((batch, 1 + n_visible, width))
    masked = spec.new_empty((batch, 1 + n_ids - n_visible, width))
    rows = batch * (n_ids + 2)
    patch_rows_kernel[(triton.cdiv(rows, options["BLOCK_M"]) * options["SPLIT"],)](
        spec, weight.to(dtype), bias, pos, cls, ids_shuffle, visible, masked,
        rows, freq * time, n_visible, n_ids, time, width, spec.stride(0), spec.stride(1),
        PATCH=patch, AREA=patch * patch, **options,
    )  # fmt: skip
    return visible, masked
