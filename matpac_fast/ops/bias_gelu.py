"""bias_gelu: gelu(h + bias) and its gradients, the bias's among them, in one pass either way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import device_guard, fuses
from ._check import FLOATS, check_shape, check_tensor
from ._once import implement, once_differentiable, under_autograd

_OP = "bias_gelu"


def launch(h: Tensor, bias: Tensor) -> Tensor:
    from ..kernels.bias_gelu import forward

    with device_guard(h):
        return forward(h.contiguous(), bias.contiguous())


def launch_backward(grad: Tensor, h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from ..kernels.bias_gelu import backward

    with device_guard(h):
        return backward(grad.contiguous(), h.contiguous(), bias.contiguous())


_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
_LIB.define(f"{_OP}(Tensor h, Tensor bias) -> Tensor")
_LIB.define(f"{_OP}_backward(Tensor grad, Tensor h, Tensor bias) -> (Tensor, Tensor)")
implement(_LIB, _OP, launch, lambda h, bias: h.new_empty(h.shape))
implement(
    _LIB,
    f"{_OP}_backward",
    launch_backward,
    lambda grad, h, bias: (h.new_empty(h.shape), bias.new_empty(bias.shape, dtype=torch.float32)),
)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(h, bias)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.matpac_fast.bias_gelu(h, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h, bias = ctx.saved_tensors
        dh, dbias = torch.ops.matpac_fast.bias_gelu_backward(grad, h, bias)
        return dh, dbias.to(bias.dtype)


under_autograd(_LIB, _OP, _BiasGelu)


def bias_gelu(h: Tensor, bias: Tensor) -> Tensor:
    """The exact GELU of h + bias, as the hidden layer of an MLP applies it to a product without its bias.

    On a GPU, in 16 bits, a Triton kernel in either direction: the sum is taken in float32 and rounded once, and the
    bias's gradient comes with the pass that makes that of h. Otherwise PyTorch.

    Args:
        h: (..., C), float32, float64, bfloat16 or float16.
        bias: (C,), any of these.

    Returns:
        (..., C), in the dtype of h.

    Raises:
        TypeError: no tensor, or a dtype that is not listed.
        ValueError: shapes or devices that do not fit.

    The gradient is once differentiable where the kernel runs, and has the same bits every time.
    """
    check_tensor(_OP, "h", h, dtypes=FLOATS)
    check_tensor(_OP, "bias", bias, 1, FLOATS, like=h)
    check_shape(_OP, "bias", bias, tuple(h.shape[-1:]), "one value a column of h")
    if h.dtype.itemsize != 2 or not fuses(_OP, h.device, h.dtype):
        return reference.bias_gelu(h, bias)
    return torch.ops.matpac_fast.bias_gelu(h.reshape(-1, h.shape[-1]), bias).view(h.shape)
