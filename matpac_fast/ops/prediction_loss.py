"""prediction_loss: 2 - 2 cos between what the predictor says and what the teacher makes of the masked patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backend, reference
from ..backend import device_guard, fuses, takes_cpp
from ..reference import work_dtype
from ._check import FLOATS, check_shape, check_tensor, shape_of
from ._native import DTYPE, address
from ._once import implement, once_differentiable, under_autograd

_OP = "prediction_loss"
_EPS = 1e-12  # of torch's normalize


def _check(prediction: Tensor, target: Tensor, temperature: float | Tensor | None) -> None:
    check_tensor(_OP, "prediction", prediction, dtypes=FLOATS)
    expected = "(N, D) without a temperature" if temperature is None else "(N, H, D) of H heads with a temperature"
    if prediction.ndim != (2 if temperature is None else 3):
        raise ValueError(f"{_OP}: prediction is {shape_of(prediction)}; expected {expected}")
    check_tensor(_OP, "target", target, 2, FLOATS, like=prediction)
    rows = (prediction.shape[0], prediction.shape[-1])
    check_shape(_OP, "target", target, rows, "(N, D) of the prediction")
    if prediction.ndim == 3 and prediction.shape[1] < 1:
        raise ValueError(f"{_OP}: prediction has no heads; expected (N, H, D) with H at least 1")
    if isinstance(temperature, Tensor):
        check_tensor(_OP, "temperature", temperature, 0)
    elif temperature is not None and not temperature >= 0:
        raise ValueError(f"{_OP}: temperature is {temperature}; expected a number from 0, or None without heads")


def _heads(prediction: Tensor) -> int:
    return prediction.shape[1] if prediction.ndim == 3 else 1


def _is_native(tensor: Tensor) -> bool:
    """Whether C++ is what has kernels for it: all on the CPU but what Triton's interpreter is forced for."""
    return tensor.device.type == "cpu" and not (backend.INTERPRETED and backend._forced == "triton")


def _is_fused(prediction: Tensor, target: Tensor) -> bool:
    dtype = torch.promote_types(prediction.dtype, target.dtype)
    return takes_cpp(_OP, prediction.device) or fuses(_OP, prediction.device, dtype)


def _launch_cpp(
    prediction: Tensor,
    target: Tensor,
    stats: Tensor,
    *,
    loss: Tensor | None = None,
    grad: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """Fill loss and stats, or from stats and grad `out`; all of one dtype and contiguous."""
    from .. import _C

    args = _C.PredictionLossArgs(
        address(prediction),
        address(target),
        DTYPE[target.dtype],
        prediction.shape[0],
        _heads(prediction),
        prediction.shape[-1],
        _EPS,
        address(loss),
        address(stats),
        address(grad),
        address(out),
    )
    _C.prediction_loss_cpu(args, grad is not None, torch.get_num_threads())


def _impl(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if _is_native(prediction):
        work = work_dtype(prediction, target)
        loss, stats = _fake(prediction, target)
        _launch_cpp(prediction.to(work).contiguous(), target.to(work).contiguous(), stats, loss=loss)
        return loss, stats
    from ..kernels.prediction_loss import forward

    with device_guard(prediction):
        loss, stats = forward(prediction.contiguous().flatten(0, -2), target.contiguous(), _heads(prediction), _EPS)
    return loss.view(prediction.shape[:-1]), stats


def _backward_impl(grad: Tensor, prediction: Tensor, target: Tensor, stats: Tensor) -> Tensor:
    if _is_native(prediction):
        work = work_dtype(prediction, target)
        given, target, grad = (t.to(work).contiguous() for t in (prediction, target, grad))
        out = torch.empty_like(given)
        _launch_cpp(given, target, stats.contiguous(), grad=grad, out=out)
        return out.to(prediction.dtype)
    from ..kernels.prediction_loss import backward

    rows, grad, heads = prediction.contiguous().flatten(0, -2), grad.contiguous().flatten(), _heads(prediction)
    with device_guard(prediction):
        return backward(grad, rows, target.contiguous(), stats, heads, _EPS).view_as(prediction)


def _fake(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    loss = prediction.new_empty(prediction.shape[:-1], dtype=work_dtype(prediction, target))
    return loss, loss.new_empty((loss.numel(), 3))


_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
_LIB.define("prediction_distance(Tensor prediction, Tensor target) -> (Tensor, Tensor)")
_LIB.define("prediction_distance_backward(Tensor grad, Tensor prediction, Tensor target, Tensor stats) -> Tensor")
implement(_LIB, "prediction_distance", _impl, _fake)
implement(
    _LIB,
    "prediction_distance_backward",
    _backward_impl,
    lambda grad, prediction, target, stats: prediction.new_empty(prediction.shape),
)


class _Distance(torch.autograd.Function):
    """(N, [H,] D) and the target (N, D) -> 2 - 2 cos, (N, [H]); either kernel reads both once."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with torch._C._AutoDispatchBelowAutograd():
            loss, stats = torch.ops.matpac_fast.prediction_distance(prediction, target)
        ctx.save_for_backward(prediction, target, stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad is None:
            return None, None
        return torch.ops.matpac_fast.prediction_distance_backward(grad, *ctx.saved_tensors), None


under_autograd(_LIB, "prediction_distance", _Distance)


def prediction_loss(
    prediction: Tensor, target: Tensor, temperature: float | Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """2 - 2 cos(prediction, target) a masked patch; with the heads of MATPAC++, their soft or hard minimum.

    The prediction loss of MATPAC (2502.12031) and its multiple-choice form (MATPAC++, 2508.12709). One kernel in either
    direction, C++ on a CPU and Triton on a GPU, that never stores unit vectors as large as the predictions; without
    them PyTorch.

    Args:
        prediction: (N, D), or (N, H, D) with heads; float32, float64, bfloat16 or float16.
        target: (N, D); it gets a gradient only through the PyTorch reference, which is then what runs.
        temperature: with heads: they are weighed by softmax(-loss / temperature), which carries no gradient; 0 takes
            the minimum. None without heads. A tensor () on the device is positive, which is not checked, for that
            would wait for a GPU.

    Returns:
        loss (N,), in float32 or float64, and the best head (N,) int64, or None without heads.

    Raises:
        TypeError: an argument that is no tensor, or a dtype that is not listed.
        ValueError: shapes or devices that do not fit, a negative temperature.

    The gradient reaches the prediction, the same bits every time, of a kernel once differentiable. Autocast does not
    apply inside.
    """
    _check(prediction, target, temperature)
    plain = backend._forced == "reference" or (torch.is_grad_enabled() and target.requires_grad)
    if plain or not _is_fused(prediction, target) or backend.transformed():
        return reference.prediction_loss(prediction, target, temperature)
    loss, _ = torch.ops.matpac_fast.prediction_distance(prediction, target)
    return (loss, None) if temperature is None else reference.over_heads(loss, temperature)
