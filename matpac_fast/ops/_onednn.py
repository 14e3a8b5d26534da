"""A linear layer by oneDNN, forwards and for its argument's gradient, as an operator that torch.compile takes.

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


_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
_LIB.define(f"{_OP}(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIB.impl(_OP, _impl, "CPU")
torch.library.register_fake(
    f"matpac_fast::{_OP}", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])), lib=_LIB
)


class _Linear(torch.autograd.Function):
    """The weight's gradient is torch's: oneDNN would first copy one of its factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.matpac_fast.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        dx = torch.ops.matpac_fast.linear(grad, weight.t(), None) if need_x else None
        dw = rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None
        return dx, dw, rows.sum(0) if need_bias else None


_LIB.impl(_OP, lambda *args: _Linear.apply(*args), "Autograd")
