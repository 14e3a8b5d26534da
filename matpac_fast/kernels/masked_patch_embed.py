"""masked_patch_embed in Triton: a matrix product whose rows are gathered patches, everything else in its epilogue.

The rows of the product are B samples of N + 2 tokens: the visible ones behind a CLS row, then the masked ones behind
another. A CLS row has an empty patch, so that no second kernel has to write it.
"""

# Triton wraps what is passed as a constexpr.
# pyright: reportArgumentType=false

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import Launch

# Near float32 on tensor cores, by three products of TF32; only float32 operands heed it.
PRECISION = tl.constexpr("tf32x3")
# Triton's interpreter would multiply the bits of bfloat16 as integers; float32 holds its products exactly.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(a, b, acc):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _patch_corners(ids, row, position, is_token, n_patches, grid_time, stride_b, stride_f, n_ids, PATCH: tl.constexpr):
    """Where the patches of some rows begin in spec, their tokens, and which of the rows have a patch."""
    patch_id = tl.load(ids + row * n_ids + position, mask=is_token, other=0)  # int64
    found = is_token & (patch_id >= 0) & (patch_id < n_patches)
    patch_id = patch_id.to(tl.int32)
    corner = row * stride_b + (patch_id // grid_time) * PATCH * stride_f + (patch_id % grid_time) * PATCH
    return corner, patch_id, found


@triton.jit
def masked_patch_embed_fwd_kernel(
    spec,
    weight,
    bias,
    pos,
    cls,
    ids,
    visible,
    masked,
    n_rows,
    n_patches,
    n_visible,
    n_ids,
    grid_time,
    width,
    area,
    stride_b,
    stride_f,
    PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Columns vary fastest: the programs that read the same patches run at the same time.
    n_blocks = tl.cdiv(width, BLOCK_N)
    row = tl.program_id(0) // n_blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    column = tl.program_id(0) % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    in_rows, in_width = row < n_rows, column < width

    sample, place = row // (n_ids + 2), row % (n_ids + 2)
    is_visible = place <= n_visible
    is_cls = (place == 0) | (place == n_visible + 1)
    position = tl.where(is_visible, place - 1, place - 2)  # in the shuffle
    is_token = in_rows & (is_cls == 0)
    corner, patch_id, found = _patch_corners(
        ids, sample, position, is_token, n_patches, grid_time, stride_b, stride_f, n_ids, PATCH
    )

    # The sum starts from the token's position and the bias, or for CLS from its position and the token itself: added
    # at the end, they would take as many registers again as the sum.
    known = found | (in_rows & is_cls)
    token_row = tl.where(is_cls, 0, 1 + patch_id)  # [BM]
    acc = tl.load(
        pos + token_row[:, None] * width + column[None, :], mask=known[:, None] & in_width[None, :], other=0.0
    ).to(tl.float32)  # [BM, BN]
    bias_row = tl.load(bias + column, mask=in_width, other=0.0).to(tl.float32)  # [BN]
    cls_row = tl.load(cls + column, mask=in_width, other=0.0).to(tl.float32)
    acc += tl.where(is_cls[:, None], cls_row[None, :], bias_row[None, :])
    # An id that names no patch must not read elsewhere, and must not pass for a token.
    acc = tl.where(known[:, None], acc, float("nan"))

    for start in range(0, area, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)  # [BK]
        a = tl.load(
            spec + corner[:, None] + ((k // PATCH) * stride_f + k % PATCH)[None, :],
            mask=found[:, None] & (k < area)[None, :],
            other=0.0,
        )  # [BM, BK]
        b = tl.load(
            weight + column[None, :] * area + k[:, None],
            mask=in_width[None, :] & (k < area)[:, None],
            other=0.0,
        )  # [BK, BN]
        acc = _dot(a.to(b.dtype), b, acc)

    out = tl.where(
        is_visible,
        visible + (sample * (1 + n_visible) + place) * width,
        masked + (sample * (1 + n_ids - n_visible) + place - n_visible - 1) * width,
    )  # [BM]
    tl.store(
        out[:, None] + column[None, :], acc.to(visible.dtype.element_ty), mask=in_rows[:, None] & in_width[None, :]
    )


@triton.jit
def masked_patch_embed_bwd_kernel(
    grad,
    spec,
    ids,
    partial,
    n_rows,
    n_patches,
    n_visible,
    n_ids,
    grid_time,
    width,
    stride_b,
    stride_f,
    split_rows,
    PATCH: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[s] (width, AREA) = grad[rows of split s].T @ patches[rows of split s]."""
    AREA: tl.constexpr = PATCH * PATCH
    k_blocks: tl.constexpr = (AREA + BLOCK_K - 1) // BLOCK_K
    column = tl.program_id(0) // k_blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK]
    split = tl.program_id(1)
    in_width, in_area = column < width, k < AREA
    in_patch = ((k // PATCH) * stride_f + k % PATCH)[None, :]

    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for start in range(0, split_rows, BLOCK_R):
        row = split * split_rows + start + tl.arange(0, BLOCK_R)  # [BR]
        in_rows = (row < n_rows) & (start + tl.arange(0, BLOCK_R) < split_rows)
        sample, place = row // (n_visible + 1), row % (n_visible + 1)
        corner, _, found = _patch_corners(
            ids, sample, place - 1, in_rows & (place > 0), n_patches, grid_time, stride_b, stride_f, n_ids, PATCH
        )
        g = tl.load(
            grad + row[:, None] * width + column[None, :], mask=found[:, None] & in_width[None, :], other=0.0
        )  # [BR, BN]
        a = tl.load(spec + corner[:, None] + in_patch, mask=found[:, None] & in_area[None, :], other=0.0)  # [BR, BK]
        acc = _dot(tl.trans(g.to(COMPUTE)), a.to(COMPUTE), acc)
    tl.store(
        partial + (split * width + column[:, None]) * AREA + k[None, :], acc, mask=in_width[:, None] & in_area[None, :]
    )


# One configuration serves every architecture from sm_80 on: these fit the 99 KiB of shared memory of the smaller ones
# and do not spill (tests/test_compile_ahead.py).
_FWD = {
    torch.float32: {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
    torch.bfloat16: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
}
_FWD[torch.float16] = _FWD[torch.bfloat16]
_BWD = {
    torch.float32: {"BLOCK_R": 16, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    torch.bfloat16: {"BLOCK_R": 32, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
}
_BWD[torch.float16] = _BWD[torch.bfloat16]
# Rows that one program of the backward pass sums: a batch of 256 makes 15 splits, so 360 programs at a width of 768.
SPLIT_ROWS = 1024

_TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Offsets within one launch are 32-bit, which 64-bit ones would make spill; a larger batch takes several launches.
MAX_OFFSET = 2**31 - 1


def _parts(spec: Tensor, row_elements: int) -> Iterator[slice]:
    """Slices of the batch in which no offset exceeds MAX_OFFSET; `row_elements` of a sample's largest tensor."""
    sample = max(spec.stride(0), spec.shape[1] * spec.stride(1), row_elements)
    step = max(1, MAX_OFFSET // sample)
    for start in range(0, spec.shape[0], step):
        yield slice(start, min(start + step, spec.shape[0]))


def _grid_shape(spec: Tensor, patch: int) -> tuple[int, int]:
    return spec.shape[1] // patch, spec.shape[2] // patch


def masked_patch_embed(
    spec: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls: Tensor,
    ids_shuffle: Tensor,
    n_visible: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The op's contract, for contiguous arguments (spec only in its last axis); `dtype` is that of the operands."""
    (batch, n_ids), (width, patch) = ids_shuffle.shape, (weight.shape[0], weight.shape[-1])
    grid_freq, grid_time = _grid_shape(spec, patch)
    out_dtype = torch.promote_types(dtype, weight.dtype)
    visible = spec.new_empty((batch, 1 + n_visible, width), dtype=out_dtype)
    masked = spec.new_empty((batch, 1 + n_ids - n_visible, width), dtype=out_dtype)
    weight, options = weight.to(dtype), _FWD[dtype]
    for part in _parts(spec, (n_ids + 2) * width):
        rows = (part.stop - part.start) * (n_ids + 2)
        grid = (triton.cdiv(rows, options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"]),)
        masked_patch_embed_fwd_kernel[grid](
            spec[part],
            weight,
            bias,
            pos,
            cls,
            ids_shuffle[part],
            visible[part],
            masked[part],
            rows,
            grid_freq * grid_time,
            n_visible,
            n_ids,
            grid_time,
            width,
            patch * patch,
            spec.stride(0),
            spec.stride(1),
            PATCH=patch,
            **options,
        )
    return visible, masked


def masked_patch_embed_backward(
    grad: Tensor, spec: Tensor, ids_shuffle: Tensor, n_visible: int, patch: int, dtype: torch.dtype
) -> Tensor:
    """grad (B, 1 + V, D) contiguous -> the weight's gradient (D, p * p) in float32; the same bits every time."""
    width, n_ids = grad.shape[2], ids_shuffle.shape[1]
    grid_freq, grid_time = _grid_shape(spec, patch)
    options = _BWD[dtype]
    tiles = triton.cdiv(width, options["BLOCK_N"]) * triton.cdiv(patch * patch, options["BLOCK_K"])
    sums = []
    for part in _parts(spec, (n_visible + 1) * width):
        rows = (part.stop - part.start) * (n_visible + 1)
        splits = -(-rows // SPLIT_ROWS)
        partial = grad.new_empty((splits, width, patch * patch), dtype=torch.float32)
        masked_patch_embed_bwd_kernel[(tiles, splits)](
            grad[part],
            spec[part],
            ids_shuffle[part],
            partial,
            rows,
            grid_freq * grid_time,
            n_visible,
            n_ids,
            grid_time,
            width,
            spec.stride(0),
            spec.stride(1),
            SPLIT_ROWS,
            PATCH=patch,
            COMPUTE=_TL_DTYPE[dtype],
            **options,
        )
        sums.append(partial.sum(0))
    if not sums:
        return grad.new_zeros((width, patch * patch), dtype=torch.float32)
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _aot() -> list[Launch]:
    """ViT-B on 608 frames, in float32 and with float32 parameters under bfloat16 autocast."""
    pointers = dict.fromkeys(("spec", "bias", "pos", "cls", "visible", "masked", "grad", "partial"), "*fp32")
    sizes = ("n_rows", "n_patches", "n_visible", "n_ids", "grid_time", "width", "area", "stride_b", "stride_f")
    signature = {**pointers, **dict.fromkeys((*sizes, "split_rows"), "i32"), "ids": "*i64"}
    launches = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for kernel, blocks in (
            (masked_patch_embed_fwd_kernel, _FWD[dtype]),
            (masked_patch_embed_bwd_kernel, _BWD[dtype]),
        ):
            constexprs = {**blocks, "PATCH": 16, "COMPUTE": _TL_DTYPE[dtype]}
            launches.append(
                Launch(
                    name=f"{kernel.__name__.removesuffix('_kernel')} {name}",
                    kernel=kernel,
                    signature={**signature, "weight": f"*{name}"},
                    num_warps=constexprs.pop("num_warps"),
                    num_stages=constexprs.pop("num_stages"),
                    constexprs=constexprs,
                    divisible=("width", "area", "stride_b", "stride_f", "split_rows"),
                )
            )
    return launches


AOT = _aot()
