"""add_layer_norm: a residual sum and the LayerNorm of it, with all their gradients, in one pass either way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..backend import device_guard, fuses
from ..kernels._limits import MAX_WIDTH
from ._check import FLOATS, check_shape, check_tensor
from ._once import implement, once_differentiable, under_autograd

_OP = "add_layer_norm"


def launch(
    x: Tensor, delta: Tensor | None, bias: Tensor | None, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.add_layer_norm import forward

    # A compiler may have laid them out anew since the public function.
    delta, bias = (None if t is None else t.contiguous() for t in (delta, bias))
    with device_guard(x):
        return forward(x.contiguous(), delta, bias, gamma.contiguous(), beta.contiguous(), eps, dtype)


def _fake(x: Tensor, delta: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((0,) if delta is None else x.shape),
        x.new_empty(x.shape, dtype=args[-1]),
        x.new_empty((x.shape[0], 2), dtype=torch.float32),
    )


def launch_backward(
    dnormed: Tensor,
    dx_next: Tensor | None,
    new_x: Tensor,
    stats: Tensor,
    gamma: Tensor,
    delta_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.add_layer_norm import backward

    dx_next = None if dx_next is None else dx_next.contiguous()
    with device_guard(new_x):
        return backward(dnormed.contiguous(), dx_next, new_x.contiguous(), stats, gamma.contiguous(), delta_dtype)


def _backward_fake(
    dnormed: Tensor,
    dx_next: Tensor | None,
    new_x: Tensor,
    stats: Tensor,
    gamma: Tensor,
    delta_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    apart = delta_dtype not in (None, new_x.dtype)
    return (
        new_x.new_empty(new_x.shape),
        new_x.new_empty(new_x.shape if apart else (0,), dtype=delta_dtype),
        stats.new_empty((2 if delta_dtype is None else 3, new_x.shape[1])),
    )


_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
_LIB.define(
    # The sum is empty where there is no delta: it is x, which no operator may return.
    f"{_OP}(Tensor x, Tensor? delta, Tensor? bias, Tensor gamma, Tensor beta, float eps, ScalarType dtype)"
    " -> (Tensor sum, Tensor normed, Tensor stats)"
)
_LIB.define(
    # ddelta is empty where it is dx; the sums are those for gamma, beta and bias.
    f"{_OP}_backward(Tensor dnormed, Tensor? dx_next, Tensor new_x, Tensor stats, Tensor gamma, "
    "ScalarType? delta_dtype)"
    " -> (Tensor dx, Tensor ddelta, Tensor sums)"
)
implement(_LIB, _OP, launch, _fake)
implement(_LIB, f"{_OP}_backward", launch_backward, _backward_fake)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        with torch._C._AutoDispatchBelowAutograd():
            new_x, normed, stats = torch.ops.matpac_fast.add_layer_norm(x, delta, *args)
        ctx.save_for_backward(x if delta is None else new_x, stats, args[1])
        ctx.delta_dtype = None if delta is None else delta.dtype
        ctx.mark_non_differentiable(stats, *([new_x] if delta is None else []))
        ctx.set_materialize_grads(False)
        return new_x, normed, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_next: Tensor | None, dnormed: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        new_x, stats, gamma = ctx.saved_tensors
        if dnormed is None:  # not used, as the last sum's norm may be
            dnormed = torch.zeros_like(new_x)
        dx, ddelta, sums = torch.ops.matpac_fast.add_layer_norm_backward(
            dnormed, dx_next, new_x, stats, gamma, ctx.delta_dtype
        )
        dgamma, dbeta = sums[0].to(gamma.dtype), sums[1].to(gamma.dtype)
        if ctx.delta_dtype is None:
            return dx, None, None, dgamma, dbeta, None, None
        dbias = sums[2] if ctx.needs_input_grad[2] else None
        # Not the same tensor twice: where both are leaves, the one's .grad would grow with the other's.
        return dx, ddelta if ddelta.numel() else dx.clone(), dbias, dgamma, dbeta, None, None


under_autograd(_LIB, _OP, _AddLayerNorm)


def add_layer_norm(
    x: Tensor, delta: Tensor | None, bias: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The sum x + delta + bias, and its LayerNorm: what stands between two layers of a pre-norm transformer.

    On a GPU a Triton kernel in either direction, with the arithmetic in float32: the gradients of bias and norm come
    with the pass that makes those of x and delta. Otherwise PyTorch.

    Args:
        x: (..., D) float32 or 16-bit, the residual stream.
        delta: (..., D), a layer's product without its bias, or None.
        bias: (D,) float32, or None; only with a delta.
        norm: its weight and bias are float32.
        dtype: of the second result.

    Returns:
        The sum (..., D) in the dtype of x, which is x itself without a delta; its LayerNorm (..., D) in `dtype`.

    Raises:
        TypeError: no tensor, or a dtype that is not listed.
        ValueError: shapes or devices that do not fit.
    """
    check_tensor(_OP, "x", x, dtypes=FLOATS)
    if delta is not None:
        check_tensor(_OP, "delta", delta, dtypes=FLOATS, like=x)
        check_shape(_OP, "delta", delta, tuple(x.shape), "that of x")
    if bias is not None:
        check_tensor(_OP, "bias", bias, 1, FLOATS, like=x)
        check_shape(_OP, "bias", bias, tuple(x.shape[-1:]), "one value a column of x")
        if delta is None:
            raise ValueError(f"{_OP}: there is a bias and no delta; expected both or neither")
    for name, weight in (("weight", norm.weight), ("bias", norm.bias)):
        check_tensor(_OP, f"the norm's {name}", weight, 1, FLOATS, like=x)
        check_shape(_OP, f"the norm's {name}", weight, tuple(x.shape[-1:]), "one value a column of x")
    width = x.shape[-1]
    if width > MAX_WIDTH or not fuses(_OP, x.device, x.dtype):
        return reference.add_layer_norm(x, delta, bias, norm, dtype)
    rows = [None if t is None else t.reshape(-1, width) for t in (x, delta)]
    new_x, normed, _ = torch.ops.matpac_fast.add_layer_norm(*rows, bias, norm.weight, norm.bias, norm.eps, dtype)
    return x if delta is None else new_x.view(x.shape), normed.view(x.shape)
