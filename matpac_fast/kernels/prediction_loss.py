"""prediction_loss in Triton: 2 - 2 cos of every prediction and its target, each read once in either direction."""

# Triton wraps what is passed as a constexpr.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import Launch

# Vectors a program, so that enough bytes are on their way at once.
ROWS, NUM_WARPS = 4, 4


@triton.jit
def _load_row(x, row, in_rows, width, BLOCK_D: tl.constexpr):
    """Rows of x (N, D) in float32, [rows, BLOCK_D], with zeros past D."""
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = in_rows[:, None] & (column < width)
    return tl.load(x + row.to(tl.int64)[:, None] * width + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def prediction_loss_fwd_kernel(
    prediction, target, loss, stats, n, heads, width, eps, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < n
    p = _load_row(prediction, row, in_rows, width, BLOCK_D)
    t = _load_row(target, row // heads, in_rows, width, BLOCK_D)
    # By itself a GPU's maximum of NaN and a number is the number, and the gradient would be that of a short vector.
    own = tl.maximum(tl.sqrt(tl.sum(p * p, axis=1)), eps, propagate_nan=tl.PropagateNan.ALL)
    other = tl.maximum(tl.sqrt(tl.sum(t * t, axis=1)), eps, propagate_nan=tl.PropagateNan.ALL)
    # Divided one after the other: the product of two lengths may leave float32's range.
    cosine = tl.sum(p * (t / other[:, None]), axis=1) / own
    tl.store(loss + row, 2 - 2 * cosine, mask=in_rows)
    at = stats + row.to(tl.int64) * 3
    tl.store(at, own, mask=in_rows)
    tl.store(at + 1, other, mask=in_rows)
    tl.store(at + 2, cosine, mask=in_rows)


@triton.jit
def prediction_loss_bwd_kernel(
    grad, prediction, target, stats, out, n, heads, width, eps, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < n
    p = _load_row(prediction, row, in_rows, width, BLOCK_D)
    t = _load_row(target, row // heads, in_rows, width, BLOCK_D)
    at = stats + row.to(tl.int64) * 3
    own = tl.load(at, mask=in_rows, other=1.0)
    other = tl.load(at + 1, mask=in_rows, other=1.0)
    cosine = tl.load(at + 2, mask=in_rows, other=0.0)
    along_target = -2 * tl.load(grad + row, mask=in_rows, other=0.0) / own
    # Of a vector shorter than eps the length is a constant.
    along_itself = tl.where(own > eps, -along_target * cosine / own, 0.0)
    value = along_itself[:, None] * p + along_target[:, None] * (t / other[:, None])
    column = tl.arange(0, BLOCK_D)[None, :]
    tl.store(
        out + row.to(tl.int64)[:, None] * width + column,
        value.to(out.dtype.element_ty),
        mask=in_rows[:, None] & (column < width),
    )


def forward(prediction: Tensor, target: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """prediction (N * heads, D) and target (N, D), contiguous, float32 or 16-bit -> 2 - 2 cos (N * heads,) float32, and
    for `backward` both lengths and the cosine (N * heads, 3) float32."""
    n, width = prediction.shape
    loss = prediction.new_empty((n,), dtype=torch.float32)
    stats = prediction.new_empty((n, 3), dtype=torch.float32)
    if n:
        prediction_loss_fwd_kernel[(triton.cdiv(n, ROWS),)](
            prediction, target, loss, stats, n, heads, width, eps, ROWS, _block(width), num_warps=NUM_WARPS
        )  # fmt: skip
    return loss, stats


def backward(grad: Tensor, prediction: Tensor, target: Tensor, stats: Tensor, heads: int, eps: float) -> Tensor:
    """grad (N * heads,) float32 and what `forward` took and gave -> the prediction's gradient, in its dtype."""
    n, width = prediction.shape
    out = torch.empty_like(prediction)
    if n:
        prediction_loss_bwd_kernel[(triton.cdiv(n, ROWS),)](
            grad, prediction, target, stats, out, n, heads, width, eps, ROWS, _block(width), num_warps=NUM_WARPS
        )  # fmt: skip
    return out


def _block(width: int) -> int:
    # Eight columns a lane at least. Of one, by Triton 3.8 of four, the compiler makes fma(x, x, y * y) of a square and
    # its sum with another lane's: the lanes then differ in a last bit, and chance chooses whose is stored.
    return 1 << max(8, (width - 1).bit_length())


_TYPES = dict.fromkeys(("target", "loss", "stats", "grad"), "*fp32") | dict.fromkeys(("prediction", "out"), "*bf16")
AOT = [
    Launch(
        f"{kernel.__name__.removesuffix('_kernel')} 768",
        kernel,
        {**_TYPES, **dict.fromkeys(("n", "heads", "width"), "i32"), "eps": "fp32"},
        {"ROWS": ROWS, "BLOCK_D": 1024},
        num_warps=NUM_WARPS,
        divisible=("width",),
    )
    for kernel in (prediction_loss_fwd_kernel, prediction_loss_bwd_kernel)
]
