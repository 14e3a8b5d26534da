"""attention: self-attention from the packed output of a qkv layer, forwards and backwards without a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import reference
from ..backend import device_guard, dtype_of_products, fuses, takes_cpp, transformed
from ..kernels._limits import HEAD_WIDTHS, MAX_TOKENS
from ._check import FLOATS, check_tensor, shape_of
from ._native import DTYPE, address
from ._once import implement, once_differentiable, under_autograd

_OP = "attention"
_NATIVE = (torch.float32, torch.float64, torch.bfloat16)  # what the C++ takes
# Multiply-adds of a product, below which C++ gains less than the dispatcher takes for one more op, some 60 us; a
# quarter of them in bfloat16, where torch's own takes twice as long.
_LEAST = 10_000_000


def is_fused(
    device: torch.device, dtype: torch.dtype, tokens: int, head_width: int, elements: int | None = None
) -> bool:
    """Whether Triton's kernels compute `attention` of such a tensor, on a GPU; `elements` as of `fuses`."""
    fits = dtype in (torch.bfloat16, torch.float16) and 0 < tokens <= MAX_TOKENS and head_width in HEAD_WIDTHS
    return fits and fuses(_OP, device, dtype, elements)


def has_kernel(device: torch.device, dtype: torch.dtype, b: int, n: int, h: int, d: int) -> bool:
    """Whether `attention` of (B, N, 3, H, d) is one kernel, Triton's or C++, and not torch's own."""
    worthwhile = b * n * n * h * d >= (_LEAST // 4 if dtype == torch.bfloat16 else _LEAST)
    native = dtype in _NATIVE and takes_cpp(_OP, device, worthwhile)
    return native or is_fused(device, dtype, n, d, b * n * h * d)


def _is_native(qkv: Tensor) -> bool:
    """Whether it is C++ whose kernel computes it."""
    _, n, _, _, d = qkv.shape
    cpu = qkv.device.type == "cpu" and qkv.dtype in _NATIVE
    return cpu and not is_fused(qkv.device, qkv.dtype, n, d)  # under Triton's interpreter


def _launch_cpp(
    qkv: Tensor, out: Tensor, stats: Tensor | None, result: Tensor | None = None, grad: Tensor | None = None
) -> None:
    """Fill out, and stats where they are given; or, from result and grad, out with the gradient of qkv."""
    from .. import _C

    b, n, _, h, d = qkv.shape
    addresses = map(address, (out, stats, result, grad))
    args = _C.AttentionArgs(qkv.data_ptr(), DTYPE[qkv.dtype], b, n, h, d, *addresses)
    _C.attention_cpu(args, grad is not None, torch.get_num_threads())


def _impl(qkv: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    if _is_native(qkv):
        out, stats = _fake(qkv, keep)
        _launch_cpp(qkv.contiguous(), out, stats if keep else None)
        return out, stats
    return launch(qkv.contiguous(), keep)


def launch(qkv: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """By Triton, of what `is_fused` and is contiguous: the result, and what the gradient needs if that is kept."""
    from ..kernels.attention import forward

    with device_guard(qkv):
        return forward(qkv, keep)


def launch_backward(grad: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, bias: bool) -> tuple[Tensor, Tensor | None]:
    """The gradient of qkv, and if it is wanted that of a bias (3 H d,) in it, in float32."""
    from ..kernels.attention import backward

    with device_guard(qkv):
        return backward(grad.contiguous(), qkv, out, stats, bias)


def _fake(qkv: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    b, n, _, h, d = qkv.shape
    shape = (b, h, n, 2) if _is_native(qkv) else (b, h, n)
    stats = qkv.new_empty(shape if keep else (0,), dtype=torch.promote_types(qkv.dtype, torch.float32))
    return qkv.new_empty((b, n, h, d)), stats


def _backward_impl(grad: Tensor, qkv: Tensor, out: Tensor, stats: Tensor) -> Tensor:
    if _is_native(qkv):
        found = qkv.new_empty(qkv.shape)
        _launch_cpp(qkv.contiguous(), found, stats.contiguous(), out.contiguous(), grad.contiguous())
        return found
    return launch_backward(grad, qkv.contiguous(), out, stats, bias=False)[0]


_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
_LIB.define(f"{_OP}(Tensor qkv, bool keep) -> (Tensor, Tensor)")
_LIB.define(f"{_OP}_backward(Tensor grad, Tensor qkv, Tensor out, Tensor stats) -> Tensor")
implement(_LIB, _OP, _impl, _fake)
implement(_LIB, f"{_OP}_backward", _backward_impl, lambda grad, qkv, out, stats: qkv.new_empty(qkv.shape))


class _Attention(torch.autograd.Function):
    """Kept for the gradient: the argument, the result and what each row's exponentials sum to: log2 of it from Triton,
    the largest logit and 1 / the sum of what is left of the others from C++, whose probabilities are then the same
    bits again."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, keep: bool) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        with torch._C._AutoDispatchBelowAutograd():
            out, stats = torch.ops.matpac_fast.attention(qkv, keep)
        ctx.save_for_backward(qkv, out, stats)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return out, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        if grad is None:
            return None, None
        return torch.ops.matpac_fast.attention_backward(grad, *ctx.saved_tensors), None


under_autograd(_LIB, _OP, _Attention)


def attention(qkv: Tensor) -> Tensor:
    """Softmax attention of every token to every token of its sample, head by head, scaled by d ** -0.5.

    Queries, keys and values are read where the qkv layer wrote them, and the gradient is written packed like them. On a
    CPU, in all but float16 and from ten million multiply-adds on, a quarter of them in bfloat16, C++ whose scores stay
    in a cache, in float32; bfloat16 is multiplied as such where the CPU can (AVX-512 BF16), else widened. On a GPU, in
    16 bits and for up to 256 tokens with heads of 32 or 64 channels, a Triton kernel that keeps all keys and values of
    a head on the chip; without gradients from seven million numbers of the result on. Everything else is
    `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        qkv: (B, N, 3, H, d): queries, keys and values; float32, float64, bfloat16 or float16.

    Returns:
        (B, N, H, d), in the dtype of qkv; in autocast's where it is torch's that runs and autocast is on.

    Raises:
        TypeError: no tensor, or a dtype that is not listed.
        ValueError: another shape.

    The gradient is once differentiable where a kernel runs, and has the same bits every time; on a CPU so have the
    results, for any number of threads.
    """
    check_tensor(_OP, "qkv", qkv, 5, FLOATS)
    if qkv.shape[2] != 3:
        raise ValueError(f"{_OP}: qkv is {shape_of(qkv)}; expected (B, N, 3, H, d)")
    b, n, _, h, d = qkv.shape
    casts = qkv.device.type == "cpu" and dtype_of_products(qkv) != qkv.dtype  # under autocast torch's own does
    if casts or not has_kernel(qkv.device, qkv.dtype, b, n, h, d):
        if transformed():  # torch's fused attention on a CPU has neither forward mode nor second derivatives
            with sdpa_kernel(SDPBackend.MATH):
                return reference.attention(qkv)
        return reference.attention(qkv)
    return by_kernel(qkv)


def by_kernel(qkv: Tensor) -> Tensor:
    """`attention` of what has one."""
    return torch.ops.matpac_fast.attention(qkv, torch.is_grad_enabled() and qkv.requires_grad)[0]
