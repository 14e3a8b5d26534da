"""What runs prototype_loss: torch's matrix products with the native row kernels, or Triton with products of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..backend import device_guard
from ..reference import work_dtype
from ._native import DTYPE, address
from ._products import mm, widens

# Logits come in chunks of rows of this many bytes: on the CPU a share of the cache, since they are read again at once;
# on a GPU enough to fill it with one matrix product. But never fewer rows than make a product worth its while.
_CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**26}
_MIN_ROWS = 64
# Blocks of the CUDA kernel; each sums the probabilities of its rows, and the shape alone must decide of which.
_BLOCKS = 512
_BLOCKS_BYTES = 2**26


def delta_dtype(student: Tensor, weight: Tensor, work: torch.dtype) -> torch.dtype:
    """What the gradients' products multiply: `work`, or on a GPU the 16 bits of both its factors."""
    return student.dtype if _both_16_bit(student, weight, work) and widens(student) else work


def _both_16_bit(a: Tensor, b: Tensor, work: torch.dtype) -> bool:
    return a.dtype == b.dtype and a.dtype.itemsize == 2 and work == torch.float32


class Sides:
    """Both sides' factors, each side's two in one dtype, and the rows in chunks of bounded logits."""

    def __init__(self, launcher: str, sides: tuple[Tensor, ...], temps: Tensor):
        student, student_weight, teacher, teacher_weight, center = sides
        self.launcher = launcher
        self.work = work_dtype(*sides[:4])
        self.student, self.student_weight = self._factors(student, student_weight)
        self.teacher, self.teacher_weight = self._factors(teacher, teacher_weight)
        center = center.to(self.work).contiguous()
        # The kernels load aligned vectors, and a slice of a longer tensor need not be aligned.
        self.center = center if center.data_ptr() % 32 == 0 else center.clone()
        self.scales = math.log2(math.e) / temps  # softmax in powers of two
        n, k = student.shape[0], center.shape[0]
        rows = max(_MIN_ROWS, _CHUNK_BYTES[student.device.type] // (k * self.work.itemsize))
        self.chunks = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]

    def _factors(self, features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """16 bits stay 16 bits where the product comes out in `work` nevertheless."""
        if _both_16_bit(features, weight, self.work) and (self.launcher == "triton" or widens(features)):
            return features, weight
        return features.to(self.work), weight.to(self.work)


class Native(Sides):
    """torch's matrix products into a chunk of logits, and the native kernels on it."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.buffers: list[Tensor | None] = [None, None]

    def forward(self, loss: Tensor, stats: Tensor, delta: Tensor | None, column_sum: Tensor | None) -> None:
        from .. import _C

        for rows in self.chunks:
            part = None if delta is None else delta[rows]
            student, teacher = self._logits(rows, out=part)
            args = self._args(student, teacher, stats[rows], part, loss[rows], column_sum)
            if self.launcher == "cpp":
                _C.prototype_loss_forward_cpu(args, torch.get_num_threads())
                continue
            n, k = student.shape
            blocks = max(1, min(n, _BLOCKS, _BLOCKS_BYTES // (k * self.work.itemsize)))
            columns = student.new_empty((0 if column_sum is None else blocks, k))
            _C.prototype_loss_forward_cuda(args, columns.data_ptr(), blocks, *_stream(student.device))

    def delta(self, rows: slice, stats: Tensor, dtype: torch.dtype) -> Tensor:
        """softmax(student) - softmax(teacher) of some rows, valid until the next call."""
        from .. import _C

        student, teacher = self._logits(rows)
        delta = student if dtype == self.work else student.new_empty(student.shape, dtype=dtype)
        args = self._args(student, teacher, stats, delta)
        if self.launcher == "cpp":
            _C.prototype_loss_delta_cpu(args, torch.get_num_threads())
        else:
            _C.prototype_loss_delta_cuda(args, *_stream(student.device))
        return delta

    def _logits(self, rows: slice, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits (rows, K) of the student and of the teacher, valid until the next call; `out` may take the first."""
        if out is None or out.dtype != self.work:
            out = self._buffer(0, rows)
        return (
            mm(self.student[rows], self.student_weight.T, self.work, out),
            mm(self.teacher[rows], self.teacher_weight.T, self.work, self._buffer(1, rows)),
        )

    def _buffer(self, side: int, rows: slice) -> Tensor:
        whole = self.buffers[side]
        if whole is None:  # the first chunk is the longest
            whole = self.center.new_empty((rows.stop - rows.start, self.center.shape[0]))
            self.buffers[side] = whole
        return whole[: rows.stop - rows.start]

    def _args(
        self,
        student: Tensor,
        teacher: Tensor,
        stats: Tensor,
        delta: Tensor | None,
        loss: Tensor | None = None,
        column_sum: Tensor | None = None,
    ) -> Any:
        from .. import _C

        return _C.PrototypeLossArgs(
            address(student),
            address(teacher),
            address(self.center),
            DTYPE[self.work],
            student.shape[0],
            student.shape[1],
            address(self.scales),
            address(loss),
            address(stats),
            address(delta),
            DTYPE[self.work if delta is None else delta.dtype],
            address(column_sum),
        )


def _stream(device: torch.device) -> tuple[int, int]:
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


class Fused(Sides):
    """Triton, which multiplies a tile of logits at a time."""

    def forward(self, loss: Tensor, stats: Tensor, delta: Tensor | None, column_sum: Tensor | None) -> None:
        from ..kernels import prototype_loss as kernels

        if not self.chunks:
            return
        with device_guard(loss):
            kernels.forward(*self._tensors(slice(None)), self.scales, loss, stats, column_sum)
            if delta is not None:
                for rows in self.chunks:
                    kernels.delta(*self._tensors(rows), self.scales, stats[rows], delta[rows])

    def delta(self, rows: slice, stats: Tensor, dtype: torch.dtype) -> Tensor:
        """softmax(student) - softmax(teacher) of some rows."""
        from ..kernels import prototype_loss as kernels

        delta = stats.new_empty((stats.shape[0], self.center.shape[0]), dtype=dtype)
        with device_guard(delta):
            kernels.delta(*self._tensors(rows), self.scales, stats, delta)
        return delta

    def _tensors(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            self.student[rows].contiguous(),
            self.student_weight.contiguous(),
            self.teacher[rows].contiguous(),
            self.teacher_weight.contiguous(),
            self.center,
        )


LAUNCHERS: dict[str, type[Native] | type[Fused]] = {"cpp": Native, "cuda": Native, "triton": Fused}
