"""The two halves of a fused block, around its attention: each one autograd function, with its gradients by hand.

Layer by layer, Python and autograd may need longer from one kernel to the next than a GPU for the kernel; two functions
a block take the host a quarter less of a step (benchmarks/bench_host.py). Memory and results are those of the layers,
to rounding: a bias's gradient stays in float32 while it is summed. Autograd brings each gradient to the dtype of what
it is for.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._once import once_differentiable
from ..ops._products import mm, widens
from ..ops.add_layer_norm import launch as add_layer_norm
from ..ops.add_layer_norm import launch_backward as add_layer_norm_backward
from ..ops.attention import launch as attention
from ..ops.attention import launch_backward as attention_backward
from ..ops.bias_gelu import launch as bias_gelu
from ..ops.bias_gelu import launch_backward as bias_gelu_backward

_Maybe = Tensor | None


def norm_linear(
    x: Tensor,
    delta: _Maybe,
    bias: _Maybe,
    norm: nn.LayerNorm,
    layer: nn.Linear,
    dtype: torch.dtype,
    of_bias: bool = True,
) -> tuple[Tensor, Tensor]:
    """(x + delta + bias, `layer` of its LayerNorm): a block up to its attention.

    Args:
        x: (B, N, D) float32, the residual stream.
        delta, bias: (B, N, D) in `dtype` and (D,), a product and the bias that it lacks, if any; neither in a first
            block.
        dtype: 16 bits, of the products.
        of_bias: whether the layer's bias gets its gradient here; not where `attend` gives it.
    """
    layer_bias = layer.bias if of_bias else layer.bias.detach()
    args = (x, delta, bias, norm.weight, norm.bias, norm.eps, layer.weight, layer_bias, dtype)
    new_x, out, *_ = (_NormLinear.apply if torch.is_grad_enabled() else _norm_linear)(*args)
    return (x if delta is None else new_x), out


def attend(qkv: Tensor, bias: Tensor) -> Tensor:
    """Attention (B, N, H, d) by its kernel, whose gradient gives that of the bias in `qkv` too: to sum it up from the
    gradient of qkv (B, N, 3, H, d), which is then read once more, took 0.9 ms of a step on an H200."""
    return _Attend.apply(qkv, bias)  # pyright: ignore[reportReturnType]


def mlp(
    attended: Tensor, x: Tensor, proj: nn.Linear, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear
) -> tuple[Tensor, Tensor]:
    """(x + proj(attended), the MLP of its LayerNorm without its last bias): a block from its attention on.

    Args:
        attended: (B, N, D), 16 bits, which are those of the products.
        x: (B, N, D) float32 contiguous, the residual stream.
    """
    layers = (proj.weight, proj.bias, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight)
    new_x, out, *_ = (_Mlp.apply if torch.is_grad_enabled() else _mlp)(attended, x, *layers)
    return new_x, out


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _norm_linear(
    x: Tensor,
    delta: _Maybe,
    bias: _Maybe,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    weight: Tensor,
    weight_bias: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """new_x, empty without a delta; out; and what the gradients need."""
    delta = None if delta is None else _rows(delta)
    new_x, normed, stats = add_layer_norm(_rows(x), delta, bias, gamma, beta, eps, dtype)
    weight = weight.to(dtype)
    out = F.linear(normed, weight, weight_bias.to(dtype)).view(*x.shape[:-1], len(weight))
    return (new_x if delta is None else new_x.view(x.shape)), out, normed, stats, weight


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: _Maybe, *args: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        new_x, out, normed, *kept = _norm_linear(x, delta, *args)
        normed = normed if ctx.needs_input_grad[6] else None
        ctx.save_for_backward(x if delta is None else new_x, normed, *kept, args[1])
        ctx.delta_dtype = None if delta is None else delta.dtype
        if delta is None:
            ctx.mark_non_differentiable(new_x)
        ctx.set_materialize_grads(False)
        return new_x, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnew_x: _Maybe, dout: _Maybe) -> tuple[_Maybe, ...]:  # type: ignore[override]
        new_x, normed, stats, weight, gamma = ctx.saved_tensors
        need_weight, need_bias = ctx.needs_input_grad[6:8]
        grad = weight.new_zeros((len(stats), len(weight))) if dout is None else _rows(dout)
        dweight = _of_weight(grad, normed) if need_weight else None
        dweight_bias = grad.sum(0, dtype=torch.float32) if need_bias else None
        dx, ddelta, sums = _of_norm(grad @ weight, dnew_x, new_x, stats, gamma, ctx.delta_dtype)
        if ctx.delta_dtype is None:
            return dx, None, None, sums[0], sums[1], None, dweight, dweight_bias, None
        dbias = sums[2] if ctx.needs_input_grad[2] else None
        return dx, ddelta.view(dx.shape), dbias, sums[0], sums[1], None, dweight, dweight_bias, None


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        out, stats = attention(qkv, True)
        ctx.save_for_backward(qkv, out, stats)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[_Maybe, ...]:  # type: ignore[override]
        qkv, out, stats = ctx.saved_tensors
        return attention_backward(grad, qkv, out, stats, ctx.needs_input_grad[1])


def _mlp(
    attended: Tensor,
    x: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
) -> tuple[Tensor, ...]:
    """new_x, out, and what the gradients need."""
    dtype = attended.dtype
    attended, proj, fc1, fc2 = _rows(attended), proj.to(dtype), fc1.to(dtype), fc2.to(dtype)
    delta = F.linear(attended, proj)
    new_x, normed, stats = add_layer_norm(_rows(x), delta, proj_bias, gamma, beta, eps, dtype)
    h = F.linear(normed, fc1)
    hidden = bias_gelu(h, fc1_bias)
    out = F.linear(hidden, fc2).view(x.shape)
    return new_x.view(x.shape), out, attended, normed, stats, h, hidden, proj, fc1, fc2


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Tensor, x: Tensor, *layers: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        new_x, out, attended, normed, stats, h, hidden, *weights = _mlp(attended, x, *layers)
        needs = ctx.needs_input_grad  # a frozen layer's input is for nothing
        kept = (attended if needs[2] else None, normed if needs[7] else None, hidden if needs[9] else None)
        ctx.save_for_backward(new_x, *kept, stats, h, *weights, layers[2], layers[6])
        ctx.set_materialize_grads(False)
        return new_x, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnew_x: _Maybe, dout: _Maybe) -> tuple[_Maybe, ...]:  # type: ignore[override]
        new_x, attended, normed, hidden, stats, h, proj, fc1, fc2, gamma, fc1_bias = ctx.saved_tensors
        need_attended, _, need_proj, _, _, _, _, need_fc1, _, need_fc2 = ctx.needs_input_grad
        grad = h.new_zeros((len(h), len(fc2))) if dout is None else _rows(dout)
        dfc2 = _of_weight(grad, hidden) if need_fc2 else None
        dh, dfc1_bias = bias_gelu_backward(grad @ fc2, h, fc1_bias)
        dfc1 = _of_weight(dh, normed) if need_fc1 else None
        dx, ddelta, sums = _of_norm(dh @ fc1, dnew_x, new_x, stats, gamma, h.dtype)
        dproj = _of_weight(ddelta, attended) if need_proj else None
        dattended = (ddelta @ proj).view(dx.shape) if need_attended else None
        return dattended, dx, dproj, sums[2], sums[0], sums[1], None, dfc1, dfc1_bias, dfc2


def _of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a weight from that of its layer's output (N, E) and from the input (N, D): in float32 where torch
    can, for of 16 bits it would be read and written once more, to be widened."""
    return mm(grad.t(), x, torch.float32) if widens(grad) else grad.t() @ x


def _of_norm(
    dnormed: Tensor, dnew_x: _Maybe, new_x: Tensor, stats: Tensor, gamma: Tensor, delta_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, in its shape, of delta (N, D), empty without one, and of gamma, beta and bias (3, D). A delta
    has another dtype than x, so that its gradient is a tensor of its own."""
    dnext = None if dnew_x is None else _rows(dnew_x)
    dx, ddelta, sums = add_layer_norm_backward(dnormed, dnext, _rows(new_x), stats, gamma, delta_dtype)
    return dx.view(new_x.shape), ddelta, sums
