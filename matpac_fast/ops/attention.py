"""attention: self-attention from the packed output of a qkv layer, forwards and backwards without a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import device_guard, fuses
from ._check import check_tensor, shape_of
from ._once import once_differentiable

_OP = "attention"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What the kernels take: see kernels/attention.py, which imports Triton.
MAX_TOKENS, HEAD_WIDTHS = 256, (32, 64)


def is_fused(device: torch.device, dtype: torch.dtype, tokens: int, head_width: int) -> bool:
    """Whether `attention` of such a tensor is ours to compute; torch's own serves the rest."""
    fits = dtype in (torch.bfloat16, torch.float16) and 0 < tokens <= MAX_TOKENS and head_width in HEAD_WIDTHS
    return fits and fuses(_OP, device, dtype)


def _impl(qkv: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    from ..kernels.attention import forward

    with device_guard(qkv):
        return forward(qkv.contiguous(), keep)


def _fake(qkv: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    b, n, _, h, d = qkv.shape
    return qkv.new_empty((b, n, h, d)), qkv.new_empty((b, h, n) if keep else (0,), dtype=torch.float32)


def _backward_impl(grad: Tensor, qkv: Tensor, out: Tensor, sums: Tensor) -> Tensor:
    from ..kernels.attention import backward

    with device_guard(qkv):
        return backward(grad.contiguous(), qkv.contiguous(), out, sums)


_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
_LIB.define(f"{_OP}(Tensor qkv, bool keep) -> (Tensor, Tensor)")
_LIB.define(f"{_OP}_backward(Tensor grad, Tensor qkv, Tensor out, Tensor sums) -> Tensor")
for _device in ("CPU", "CUDA"):
    _LIB.impl(_OP, _impl, _device)
    _LIB.impl(f"{_OP}_backward", _backward_impl, _device)
torch.library.register_fake(f"matpac_fast::{_OP}", _fake, lib=_LIB)
torch.library.register_fake(
    f"matpac_fast::{_OP}_backward", lambda grad, qkv, out, sums: qkv.new_empty(qkv.shape), lib=_LIB
)


class _Attention(torch.autograd.Function):
    """Kept for the gradient: the argument, the result and log2 of each row's sum of exponentials."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, keep: bool) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with torch._C._AutoDispatchBelowAutograd():
            out, sums = torch.ops.matpac_fast.attention(qkv, keep)
        ctx.save_for_backward(qkv, out, sums)
        ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        return out, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad is None:
            return None, None
        return torch.ops.matpac_fast.attention_backward(grad, *ctx.saved_tensors), None


_LIB.impl(_OP, lambda *args: _Attention.apply(*args), "Autograd")


def attention(qkv: Tensor) -> Tensor:
    """Softmax attention of every token to every token of its sample, head by head, scaled by d ** -0.5.

    On a GPU, in 16 bits and for up to 256 tokens with heads of 32 or 64 channels, a Triton kernel that keeps all keys
    and values of a head on the chip: queries, keys and values are read where the qkv layer wrote them, and the gradient
    is written packed like them. Everything else is `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        qkv: (B, N, 3, H, d): queries, keys and values; float32, float64, bfloat16 or float16.

    Returns:
        (B, N, H, d), in the dtype of qkv; in autocast's where it is torch's that runs and autocast is on.

    Raises:
        TypeError: no tensor, or a dtype that is not listed.
        ValueError: another shape.

    The gradient is once differentiable where the kernel runs, and has the same bits every time.
    """
    check_tensor(_OP, "qkv", qkv, 5, _DTYPES)
    if qkv.shape[2] != 3:
        raise ValueError(f"{_OP}: qkv is {shape_of(qkv)}; expected (B, N, 3, H, d)")
    if not is_fused(qkv.device, qkv.dtype, qkv.shape[1], qkv.shape[4]):
        return reference.attention(qkv)
    return torch.ops.matpac_fast.attention(qkv, torch.is_grad_enabled() and qkv.requires_grad)[0]
