"""A linear layer by oneDNN, forwards and for its gradients, as operators that torch.compile takes.

For CPUs on which it is faster than what torch takes by itself; `backend.prefers_onednn` knows them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_OP = "linear"


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., D) float32, weight (K, D), bias (K,) -> (..., K); twice differentiable."""
    if torch.compiler.is_compiling():
        return torch.ops.matpac_fast.linear(x, weight, bias)
    # As that, without the dispatcher, which is slow with what is written in Python.
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _impl(x, weight, bias)  # pyright: ignore[reportReturnType]


def _impl(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K), (N, D) -> the gradients of weight and bias. oneDNN wants the first factor's rows next to each other:
    turning them in C++ takes a twentieth of the product, a third of what torch takes for it, and sums them on the way.
    """
    from .. import _C

    grad = grad.contiguous()
    rows, width = grad.shape
    turned, sums = grad.new_empty((width, rows)), grad.new_empty(width)
    args = _C.TransposedArgs(grad.data_ptr(), rows, width, turned.data_ptr(), sums.data_ptr())
    _C.transposed_cpu(args, torch.get_num_threads())
    return _impl(turned, x.t(), None), sums


_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
_LIB.define(f"{_OP}(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIB.define(f"{_OP}_gradients(Tensor grad, Tensor x) -> (Tensor, Tensor)")
_LIB.impl(_OP, _impl, "CPU")
_LIB.impl(f"{_OP}_gradients", _gradients, "CPU")
torch.library.register_fake(
    f"matpac_fast::{_OP}", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])), lib=_LIB
)
torch.library.register_fake(
    f"matpac_fast::{_OP}_gradients",
    lambda grad, x: (grad.new_empty((grad.shape[1], x.shape[1])), grad.new_empty(grad.shape[1])),
    lib=_LIB,
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.matpac_fast.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        dx = torch.ops.matpac_fast.linear(grad, weight.t(), None) if need_x else None
        rows = grad.reshape(-1, grad.shape[-1])
        if not need_weight:
            return dx, None, rows.sum(0) if need_bias else None
        x = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():  # for a second derivative
            return dx, rows.t() @ x, rows.sum(0) if need_bias else None
        dw, db = torch.ops.matpac_fast.linear_gradients(rows, x)
        return dx, dw, db if need_bias else None


_LIB.impl(_OP, lambda *args: _Linear.apply(*args), "Autograd")
