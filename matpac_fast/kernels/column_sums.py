"""The end of a sum over many rows in Triton: what each program of a kernel has added up, column by column.

torch's own takes few blocks for so few rows: of (792, 2304) 18, and each of their threads reads 198 rows, one after the
other.
"""

# Triton wraps what is passed as a constexpr, and a launch takes options of its own.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._aot import Launch

# Two sectors of a row a program, so that 1,536 to 3,072 columns are 96 to 192 of them; eight loads a thread at once.
BLOCK_R, BLOCK_C, NUM_WARPS = 512, 16, 8


@triton.jit(do_not_specialize=["n"])
def column_sums_kernel(partial, out, n, c, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    row = tl.arange(0, BLOCK_R)  # [BR]
    inside = (column < c)[None, :]
    at = row[:, None] * c + column[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for start in range(0, n, BLOCK_R):
        total += tl.load(partial + at, mask=(row < n - start)[:, None] & inside, other=0.0)
        partial += BLOCK_R * c  # rather than an offset, which might take more than 32 bits
    tl.store(out + column, tl.sum(total, axis=0), mask=column < c)


def column_sums(partial: Tensor) -> Tensor:
    """(R, ...) float32, contiguous -> the sums over R (...); the same bits every time."""
    out = partial.new_empty(partial.shape[1:])
    if c := out.numel():
        grid = (triton.cdiv(c, BLOCK_C),)
        column_sums_kernel[grid](partial, out, len(partial), c, BLOCK_R, BLOCK_C, num_warps=NUM_WARPS, num_stages=1)
    return out


AOT = [
    Launch(
        name="column_sums",
        kernel=column_sums_kernel,
        signature={"partial": "*fp32", "out": "*fp32", "n": "i32", "c": "i32"},
        constexprs={"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C},
        num_warps=NUM_WARPS,
        num_stages=1,
        divisible=("c",),
        max_registers=128,
    )
]
