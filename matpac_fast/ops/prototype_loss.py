"""prototype_loss: cross-entropy between the teacher's and the student's distributions over prototypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import choose, without_autocast
from ..reference import work_dtype
from ._check import FLOATS, check_shape, check_tensor
from ._once import implement, once_differentiable, under_autograd
from ._products import mm
from ._prototype_launchers import LAUNCHERS, delta_dtype

_MEANS = ("probabilities", "logits")

# softmax(student) - softmax(teacher), called delta below, is the gradient but for a factor a row. Up to this many bytes
# it is kept for the backward pass (34,048 x 2,048 takes half of it in float32); beyond, it is computed again.
_KEEP_BYTES = 2**29


def _check(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    mean_of: str,
) -> None:
    op = "prototype_loss"
    check_tensor(op, "student", student, 2, FLOATS)
    check_tensor(op, "student_weight", student_weight, 2, FLOATS, like=student)
    check_tensor(op, "teacher", teacher, 2, FLOATS, like=student)
    check_tensor(op, "teacher_weight", teacher_weight, 2, FLOATS, like=student)
    check_tensor(op, "center", center, 1, FLOATS, like=student)
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
            check_tensor(op, name, value, 0)
        elif not 0 < value < float("inf"):
            raise ValueError(f"{op}: {name} is {value}; expected a positive number")
    if mean_of not in _MEANS:
        raise ValueError(f"{op}: mean_of is {mean_of!r}; expected one of {', '.join(_MEANS)}")


_Forward = tuple[Tensor, Tensor, Tensor, Tensor]


def _outputs(sides: tuple[Tensor, ...], keep: bool) -> _Forward:
    """Empty loss (N,), mean (K,), statistics (N, 4) and delta: (N, K) where it is kept, else (0, K)."""
    student, student_weight = sides[:2]
    n, k = student.shape[0], student_weight.shape[0]
    work = work_dtype(*sides[:4])
    return (
        student.new_empty((n,), dtype=work),
        student.new_empty((k,), dtype=work),
        student.new_empty((n, 4), dtype=work),
        student.new_empty((n if keep else 0, k), dtype=delta_dtype(student, student_weight, work)),
    )


def _impl(*args: Any) -> _Forward:
    *sides, temps, mean_of, keep, launcher = args
    with torch.autocast(temps.device.type, enabled=False):
        return _forward(tuple(sides), temps, mean_of, keep, launcher)


def _forward(sides: tuple[Tensor, ...], temps: Tensor, mean_of: str, keep: bool, launcher: str) -> _Forward:
    loss, mean, stats, delta = _outputs(sides, keep)
    n, k = loss.shape[0], mean.shape[0]
    column_sum = mean.new_zeros(k, dtype=torch.float64) if mean_of == "probabilities" else None
    LAUNCHERS[launcher](launcher, sides, temps).forward(loss, stats, delta if keep else None, column_sum)
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
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    center: Tensor | None,
    stats: Tensor,
    delta: Tensor,
    temps: Tensor,
    for_student: bool,
    for_weight: bool,
    launcher: str,
) -> tuple[Tensor, Tensor]:
    work = stats.dtype
    factor = (grad / temps[0])[:, None]  # (N, 1)
    # The factor goes to the narrow side of both products. In 16 bits it is scaled to at most 1 before it is rounded:
    # that of a mean over many rows would be subnormal in float16.
    largest = 1.0 if delta.dtype == work or not len(factor) else factor.abs().amax().clamp_min(torch.finfo(work).tiny)
    # Each product is taken in `work` and rounded as it is written: one pass.
    features = torch.mul(student, factor / largest, out=delta.new_empty(student.shape))
    weight = student_weight.to(delta.dtype)
    grad_student = student.new_empty(student.shape if for_student else (0,))
    sums = student.new_zeros(student_weight.shape if for_weight else (0,), dtype=work)

    rest = None
    if teacher is not None and teacher_weight is not None and center is not None:
        sides = (student, student_weight, teacher, teacher_weight, center)
        rest = LAUNCHERS[launcher](launcher, sides, temps)
    for rows in [slice(0, student.shape[0])] if rest is None else rest.chunks:
        part = delta if rest is None else rest.delta(rows, stats[rows], delta.dtype)
        if for_student:
            torch.mul(mm(part, weight, work), factor[rows], out=grad_student[rows])
        if for_weight:
            sums += mm(part.T, features[rows], work)
    return grad_student, (sums * largest).to(student_weight.dtype)


_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
_SIDES = "Tensor student, Tensor student_weight, Tensor teacher, Tensor teacher_weight, Tensor center"
_LIB.define(
    f"prototype_loss({_SIDES}, Tensor temps, str mean_of, bool keep, str launcher)"
    " -> (Tensor loss, Tensor mean, Tensor stats, Tensor delta)"
)
_LIB.define(
    # The teacher's side is there where delta is not.
    "prototype_loss_backward(Tensor grad, Tensor student, Tensor student_weight, Tensor? teacher, "
    "Tensor? teacher_weight, Tensor? center, Tensor stats, Tensor delta, Tensor temps, "
    "bool for_student, bool for_weight, str launcher) -> (Tensor, Tensor)"
)


def _fake(*args: Any) -> _Forward:
    return _outputs(args[:5], keep=args[7])


def _backward_fake(grad: Tensor, student: Tensor, student_weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    for_student, for_weight = args[-3:-1]
    return (
        student.new_empty(student.shape if for_student else (0,)),
        student_weight.new_empty(student_weight.shape if for_weight else (0,)),
    )


implement(_LIB, "prototype_loss", _impl, _fake)
implement(_LIB, "prototype_loss_backward", _backward_impl, _backward_fake)


class _PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> _Forward:  # type: ignore[override]
        with torch._C._AutoDispatchBelowAutograd():
            loss, mean, stats, delta = torch.ops.matpac_fast.prototype_loss(*args)
        # A training step may move the teacher and the centre in place before it goes backwards, as the official one
        # does: what is needed of them is copied.
        copies = [None] * 3 if args[7] else [t.clone() for t in args[2:5]]
        ctx.save_for_backward(*args[:2], *copies, stats, delta, args[5])
        ctx.launcher = args[8]
        ctx.mark_non_differentiable(mean, stats, delta)
        ctx.set_materialize_grads(False)  # zeros as large as delta
        return loss, mean, stats, delta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return (None,) * 9
        wanted = ctx.needs_input_grad[:2]
        grads = torch.ops.matpac_fast.prototype_loss_backward(grad, *ctx.saved_tensors, *wanted, ctx.launcher)
        return *(g if want else None for g, want in zip(grads, wanted, strict=True)), *[None] * 7


def _differentiable(student: Tensor, student_weight: Tensor, *rest: Any) -> bool:
    return torch.is_grad_enabled() and (student.requires_grad or student_weight.requires_grad)


under_autograd(_LIB, "prototype_loss", _PrototypeLoss, _differentiable)


def _temperature(value: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64)
    if torch.compiler.is_compiling():
        # A float that changes from call to call is traced once where it multiplies a tensor, and anew elsewhere.
        return torch.ones((), dtype=torch.float64, device=device) * value
    return torch.full((), value, dtype=torch.float64, device=device)


def prototype_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
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
        student_temp, teacher_temp: positive; the official code has 0.1 and 0.04 to 0.07. Python floats, or tensors
            () on any device, whose values are not checked, for that would wait for the GPU.
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
    The teacher and the centre may move in place before the backward pass. Autocast does not apply inside: the
    arguments' dtypes decide, so under autocast pass what the products should run in. Extra memory: a chunk of logits a
    side (64 rows or a few MB; with Triton none), and N x K values for the backward pass unless that makes more than
    512 MiB: then it computes them again.
    """
    _check(student, student_weight, teacher, teacher_weight, center, student_temp, teacher_temp, mean_of)
    sides = (student, student_weight, teacher, teacher_weight, center)
    temps = _temperature(student_temp, student.device), _temperature(teacher_temp, student.device)
    work = work_dtype(*sides[:4])
    launcher = choose("prototype_loss", student.device, work)
    if launcher == "reference":
        with without_autocast(student.device):
            return reference.prototype_loss(*sides, *temps, mean_of)
    itemsize = delta_dtype(student, student_weight, work).itemsize
    size = student.shape[0] * student_weight.shape[0] * itemsize
    keep = _differentiable(student, student_weight) and launcher != "triton" and size <= _KEEP_BYTES
    loss, mean, _, _ = torch.ops.matpac_fast.prototype_loss(*sides, torch.stack(temps), mean_of, keep, launcher)
    return loss, mean
