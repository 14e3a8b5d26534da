"""gelu(h + bias) in Triton and its backward pass, each limited by memory: the bias gradient comes with the pass.

Half the complementary error function, q(x) = Phi(-x), is exp2 of a polynomial: log2 of q is so smooth that nine terms
give q to 1e-5 of itself up to x = 4 and 6e-5 up to 9, where erf would take thrice the instructions.
"""

# Triton wraps what is passed as a constexpr.
# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import Launch
from .column_sums import column_sums

# 16 bytes a thread, so 256 columns a warp: a thread holds whole columns of a tile, whose sums need no other thread.
WARP_COLUMNS = 256
# Tiles are BLOCK_R rows of at most MAX_WARPS warps; one program of the backward pass adds up ROWS rows.
_FWD = {"BLOCK_R": 4, "MAX_WARPS": 4}
_BWD = {"BLOCK_R": 2, "MAX_WARPS": 2, "ROWS": 32}


@triton.jit
def _lower_tail(z):
    """x = |z|, at most 16, and Phi(-x), which is 0 from x = 13 on; NaN stays NaN."""
    x = tl.minimum(tl.abs(z), 16.0, propagate_nan=tl.PropagateNan.ALL)
    # Minimax fit of log2(Phi(-x)) + 1 over x on [0, 13], its tolerance growing from x = 4 to a hundredfold at 13.
    p = -1.97549865e-09
    p = p * x + 1.46679781e-07
    p = p * x - 4.72594411e-06
    p = p * x + 8.77738275e-05
    p = p * x - 0.00105655671
    p = p * x + 0.00884001795
    p = p * x - 0.0544159859
    p = p * x - 0.458187461
    p = p * x - 1.15129316
    return x, tl.exp2(p * x - 1.0)


@triton.jit
def bias_gelu_fwd_kernel(
    h, bias, y, n, groups, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """One program per tile; h and y have groups * VECTOR columns, so that the compiler knows what divides them."""
    c = groups * VECTOR
    # Columns vary fastest: the programs that run at the same time read whole rows.
    blocks = tl.cdiv(c, BLOCK_C)
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    first = tl.program_id(0) // blocks * BLOCK_R
    row = tl.arange(0, BLOCK_R)  # [BR]
    mask = (row < n - first)[:, None] & (column < c)[None, :]
    at = row[:, None] * c + column[None, :]
    offset = first.to(tl.int64) * c
    z = tl.load(h + offset + at, mask=mask, other=0.0).to(tl.float32)  # [BR, BC]
    z += tl.load(bias + column, mask=column < c, other=0.0).to(tl.float32)[None, :]
    x, q = _lower_tail(z)
    tl.store(y + offset + at, (tl.maximum(z, 0.0) - x * q).to(y.dtype.element_ty), mask=mask)


@triton.jit
def bias_gelu_bwd_kernel(
    grad, h, bias, dh, partial, n, groups,
    VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per ROWS rows of a block of columns; partial[split] (C,) is the sum of dh over them."""
    c = groups * VECTOR
    blocks = tl.cdiv(c, BLOCK_C)
    column = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    split = tl.program_id(0) // blocks
    rows = tl.minimum(ROWS, n - split * ROWS)
    inside = column < c
    offset = (split * ROWS).to(tl.int64) * c
    grad, h, dh = grad + offset, h + offset, dh + offset
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)  # [BR]
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * c + column[None, :]
        z = tl.load(h + at, mask=mask, other=0.0).to(tl.float32) + b  # [BR, BC]
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        x, q = _lower_tail(z)
        # The density, with its 1 / sqrt(2 pi) in the exponent.
        density = tl.exp2((x * -0.7213475204444817) * x - 1.3257480647361593)
        lower = q - x * density  # the derivative at -x
        g *= tl.where(z < 0, lower, 1.0 - lower)
        tl.store(dh + at, g.to(dh.dtype.element_ty), mask=mask)
        total += tl.sum(g, axis=0)
    tl.store(partial + split.to(tl.int64) * c + column, total, mask=inside)


def _options(table: dict[str, int], c: int) -> dict[str, int]:
    """Launch parameters for c columns: the widest block that divides them, or one warp's."""
    warps = table["MAX_WARPS"]
    while warps > 1 and c % (WARP_COLUMNS * warps):
        warps //= 2
    options = {name: value for name, value in table.items() if name != "MAX_WARPS"}
    vector = 8 if c % 8 == 0 else 1
    return {**options, "BLOCK_C": WARP_COLUMNS * warps, "VECTOR": vector, "num_warps": warps, "num_stages": 1}


def forward(h: Tensor, bias: Tensor, options: dict[str, int] | None = None) -> Tensor:
    """gelu(h + bias), exact, of h (N, C), 16-bit and contiguous, and bias (C,), rounded once to h's dtype.

    `options` replaces the table's.
    """
    n, c = h.shape
    y = torch.empty_like(h)
    if h.numel():
        options = _options(options or _FWD, c)
        grid = (triton.cdiv(n, options["BLOCK_R"]) * triton.cdiv(c, options["BLOCK_C"]),)
        bias_gelu_fwd_kernel[grid](h, bias, y, n, c // options["VECTOR"], **options)
    return y


def backward(grad: Tensor, h: Tensor, bias: Tensor, options: dict[str, int] | None = None) -> tuple[Tensor, Tensor]:
    """grad (N, C) of gelu(h + bias), contiguous -> the gradient of h in h's dtype and that of bias (C,) in float32,
    summed before any rounding; the same bits every time. `options` replaces the table's."""
    n, c = h.shape
    dh = torch.empty_like(h)
    options = _options(options or _BWD, c)
    splits = -(-n // options["ROWS"])
    partial = h.new_empty((splits, c), dtype=torch.float32)
    if h.numel():
        grid = (splits * triton.cdiv(c, options["BLOCK_C"]),)
        bias_gelu_bwd_kernel[grid](grad, h, bias, dh, partial, n, c // options["VECTOR"], **options)
    return dh, column_sums(partial)


def _aot() -> list[Launch]:
    """The hidden layers of ViT-B under bfloat16 autocast; those of MATPAC's predictor differ in an argument alone."""
    signature = dict.fromkeys(("h", "y", "grad", "dh"), "*bf16") | dict.fromkeys(("bias", "partial"), "*fp32")
    signature |= dict.fromkeys(("n", "groups"), "i32")
    launches = []
    for kernel, table in ((bias_gelu_fwd_kernel, _FWD), (bias_gelu_bwd_kernel, _BWD)):
        constexprs = _options(table, 3072)
        launches.append(
            Launch(
                name=f"{kernel.__name__.removesuffix('_kernel')} 3072",
                kernel=kernel,
                signature=signature,
                num_warps=constexprs.pop("num_warps"),
                num_stages=constexprs.pop("num_stages"),
                constexprs=constexprs,
                divisible=("n", "groups"),
            )
        )
    return launches


AOT = _aot()
