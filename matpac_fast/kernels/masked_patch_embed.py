"""masked_patch_embed in Triton: a matrix product whose rows are gathered patches, everything else in its epilogue.

The rows of the product are B samples of N + 2 tokens: the visible ones behind a CLS row, then the masked ones behind
another. A CLS row has an empty patch, so that no second kernel has to write it.
"""

# Triton wraps what is passed as a constexpr.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ._aot import CAPABILITIES, Launch, by_options, capability_of, is_data_centre, stages

# Near float32 on tensor cores, by three products of TF32; only float32 operands heed it.
PRECISION = tl.constexpr("tf32x3")
# Triton's interpreter would multiply the bits of bfloat16 as integers; float32 holds its products exactly.
INTERPRETED = tl.constexpr(backend.INTERPRETED)


@triton.jit
def _dot(a, b, acc):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _patch_corners(
    ids, row, position, is_token, stride_f, N: tl.constexpr, GRID_TIME: tl.constexpr, PATCH: tl.constexpr
):
    """Where patches begin in their sample, their tokens, and which of the rows have a patch. N and GRID_TIME are
    constants because each thread divides for all of its rows: by a number of the run, that is most instructions."""
    patch_id = tl.load(ids + row * N + position, mask=is_token, other=-1)  # int64
    found = (patch_id >= 0) & (patch_id < N)
    patch_id = patch_id.to(tl.int32)
    return (patch_id // GRID_TIME * stride_f + patch_id % GRID_TIME) * PATCH, patch_id, found


@triton.jit
def masked_patch_embed_fwd_kernel(
    spec, weight, bias, pos, cls, ids, visible, masked, n_rows, n_visible, width, stride_b, stride_f,
    N: tl.constexpr, GRID_TIME: tl.constexpr, PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program per block of rows and share of the columns; where whole patches fit, it gathers them once."""
    AREA: tl.constexpr = PATCH * PATCH
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    in_rows = row < n_rows
    sample, place = row // (N + 2), row % (N + 2)
    is_visible = place <= n_visible
    is_cls = (place == 0) | (place == n_visible + 1)
    position = tl.where(is_visible, place - 1, place - 2)  # in the shuffle
    is_token = in_rows & (is_cls == 0)
    corner, patch_id, found = _patch_corners(ids, sample, position, is_token, stride_f, N, GRID_TIME, PATCH)
    patch = spec + (sample * stride_b + corner)[:, None]  # [BM, 1]
    token = pos + (tl.where(is_cls, 0, 1 + patch_id) * width)[:, None]
    known = (found | is_cls)[:, None]
    to_visible = ((sample * (1 + n_visible) + place) * width)[:, None]  # [BM, 1]
    to_masked = ((sample * (1 + N - n_visible) + place - n_visible - 1) * width)[:, None]

    k = tl.arange(0, BLOCK_K)
    if BLOCK_K >= AREA:
        a = _load_patches(patch, found, k, stride_f, PATCH).to(weight.dtype.element_ty)
    for first in range(tl.program_id(1) * BLOCK_N, width, tl.num_programs(1) * BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)[None, :]  # [1, BN]
        in_width = column < width
        # The sum starts from the token's position and the bias, or for CLS from its position and the token itself. An
        # id that names no patch must not read elsewhere, and must not pass for a token.
        acc = tl.load(token + column, mask=known & in_width, other=float("nan")).to(tl.float32)  # [BM, BN]
        bias_row = tl.load(bias + column, mask=in_width, other=0.0).to(tl.float32)
        cls_row = tl.load(cls + column, mask=in_width, other=0.0).to(tl.float32)
        acc += tl.where(is_cls[:, None], cls_row, bias_row)
        matrix = weight + column * AREA
        if BLOCK_K >= AREA:
            acc = _dot(a, _load_matrix(matrix, in_width, k, AREA), acc)
        else:
            for start in range(0, AREA, BLOCK_K):
                b = _load_matrix(matrix, in_width, start + k, AREA)
                acc = _dot(_load_patches(patch, found, start + k, stride_f, PATCH).to(b.dtype), b, acc)
        # Two stores, of which a row heeds one: of a choice between two pointers Triton 3.8 does not know the alignment.
        tokens = acc.to(visible.dtype.element_ty)
        tl.store(visible + to_visible + column, tokens, mask=(in_rows & is_visible)[:, None] & in_width)
        tl.store(masked + to_masked + column, tokens, mask=(in_rows & (is_visible == 0))[:, None] & in_width)


@triton.jit
def _load_patches(patch, found, k, stride_f, PATCH: tl.constexpr):
    """[BM, BK], with zeros where there is no patch and past its end."""
    at = patch + (k // PATCH * stride_f + k % PATCH)[None, :]
    return tl.load(at, mask=found[:, None] & (k < PATCH * PATCH)[None, :], other=0.0)


@triton.jit
def _load_matrix(matrix, in_width, k, AREA: tl.constexpr):
    """[BK, BN]"""
    return tl.load(matrix + k[:, None], mask=in_width & (k < AREA)[:, None], other=0.0)


@triton.jit
def masked_patch_embed_bwd_kernel(
    grad, spec, ids, partial, batch, n_visible, width, stride_b, stride_f,
    N: tl.constexpr, GRID_TIME: tl.constexpr, PATCH: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial[split] (width, AREA) = grad.T @ patches over the visible tokens of the split's samples."""
    AREA: tl.constexpr = PATCH * PATCH
    k_blocks: tl.constexpr = (AREA + BLOCK_K - 1) // BLOCK_K
    column = tl.program_id(0) // k_blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    k = tl.program_id(0) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK]
    in_width = column < width
    split, splits = tl.program_id(1), tl.num_programs(1)
    blocks = tl.cdiv(n_visible, BLOCK_R)  # of a sample: no row has to be divided to know its sample

    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    for step in range(split * batch // splits * blocks, (split + 1) * batch // splits * blocks):
        sample = (step // blocks).to(tl.int64)
        position = step % blocks * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
        corner, _, found = _patch_corners(ids, sample, position, position < n_visible, stride_f, N, GRID_TIME, PATCH)
        g = tl.load(
            grad + sample * (1 + n_visible) * width + (1 + position[:, None]) * width + column[None, :],
            mask=found[:, None] & in_width[None, :],
            other=0.0,
        )  # [BR, BN]
        a = _load_patches(spec + sample * stride_b + corner[:, None], found, k, stride_f, PATCH)  # [BR, BK]
        acc = _dot(tl.trans(g.to(COMPUTE)), a.to(COMPUTE), acc)
    tl.store(
        partial + split.to(tl.int64) * width * AREA + column[:, None] * AREA + k[None, :],
        acc,
        mask=in_width[:, None] & (k < AREA)[None, :],
    )


# By the bytes of an operand. Every block of rows reads the whole matrix from the L2 cache: 128 rows read a quarter less
# in all than 64, which fit the 99 KiB of shared memory that other architectures have.
_FWD: dict[int, dict[str, int]] = {
    4: {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
    2: {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 16, "num_stages": 2},
}
_SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 8, "num_stages": 1}
# One stage, so that two programs share a multiprocessor.
_BWD: dict[int, dict[str, int]] = {
    4: {"BLOCK_R": 16, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    2: {"BLOCK_R": 32, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 1},
}
# Programs that fill the 132 multiprocessors of Hopper: one on each, and two.
FWD_PROGRAMS, BWD_PROGRAMS = 132, 264


def _fwd_options(itemsize: int, area: int, capability: int) -> dict[str, int]:
    large = capability == 0 or is_data_centre(capability)  # 0: interpreted
    options = dict(_FWD[itemsize] if itemsize == 4 or large else _SMALL)
    if itemsize == 2:
        options["num_stages"] = stages(options["num_stages"], capability)
    block = 1 << max(4, (area - 1).bit_length())
    return {**options, "BLOCK_K": block if block <= options["BLOCK_K"] else min(options["BLOCK_K"], 32)}


_TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Offsets within a launch of the forward pass are 32-bit; a larger batch takes several.
MAX_OFFSET = 2**31 - 1


def _parts(spec: Tensor, row_elements: int) -> Iterator[slice]:
    """Slices of the batch in which no offset exceeds MAX_OFFSET; `row_elements` of a sample's largest tensor."""
    sample = max(spec.stride(0), spec.shape[1] * spec.stride(1), row_elements)
    step = max(1, MAX_OFFSET // sample)
    for start in range(0, spec.shape[0], step):
        yield slice(start, min(start + step, spec.shape[0]))


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
    (batch, n), (width, patch) = ids_shuffle.shape, (weight.shape[0], weight.shape[-1])
    out_dtype = torch.promote_types(dtype, weight.dtype)
    visible = spec.new_empty((batch, 1 + n_visible, width), dtype=out_dtype)
    masked = spec.new_empty((batch, 1 + n - n_visible, width), dtype=out_dtype)
    options = _fwd_options(dtype.itemsize, patch * patch, capability_of(spec))
    weight = weight.to(dtype)
    for part in _parts(spec, (n + 2) * width):
        rows = (part.stop - part.start) * (n + 2)
        blocks = triton.cdiv(rows, options["BLOCK_M"])
        shares = max(1, min(triton.cdiv(width, options["BLOCK_N"]), FWD_PROGRAMS // blocks))
        masked_patch_embed_fwd_kernel[(blocks, shares)](
            spec[part], weight, bias, pos, cls, ids_shuffle[part], visible[part], masked[part],
            rows, n_visible, width, spec.stride(0), spec.stride(1),
            N=n, GRID_TIME=spec.shape[2] // patch, PATCH=patch, **options,
        )  # fmt: skip
    return visible, masked


def masked_patch_embed_backward(
    grad: Tensor, spec: Tensor, ids_shuffle: Tensor, n_visible: int, patch: int, dtype: torch.dtype
) -> Tensor:
    """grad (B, 1 + V, D) contiguous -> the weight's gradient (D, p * p) in float32; the same bits every time."""
    (batch, n), width = ids_shuffle.shape, grad.shape[2]
    options = _BWD[dtype.itemsize]
    tiles = triton.cdiv(width, options["BLOCK_N"]) * triton.cdiv(patch * patch, options["BLOCK_K"])
    splits = max(1, min(batch, BWD_PROGRAMS // tiles))
    partial = grad.new_empty((splits, width, patch * patch), dtype=torch.float32)
    masked_patch_embed_bwd_kernel[(tiles, splits)](
        grad, spec, ids_shuffle, partial, batch, n_visible, width, spec.stride(0), spec.stride(1),
        N=n, GRID_TIME=spec.shape[2] // patch, PATCH=patch, COMPUTE=_TL_DTYPE[dtype], **options,
    )  # fmt: skip
    return partial.sum(0)


def _aot() -> list[Launch]:
    """ViT-B on 608 frames, in float32 and with float32 parameters under bfloat16 autocast."""
    pointers = dict.fromkeys(("spec", "bias", "pos", "cls", "visible", "masked", "grad", "partial"), "*fp32")
    sizes = ("n_rows", "batch", "n_visible", "width", "stride_b", "stride_f")
    launches = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        forward = by_options(lambda capability, size=dtype.itemsize: _fwd_options(size, 256, capability))
        launched = [(masked_patch_embed_fwd_kernel, options, where) for options, where in forward]
        launched.append((masked_patch_embed_bwd_kernel, _BWD[dtype.itemsize], CAPABILITIES))
        for kernel, options, capabilities in launched:
            constexprs = {**options, "N": 190, "GRID_TIME": 38, "PATCH": 16, "COMPUTE": _TL_DTYPE[dtype]}
            launches.append(
                Launch(
                    name=f"{kernel.__name__.removesuffix('_kernel')} {name} sm_{capabilities[0]}",
                    kernel=kernel,
                    signature={**pointers, **dict.fromkeys(sizes, "i32"), "weight": f"*{name}", "ids": "*i64"},
                    num_warps=constexprs.pop("num_warps"),
                    num_stages=constexprs.pop("num_stages"),
                    constexprs=constexprs,
                    divisible=("width", "stride_b", "stride_f"),
                    capabilities=capabilities,
                )
            )
    return launches


AOT = _aot()
