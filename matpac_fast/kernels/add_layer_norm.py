"""Residual addition and LayerNorm in Triton, in one pass each way: x + delta + bias, normalized, and all its gradients.

Every thread owns a few columns of all rows of its program's tile, so that the sums over rows, the gradients of bias,
gamma and beta, grow in registers and leave them once a program.
"""

# Triton wraps what is passed as a constexpr.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import CAPABILITIES, Launch
from ._limits import MAX_WIDTH
from .column_sums import column_sums

# Elements to a load or store, of 16 bits or 32: if they differed, tiles would change hands in shared memory.
VEC = tl.constexpr(4)


@triton.jit
def _tile(D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """row [ROWS, 1], column [1, BLOCK_D] and the offsets from the first row, [ROWS, BLOCK_D]."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.max_contiguous(tl.arange(0, BLOCK_D), VEC)[None, :]
    return row, column, row * D + column


@triton.jit
def add_layer_norm_fwd_kernel(
    x, delta, bias, gamma, beta, new_x, normed, stats, n, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column, at = _tile(D, BLOCK_D, ROWS)
    in_rows, in_width = row < n - first, column < D
    inside = in_rows & in_width
    value = tl.load(x + first * D + at, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    if delta is not None:
        added = tl.load(delta + first * D + at, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            added += tl.load(bias + column, mask=in_width, other=0.0)
        rounded = (value + added).to(new_x.dtype.element_ty)
        tl.store(new_x + first * D + at, rounded, mask=inside)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, axis=1, keep_dims=True) / D  # [ROWS, 1]
    value = tl.where(in_width, value - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(value * value, axis=1, keep_dims=True) / D + eps)
    value *= rstd
    value *= tl.load(gamma + column, mask=in_width, other=0.0)
    value += tl.load(beta + column, mask=in_width, other=0.0)
    tl.store(normed + first * D + at, value.to(normed.dtype.element_ty), mask=inside)
    tl.store(stats + first * 2 + row * 2, mean, mask=in_rows)
    tl.store(stats + first * 2 + row * 2 + 1, rstd, mask=in_rows)


@triton.jit
def add_layer_norm_bwd_kernel(
    dnormed, dx_next, new_x, stats, gamma, dx, ddelta, partial, n,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, NEED_DELTA: tl.constexpr,
):  # fmt: skip
    """partial[program] (3 or 2, D) = sums of the program's rows for gamma, beta and, if NEED_DELTA, bias."""
    program = tl.program_id(0)
    share, rest = n // tl.num_programs(0), n % tl.num_programs(0)
    first = (program * share + tl.minimum(program, rest)).to(tl.int64)
    count = tl.where(program < rest, share + 1, share)
    dnormed += first * D
    new_x += first * D
    dx += first * D
    stats += first * 2
    if dx_next is not None:
        dx_next += first * D
    if ddelta is not None:
        ddelta += first * D

    row, column, at = _tile(D, BLOCK_D, ROWS)
    in_width = column < D
    weight = tl.load(gamma + column, mask=in_width, other=0.0)  # [1, BLOCK_D]
    dgamma = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    dbeta = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    dbias = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    for start in range(0, count, ROWS):
        in_rows = row < count - start
        inside = in_rows & in_width
        # What is read as zero past the last row or column adds nothing to any sum that is stored.
        g = tl.load(dnormed + start * D + at, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        x = tl.load(new_x + start * D + at, mask=inside, other=0.0).to(tl.float32)
        if dx_next is not None:
            residual = tl.load(dx_next + start * D + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats + start * 2 + row * 2, mask=in_rows, other=0.0)  # [ROWS, 1]
        rstd = tl.load(stats + start * 2 + row * 2 + 1, mask=in_rows, other=0.0)
        x = (x - mean) * rstd
        dgamma += tl.sum(g * x, axis=0, keep_dims=True)
        dbeta += tl.sum(g, axis=0, keep_dims=True)
        g *= weight
        along_x = tl.sum(g * x, axis=1, keep_dims=True) / D
        along_1 = tl.sum(g, axis=1, keep_dims=True) / D
        g = (g - along_1 - x * along_x) * rstd
        if dx_next is not None:
            g += residual
        if NEED_DELTA:
            dbias += tl.sum(g, axis=0, keep_dims=True)
        tl.store(dx + start * D + at, g.to(dx.dtype.element_ty), mask=inside)
        if ddelta is not None:
            tl.store(ddelta + start * D + at, g.to(ddelta.dtype.element_ty), mask=inside)
    SUMS: tl.constexpr = 3 if NEED_DELTA else 2
    partial += program.to(tl.int64) * (SUMS * D) + column
    tl.store(partial, dgamma, mask=in_width)
    tl.store(partial + D, dbeta, mask=in_width)
    if NEED_DELTA:
        tl.store(partial + 2 * D, dbias, mask=in_width)


# By D, or else by D rounded up to a power of two. Where the columns of all warps, 128 each, divide D, those that pad it
# cost nothing: the compiler knows that they are none. Programs of the backward pass, each with a share of the rows, are
# as many as fit the 132 multiprocessors of Hopper at once.
_FWD: dict[int, dict[str, Any]] = {
    512: {"ROWS": 4, "num_warps": 4, "num_stages": 1},
    768: {"ROWS": 2, "num_warps": 2, "num_stages": 1},
    1024: {"ROWS": 2, "num_warps": 2, "num_stages": 1},
    2048: {"ROWS": 2, "num_warps": 4, "num_stages": 1},
}
_BWD: dict[int, dict[str, Any]] = {
    512: {"PROGRAMS": 5 * 132, "ROWS": 4, "num_warps": 4, "num_stages": 1},
    768: {"PROGRAMS": 6 * 132, "ROWS": 2, "num_warps": 2, "num_stages": 1},
    1024: {"PROGRAMS": 5 * 132, "ROWS": 2, "num_warps": 4, "num_stages": 1},
    2048: {"PROGRAMS": 3 * 132, "ROWS": 2, "num_warps": 4, "num_stages": 1},
}
_SMALLER = {"PROGRAMS": 12 * 132, "ROWS": 4, "num_warps": 1, "num_stages": 1}


def _options(table: dict[int, dict[str, Any]], d: int) -> tuple[int, dict[str, Any]]:
    """Programs of the backward pass, and the rest."""
    assert 0 < d <= MAX_WIDTH
    block = max(32, triton.next_power_of_2(d))
    options = {**table.get(d, table.get(block, _SMALLER)), "D": d, "BLOCK_D": block}
    return options.pop("PROGRAMS", 0), options


def forward(
    x: Tensor,
    delta: Tensor | None,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x and delta (N, D) contiguous, bias, gamma and beta (D,) float32 -> new_x = x + delta + bias (N, D) like x, its
    LayerNorm (N, D) in `out_dtype`, and the mean and 1 / deviation of its rows (N, 2) float32.

    Without delta, which a bias needs, new_x is empty: it would be x itself."""
    n, d = x.shape
    new_x = x.new_empty((0,)) if delta is None else torch.empty_like(x)
    normed = x.new_empty((n, d), dtype=out_dtype)
    stats = x.new_empty((n, 2), dtype=torch.float32)
    if n:
        _, options = _options(_FWD, d)
        grid = (triton.cdiv(n, options["ROWS"]),)
        add_layer_norm_fwd_kernel[grid](x, delta, bias, gamma, beta, new_x, normed, stats, n, eps, **options)
    return new_x, normed, stats


def backward(
    dnormed: Tensor,
    dx_next: Tensor | None,
    new_x: Tensor,
    stats: Tensor,
    gamma: Tensor,
    delta_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dnormed (N, D), dx_next (N, D) like x or None for zero, and what `forward` gave, or x in place of an empty new_x
    -> the gradients of x (N, D), of delta (N, D), and those of gamma, beta and bias (3, D) float32; the same bits every
    time. The second is empty where its dtype is that of x: it is the first. `delta_dtype` is None without a delta: then
    there is no bias either."""
    n, d = new_x.shape
    need_delta = delta_dtype is not None
    programs, options = _options(_BWD, d)
    programs = min(programs, triton.cdiv(n, options["ROWS"]))
    dx = torch.empty_like(new_x)
    apart = need_delta and delta_dtype != new_x.dtype
    ddelta = new_x.new_empty(new_x.shape if apart else (0,), dtype=delta_dtype)
    partial = new_x.new_empty((programs, 3 if need_delta else 2, d), dtype=torch.float32)
    if n:
        add_layer_norm_bwd_kernel[(programs,)](
            dnormed, dx_next, new_x, stats, gamma, dx, ddelta if apart else None, partial, n,
            NEED_DELTA=need_delta, **options,
        )  # fmt: skip
    return dx, ddelta, column_sums(partial)


def _aot() -> list[Launch]:
    """float32 residual streams under bfloat16 autocast: ViT-B's and the predictor's; without a delta it is less."""
    signature: dict[str, str] = dict.fromkeys(("delta", "normed", "dnormed", "ddelta"), "*bf16")
    names = ("x", "new_x", "dx", "dx_next", "bias", "gamma", "beta", "stats", "partial")
    signature |= {**dict.fromkeys(names, "*fp32"), "n": "i32", "eps": "fp32"}
    launches = []
    for d, need_delta, capabilities in ((512, True, CAPABILITIES), (768, True, CAPABILITIES), (768, False, (90,))):
        for kernel, table in ((add_layer_norm_fwd_kernel, _FWD), (add_layer_norm_bwd_kernel, _BWD)):
            absent = {} if need_delta else dict.fromkeys(("delta", "bias", "ddelta"))
            constexprs = {**_options(table, d)[1], **absent, "NEED_DELTA": need_delta}
            launches.append(
                Launch(
                    name=f"{kernel.__name__.removesuffix('_kernel')} {d}{'' if need_delta else ' no delta'}",
                    kernel=kernel,
                    signature=signature,
                    num_warps=constexprs.pop("num_warps"),
                    num_stages=constexprs.pop("num_stages"),
                    constexprs=constexprs,
                    capabilities=capabilities,
                )
            )
    return launches


AOT = _aot()
