"""prototype_loss in Triton, the matrix products included: the N x K logits exist a tile at a time and are never stored.

The forward pass reads the prototypes once and keeps maxima and sums as it goes (online softmax); the mean of the
teacher's probabilities and the difference of the two softmaxes compute their tiles of logits again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ._aot import Launch, by_options, capability_of, is_data_centre, stages

# Near float32 on tensor cores, by three products of TF32; only float32 operands heed it.
PRECISION = "tf32x3"
# Triton's interpreter would multiply the bits of bfloat16 as integers; float32 holds its products exactly.
INTERPRETED = tl.constexpr(backend.INTERPRETED)
# Rows whose probabilities one program of the column kernel adds up.
SPLIT_ROWS = 2048


def _options(itemsize: int, capability: int) -> dict[str, Any]:
    """Tile sizes and launch parameters by the bytes of an operand: the largest tiles that spill no registers."""
    if itemsize == 4:
        options = {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_D": 16, "num_stages": 3}
    else:
        # Hopper and data-centre Blackwell multiply out of shared memory; elsewhere the operands take registers as well.
        columns = 128 if is_data_centre(capability) else 64
        options = {"BLOCK_M": 128, "BLOCK_K": columns, "BLOCK_D": 64, "num_stages": stages(3, capability)}
    return {**options, "PRECISION": PRECISION, "num_warps": 8}


@triton.jit
def _logits_tile(
    features, weight, row, column, in_rows, in_columns, d,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """features[row] @ weight[column].T in float32, [BM, BK]."""
    acc = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    a = features + row.to(tl.int64)[:, None] * d
    b = weight + column.to(tl.int64)[None, :] * d
    for start in range(0, d, BLOCK_D):
        i = start + tl.arange(0, BLOCK_D)  # [BD]
        x = tl.load(a + i[None, :], mask=in_rows[:, None] & (i < d)[None, :], other=0.0)  # [BM, BD]
        w = tl.load(b + i[:, None], mask=in_columns[None, :] & (i < d)[:, None], other=0.0)  # [BD, BK]
        if INTERPRETED:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def prototype_loss_fwd_kernel(
    student, student_weight, teacher, teacher_weight, center, loss, stats, scales, n, k, d,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scale_s = tl.load(scales).to(tl.float32)
    scale_t = tl.load(scales + 1).to(tl.float32)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    in_rows = row < n
    lowest = float("-inf")
    # Finite, so that nothing is NaN where all of the first block is -inf, as an infinite centre makes it.
    max_s = tl.full([BLOCK_M], -3.4028234663852886e38, dtype=tl.float32)
    max_t = tl.full([BLOCK_M], -3.4028234663852886e38, dtype=tl.float32)
    sum_s = tl.zeros([BLOCK_M], dtype=tl.float32)
    sum_t = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Sum of exp(teacher) * (student - max): all its terms have one sign, so nothing cancels in the loss.
    dot = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)  # [BK]
        inside = column < k
        t = _logits_tile(
            teacher, teacher_weight, row, column, in_rows, inside, d, BLOCK_M, BLOCK_K, BLOCK_D, PRECISION
        )  # [BM, BK]
        t -= tl.load(center + column, mask=inside, other=0.0)[None, :]
        t = tl.where(inside[None, :], t, lowest)
        new_t = tl.maximum(max_t, tl.max(t, axis=1))
        t = tl.exp2((t - new_t[:, None]) * scale_t)
        fade = tl.exp2((max_t - new_t) * scale_t)

        s = _logits_tile(student, student_weight, row, column, in_rows, inside, d, BLOCK_M, BLOCK_K, BLOCK_D, PRECISION)
        s = tl.where(inside[None, :], s, lowest)
        new_s = tl.maximum(max_s, tl.max(s, axis=1))
        s -= new_s[:, None]
        sum_s = sum_s * tl.exp2((max_s - new_s) * scale_s) + tl.sum(tl.exp2(s * scale_s), axis=1)
        # The terms so far were taken from the old maximum, of which there is none at first.
        dot = (dot + tl.where(start == 0, 0.0, max_s - new_s) * sum_t) * fade
        dot += tl.sum(t * tl.where(inside[None, :], s, 0.0), axis=1)
        sum_t = sum_t * fade + tl.sum(t, axis=1)
        max_s = new_s
        max_t = new_t
    tl.store(loss + row, tl.log(sum_s) - dot / sum_t * (scale_s * 0.6931471805599453), mask=in_rows)
    at = stats + row.to(tl.int64) * 4
    tl.store(at, max_s, mask=in_rows)
    tl.store(at + 1, 1.0 / sum_s, mask=in_rows)
    tl.store(at + 2, max_t, mask=in_rows)
    tl.store(at + 3, 1.0 / sum_t, mask=in_rows)


@triton.jit
def prototype_loss_columns_kernel(
    teacher, teacher_weight, center, stats, sums, scales, n, k, d, split_rows,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums[split] (K,) = the teacher's probabilities added over the rows of the split."""
    scale_t = tl.load(scales + 1).to(tl.float32)
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK]
    inside = column < k
    c = tl.load(center + column, mask=inside, other=0.0)
    first = tl.program_id(1) * split_rows
    total = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in range(first, tl.minimum(first + split_rows, n), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)  # [BM]
        in_rows = (row < n) & (row < first + split_rows)
        t = _logits_tile(
            teacher, teacher_weight, row, column, in_rows, inside, d, BLOCK_M, BLOCK_K, BLOCK_D, PRECISION
        )  # [BM, BK]
        at = stats + row.to(tl.int64) * 4
        max_t = tl.load(at + 2, mask=in_rows, other=0.0)
        inv_t = tl.load(at + 3, mask=in_rows, other=0.0)
        p = tl.exp2((t - c[None, :] - max_t[:, None]) * scale_t) * inv_t[:, None]
        total += tl.sum(tl.where(in_rows[:, None], p, 0.0), axis=0)
    tl.store(sums + tl.program_id(1).to(tl.int64) * k + column, total, mask=inside)


@triton.jit
def prototype_loss_delta_kernel(
    student, student_weight, teacher, teacher_weight, center, stats, delta, scales, n, k, d,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    scale_s = tl.load(scales).to(tl.float32)
    scale_t = tl.load(scales + 1).to(tl.float32)
    # Rows vary fastest: the programs that read the same prototypes run at the same time.
    row_blocks = tl.cdiv(n, BLOCK_M)
    row = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    column = tl.program_id(0) // row_blocks * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK]
    in_rows, inside = row < n, column < k
    at = stats + row.to(tl.int64) * 4

    t = _logits_tile(teacher, teacher_weight, row, column, in_rows, inside, d, BLOCK_M, BLOCK_K, BLOCK_D, PRECISION)
    t -= tl.load(center + column, mask=inside, other=0.0)[None, :]
    t = tl.exp2((t - tl.load(at + 2, mask=in_rows, other=0.0)[:, None]) * scale_t)
    t *= tl.load(at + 3, mask=in_rows, other=0.0)[:, None]
    s = _logits_tile(student, student_weight, row, column, in_rows, inside, d, BLOCK_M, BLOCK_K, BLOCK_D, PRECISION)
    s = tl.exp2((s - tl.load(at, mask=in_rows, other=0.0)[:, None]) * scale_s)
    s *= tl.load(at + 1, mask=in_rows, other=0.0)[:, None]
    tl.store(
        delta + row.to(tl.int64)[:, None] * k + column[None, :],
        (s - t).to(delta.dtype.element_ty),
        mask=in_rows[:, None] & inside[None, :],
    )


def forward(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    scales: Tensor,
    loss: Tensor,
    stats: Tensor,
    column_sum: Tensor | None,
) -> None:
    """Fill loss (N,) and stats (N, 4), float32; add the teacher's probabilities to column_sum (K,), float64, if any.

    Both factors of a side have one dtype: float32, bfloat16 or float16; all are contiguous. center (K,)
    float32, scales (2,) float64: log2(e) / temperature of student and teacher.
    """
    (n, d), k = student.shape, center.shape[0]
    options = _options(max(student.element_size(), teacher.element_size()), capability_of(student))
    grid = (triton.cdiv(n, options["BLOCK_M"]),)
    prototype_loss_fwd_kernel[grid](
        student, student_weight, teacher, teacher_weight, center, loss, stats, scales, n, k, d, **options,
    )  # fmt: skip
    if column_sum is None:
        return
    sums = stats.new_empty((-(-n // SPLIT_ROWS), k))
    grid = (triton.cdiv(k, options["BLOCK_K"]), sums.shape[0])
    prototype_loss_columns_kernel[grid](
        teacher, teacher_weight, center, stats, sums, scales, n, k, d, SPLIT_ROWS, **options
    )
    column_sum += sums.sum(0, dtype=torch.float64)


def delta(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    scales: Tensor,
    stats: Tensor,
    out: Tensor,
) -> None:
    """Fill out (N, K) with softmax(student) - softmax(teacher) from the forward's statistics; `out` may be 16-bit."""
    (n, d), k = student.shape, center.shape[0]
    options = _options(max(student.element_size(), teacher.element_size()), capability_of(student))
    grid = (triton.cdiv(n, options["BLOCK_M"]) * triton.cdiv(k, options["BLOCK_K"]),)
    prototype_loss_delta_kernel[grid](
        student, student_weight, teacher, teacher_weight, center, stats, out, scales, n, k, d, **options,
    )  # fmt: skip


def _aot() -> list[Launch]:
    """Every kernel with the tiles of each architecture; float16 costs what bfloat16 does."""
    launches = []
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        signature: dict[str, str] = dict.fromkeys(
            ("student", "student_weight", "teacher", "teacher_weight", "delta"), f"*{dtype}"
        )
        signature |= dict.fromkeys(("center", "loss", "stats", "sums"), "*fp32")
        signature |= dict.fromkeys(("n", "k", "d", "split_rows"), "i32")
        signature["scales"] = "*fp64"
        launched = by_options(functools.partial(_options, itemsize))
        for kernel in (prototype_loss_fwd_kernel, prototype_loss_columns_kernel, prototype_loss_delta_kernel):
            for options, capabilities in launched:
                constexprs = dict(options)
                launches.append(
                    Launch(
                        name=f"{kernel.fn.__name__.removesuffix('_kernel')} {dtype} sm_{capabilities[0]}",
                        kernel=kernel,
                        signature=signature,
                        num_warps=constexprs.pop("num_warps"),
                        num_stages=constexprs.pop("num_stages"),
                        constexprs=constexprs,
                        divisible=("k", "d", "split_rows"),
                        capabilities=capabilities,
                    )
                )
    return launches


AOT = _aot()
