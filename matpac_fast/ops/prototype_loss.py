"""prototype_loss: cross-entropy between the teacher's and the student's distributions over prototypes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import choose, device_guard
from ._check import check_shape, check_tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NATIVE_DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 3, torch.float16: 5}
_MEANS = ("probabilities", "logits")

# softmax(student) - softmax(teacher), called delta below, is the gradient but for a factor a row. Up to this many bytes
# it is kept for the backward pass (34,048 x 2,048 takes half of it in float32); beyond, it is computed again.
_KEEP_BYTES = 2**29
# Logits come in chunks of rows of this many bytes: on the CPU a share of the cache, since they are read again at once;
# on a GPU enough to fill it with one matrix product. But never fewer rows than make a product worth its while.
_CHUNK_BYTES = {"cpu": 2**23, "cuda": 2**26}
_MIN_ROWS = 64
# Blocks of the CUDA kernel; each sums the probabilities of its rows, and the shape alone must decide of which.
_BLOCKS = 512
_BLOCKS_BYTES = 2**26
# torch >= 2.8 multiplies 16-bit matrices into a float32 result.
_MM_INTO_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads()


def _check(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    mean_of: str,
) -> None:
    op = "prototype_loss"
    check_tensor(op, "student", student, 2, _DTYPES)
    check_tensor(op, "student_weight", student_weight, 2, _DTYPES, like=student)
    check_tensor(op, "teacher", teacher, 2, _DTYPES, like=student)
    check_tensor(op, "teacher_weight", teacher_weight, 2, _DTYPES, like=student)
    check_tensor(op, "center", center, 1, _DTYPES, like=student)
    n, d = student.shape
    k = student_weight.shape[0]
    if k < 1 or d < 1:
        raise ValueError(f"{op}: {k} prototypes for {d} features; expected at least one of each")
    check_shape(op, "student_weight", student_weight, (k, d), "(K, d) for a student of (N, d)")
    check_shape(op, "teacher", teacher, (n, d), "the shape of student")
    check_shape(op, "teacher_weight", teacher_weight, (k, d), "the shape of student_weight")
    check_shape(op, "center", center, (k,), "one value a prototype")
    for name, value in (("student_temp", student_temp), ("teacher_temp", teacher_temp)):
        if isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} is a tensor; expected a Python float: pass {name}.item()")
        if not 0 < value < float("inf"):
            raise ValueError(f"{op}: {name} is {value}; expected a positive number")
    if mean_of not in _MEANS:
        raise ValueError(f"{op}: mean_of is {mean_of!r}; expected one of {', '.join(_MEANS)}")


def _work(*tensors: Tensor) -> torch.dtype:
    """The dtype of logits, softmax, loss and mean: float64 if any input is, else float32."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def _mm(a: Tensor, b: Tensor, work: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b in `work`; `out` is where the result may go."""
    return torch.mm(a, b, out=out) if a.dtype == work else torch.mm(a, b, out_dtype=work)


def _delta_dtype(student: Tensor, weight: Tensor, work: torch.dtype) -> torch.dtype:
    """What the gradients' products multiply: `work`, or on a GPU the 16 bits of both its factors."""
    return student.dtype if _MM_INTO_FLOAT32 and student.is_cuda and student.dtype == weight.dtype else work


class _Sides:
    """Both sides' factors, each side's two in one dtype, and the rows in chunks of bounded logits."""

    def __init__(self, launcher: str, sides: tuple[Tensor, ...], student_temp: float, teacher_temp: float):
        student, student_weight, teacher, teacher_weight, center = sides
        self.launcher = launcher
        self.work = _work(*sides[:4])
        self.student, self.student_weight = self._factors(student, student_weight)
        self.teacher, self.teacher_weight = self._factors(teacher, teacher_weight)
        center = center.to(self.work).contiguous()
        # The kernels load aligned vectors, and a slice of a longer tensor need not be aligned.
        self.center = center if center.data_ptr() % 32 == 0 else center.clone()
        self.temps = student_temp, teacher_temp
        n, k = student.shape[0], center.shape[0]
        rows = max(_MIN_ROWS, _CHUNK_BYTES[student.device.type] // (k * self.work.itemsize))
        self.chunks = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]

    def _factors(self, features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """16 bits stay 16 bits where the product comes out in `work` nevertheless."""
        in_16_bits = features.dtype == weight.dtype and features.dtype.itemsize == 2
        if in_16_bits and (self.launcher == "triton" or (_MM_INTO_FLOAT32 and features.is_cuda)):
            return features, weight
        return features.to(self.work), weight.to(self.work)


class _Native(_Sides):
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
            _mm(self.student[rows], self.student_weight.T, self.work, out),
            _mm(self.teacher[rows], self.teacher_weight.T, self.work, self._buffer(1, rows)),
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

        def address(tensor: Tensor | None) -> int:
            return 0 if tensor is None else tensor.data_ptr()

        return _C.PrototypeLossArgs(
            address(student),
            address(teacher),
            address(self.center),
            _NATIVE_DTYPE[self.work],
            student.shape[0],
            student.shape[1],
            *self.temps,
            address(loss),
            address(stats),
            address(delta),
            _NATIVE_DTYPE[self.work if delta is None else delta.dtype],
            address(column_sum),
        )


def _stream(device: torch.device) -> tuple[int, int]:
    stream = torch.cuda.current_stream(device)
    return stream.device_index, stream.cuda_stream


class _Fused(_Sides):
    """Triton, which multiplies a tile of logits at a time."""

    def forward(self, loss: Tensor, stats: Tensor, delta: Tensor | None, column_sum: Tensor | None) -> None:
        from ..kernels import prototype_loss as kernels

        if not self.chunks:
            return
        with device_guard(loss):
            kernels.forward(*self._tensors(slice(None)), self.temps, loss, stats, column_sum)
            if delta is not None:
                for rows in self.chunks:
                    kernels.delta(*self._tensors(rows), self.temps, stats[rows], delta[rows])

    def delta(self, rows: slice, stats: Tensor, dtype: torch.dtype) -> Tensor:
        """softmax(student) - softmax(teacher) of some rows."""
        from ..kernels import prototype_loss as kernels

        delta = stats.new_empty((stats.shape[0], self.center.shape[0]), dtype=dtype)
        with device_guard(delta):
            kernels.delta(*self._tensors(rows), self.temps, stats, delta)
        return delta

    def _tensors(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            self.student[rows].contiguous(),
            self.student_weight.contiguous(),
            self.teacher[rows].contiguous(),
            self.teacher_weight.contiguous(),
            self.center,
        )


_LAUNCHERS: dict[str, type[_Native] | type[_Fused]] = {"cpp": _Native, "cuda": _Native, "triton": _Fused}

_Forward = tuple[Tensor, Tensor, Tensor, Tensor]


def _outputs(sides: tuple[Tensor, ...], keep: bool) -> _Forward:
    """Empty loss (N,), mean (K,), statistics (N, 4) and delta: (N, K) where it is kept, else (0, K)."""
    student, student_weight = sides[:2]
    n, k = student.shape[0], student_weight.shape[0]
    work = _work(*sides[:4])
    return (
        student.new_empty((n,), dtype=work),
        student.new_empty((k,), dtype=work),
        student.new_empty((n, 4), dtype=work),
        student.new_empty((n if keep else 0, k), dtype=_delta_dtype(student, student_weight, work)),
    )


def _impl(*args: Any) -> _Forward:
    *sides, student_temp, teacher_temp, mean_of, keep, launcher = args
    with torch.autocast(sides[0].device.type, enabled=False):
        return _forward(tuple(sides), student_temp, teacher_temp, mean_of, keep, launcher)


def _forward(
    sides: tuple[Tensor, ...], student_temp: float, teacher_temp: float, mean_of: str, keep: bool, launcher: str
) -> _Forward:
    loss, mean, stats, delta = _outputs(sides, keep)
    n, k = loss.shape[0], mean.shape[0]
    column_sum = mean.new_zeros(k, dtype=torch.float64) if mean_of == "probabilities" else None
    _LAUNCHERS[launcher](launcher, sides, student_temp, teacher_temp).forward(
        loss, stats, delta if keep else None, column_sum
    )
    if column_sum is not None:
        return loss, (column_sum / n).to(loss.dtype), stats, delta
    # The mean of the logits is the logits of the mean.
    teacher, teacher_weight = (t.to(loss.dtype) for t in sides[2:4])
    return loss, teacher_weight @ teacher.mean(0), stats, delta


def _backward_impl(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    with torch.autocast(grad.device.type, enabled=False):
        return _backward(grad, *args)


def _backward(
    grad: Tensor,
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    stats: Tensor,
    delta: Tensor,
    student_temp: float,
    teacher_temp: float,
    for_student: bool,
    for_weight: bool,
    launcher: str,
) -> tuple[Tensor, Tensor]:
    if student.shape[0] == 0:
        return torch.zeros_like(student), torch.zeros_like(student_weight)
    work = stats.dtype
    factor = (grad / student_temp)[:, None]  # (N, 1)
    # The factor goes to the narrow side of both products. In 16 bits it is scaled to at most 1 before it is rounded:
    # that of a mean over many rows would be subnormal in float16.
    largest = 1.0 if delta.dtype == work else factor.abs().amax().clamp_min(torch.finfo(work).tiny)
    features = (student.to(work) * (factor / largest)).to(delta.dtype)
    weight = student_weight.to(delta.dtype)
    grad_student = student.new_empty(student.shape if for_student else (0,))
    sums = student.new_zeros(student_weight.shape if for_weight else (0,), dtype=work)

    kept = delta.shape[0] == student.shape[0]
    sides = (student, student_weight, teacher, teacher_weight, center)
    rest = None if kept else _LAUNCHERS[launcher](launcher, sides, student_temp, teacher_temp)
    for rows in [slice(0, student.shape[0])] if rest is None else rest.chunks:
        part = delta if rest is None else rest.delta(rows, stats[rows], delta.dtype)
        if for_student:
            grad_student[rows] = _mm(part, weight, work) * factor[rows]
        if for_weight:
            sums += _mm(part.T, features[rows], work)
    return grad_student, (sums * largest).to(student_weight.dtype)


_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
_SIDES = "Tensor student, Tensor student_weight, Tensor teacher, Tensor teacher_weight, Tensor center"
_LIB.define(
    f"prototype_loss({_SIDES}, float student_temp, float teacher_temp, str mean_of, bool keep, str launcher)"
    " -> (Tensor loss, Tensor mean, Tensor stats, Tensor delta)"
)
_LIB.define(
    f"prototype_loss_backward(Tensor grad, {_SIDES}, Tensor stats, Tensor delta, float student_temp, "
    "float teacher_temp, bool for_student, bool for_weight, str launcher) -> (Tensor, Tensor)"
)
for _device in ("CPU", "CUDA"):
    _LIB.impl("prototype_loss", _impl, _device)
    _LIB.impl("prototype_loss_backward", _backward_impl, _device)


def _fake(*args: Any) -> _Forward:
    return _outputs(args[:5], keep=args[8])


def _backward_fake(grad: Tensor, student: Tensor, student_weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    for_student, for_weight = args[-3:-1]
    return (
        student.new_empty(student.shape if for_student else (0,)),
        student_weight.new_empty(student_weight.shape if for_weight else (0,)),
    )


torch.library.register_fake("matpac_fast::prototype_loss", _fake, lib=_LIB)
torch.library.register_fake("matpac_fast::prototype_loss_backward", _backward_fake, lib=_LIB)


class _PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> _Forward:  # type: ignore[override]
        with torch._C._AutoDispatchBelowAutograd():
            loss, mean, stats, delta = torch.ops.matpac_fast.prototype_loss(*args)
        ctx.save_for_backward(*args[:5], stats, delta)
        ctx.temps, ctx.launcher = args[5:7], args[9]
        ctx.mark_non_differentiable(mean, stats, delta)
        return loss, mean, stats, delta

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wanted = ctx.needs_input_grad[:2]
        grads = torch.ops.matpac_fast.prototype_loss_backward(
            grad, *ctx.saved_tensors, *ctx.temps, *wanted, ctx.launcher
        )
        return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *[None] * 8


_LIB.impl("prototype_loss", lambda *args: _PrototypeLoss.apply(*args), "Autograd")


def prototype_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    mean_of: str = "probabilities",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(student logits / temp) against softmax((teacher logits - center) / temp), a row.

    With q and p these two distributions and z the student's logits, loss = log sum exp(z / temp) - p . z / temp and
    its gradient by z is (q - p) / temp. The logits, features @ prototypes.T, exist for a chunk of rows at a time and
    never in fewer than 32 bits: at a temperature of 0.04 rounding them to bfloat16 would cost 0.05 in the exponent.
    The classification loss of MATPAC (2502.12031), which is DINO's (2104.14294) with another centre.

    Args:
        student, teacher: (N, d) features, float32, float64, bfloat16 or float16; on a GPU bfloat16 is the fast one.
        student_weight, teacher_weight: (K, d) prototypes, already weight-normed; dtypes as above. Any strides.
        center: (K,) subtracted from the teacher's logits.
        student_temp, teacher_temp: positive Python floats; the official code has 0.1 and 0.04 to 0.07.
        mean_of: the mean over rows of the teacher's "probabilities" (the official centre is made of these) or of its
            "logits" before the centre is taken off (DINO's).

    Returns:
        loss (N,) and teacher_mean (K,), float32, or float64 if any features or prototypes are; without rows the mean
        is NaN. The same bits on every call and, but for torch's own matrix products, for any number of threads.

    Raises:
        TypeError: an argument that is no tensor, or a dtype that is not listed.
        ValueError: shapes that do not fit, tensors on different devices, a temperature that is not positive, an
            unknown `mean_of`.

    Gradients reach `student` and `student_weight`, once differentiable; never the teacher's side or the centre.
    Autocast does not apply inside: the arguments' dtypes decide, so under autocast pass what the products should run
    in. Extra memory: one chunk of logits a side (at least 64 rows), and N x K values for the backward pass up to
    512 MiB, beyond which it computes them again: K = 131,072 needs no more than K = 2,048.
    """
    _check(student, student_weight, teacher, teacher_weight, center, student_temp, teacher_temp, mean_of)
    sides = (student, student_weight, teacher, teacher_weight, center)
    launcher = choose("prototype_loss", student.device)
    if launcher == "reference":
        with torch.autocast(student.device.type, enabled=False):
            return reference.prototype_loss(*sides, student_temp, teacher_temp, mean_of)
    if launcher == "triton" and _work(*sides[:4]) == torch.float64:
        raise TypeError("prototype_loss: the Triton kernels have no float64; use_backend('reference') has")
    differentiable = torch.is_grad_enabled() and (student.requires_grad or student_weight.requires_grad)
    itemsize = _delta_dtype(student, student_weight, _work(*sides[:4])).itemsize
    size = student.shape[0] * student_weight.shape[0] * itemsize
    keep = differentiable and launcher != "triton" and size <= _KEEP_BYTES
    loss, mean, _, _ = torch.ops.matpac_fast.prototype_loss(
        *sides, float(student_temp), float(teacher_temp), mean_of, keep, launcher
    )
    return loss, mean
