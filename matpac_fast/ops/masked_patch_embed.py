"""masked_patch_embed: spectrogram and shuffle -> the student's and the teacher's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import autocast_dtype, choose, device_guard
from ._check import FLOATS, check_int, check_shape, check_tensor, shape_of
from ._native import address
from ._once import implement, once_differentiable, under_autograd

_OP = "masked_patch_embed"

# On the CPU the batch goes by in chunks of this many rows, whose patches (4 MB in float32) are still in a cache when
# the matrix product reads them.
_CHUNK_ROWS = 4096


def _check(
    spec: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor, ids_shuffle: Tensor, n_visible: int
) -> torch.dtype:
    """Raise on what cannot be; else the dtype of the product's operands."""
    check_tensor(_OP, "spec", spec, ndim=3, dtypes=FLOATS)
    check_tensor(_OP, "weight", weight, ndim=4, dtypes=FLOATS, like=spec)
    for name, tensor in (("bias", bias), ("pos", pos), ("cls", cls)):
        check_tensor(_OP, name, tensor, dtypes=(weight.dtype,), like=spec)
    check_tensor(_OP, "ids_shuffle", ids_shuffle, ndim=2, dtypes=(torch.int64,), like=spec)
    check_int(_OP, "n_visible", n_visible)

    b, f, t = spec.shape
    d, p = weight.shape[0], weight.shape[-1]
    if d < 1 or p < 1:
        raise ValueError(f"{_OP}: weight is {shape_of(weight)}; expected (D, 1, p, p) with D and p at least 1")
    check_shape(_OP, "weight", weight, (d, 1, p, p), "a convolution of one channel with square patches")
    if f < p or t < p or f % p or t % p:
        raise ValueError(f"{_OP}: spec is {shape_of(spec)}; expected both axes in multiples of the patch size {p}")
    n = (f // p) * (t // p)
    check_shape(_OP, "bias", bias, (d,), "one value a channel of weight")
    check_shape(_OP, "pos", pos, (1, 1 + n, d), f"the CLS row and one of each of the {n} patches of spec")
    check_shape(_OP, "cls", cls, (1, 1, d), "one token")
    check_shape(_OP, "ids_shuffle", ids_shuffle, (b, n), "a permutation of the patches of each sample")
    if not 0 <= n_visible <= n:
        raise ValueError(f"{_OP}: n_visible is {n_visible}; expected 0 to {n}, the number of patches")

    operands = autocast_dtype(spec.device)
    if torch.float64 not in (spec.dtype, weight.dtype) and operands is not None:
        return operands
    if spec.dtype != weight.dtype:
        raise TypeError(
            f"{_OP}: spec is {shape_of(spec)} and weight is {shape_of(weight)}; "
            "expected one dtype outside of autocast: convert one of them"
        )
    return weight.dtype


def _chunks(batch: int, rows: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ROWS // rows)
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def _gather_cpp(
    spec: Tensor, ids: Tensor, patch: int, patches: Tensor, table: Tensor | None = None, tokens: Tensor | None = None
) -> None:
    """Fill patches (b, 1 + count, p * p) and, where they are given, tokens (b, 1 + count, D) from table."""
    from .. import _C

    args = _C.PatchGatherArgs(
        spec.data_ptr(),
        spec.element_size(),
        spec.shape[0],
        spec.stride(0),
        spec.stride(1),
        spec.shape[1] // patch,
        spec.shape[2] // patch,
        patch,
        ids.data_ptr(),
        ids.stride(0),
        ids.shape[1],
        patches.data_ptr(),
        address(table),
        0 if table is None else table.shape[1],
        address(tokens),
    )
    if not _C.patch_gather_cpu(args, torch.get_num_threads()):
        n = (spec.shape[1] // patch) * (spec.shape[2] // patch)
        raise IndexError(f"{_OP}: ids_shuffle holds {int(ids.min())} to {int(ids.max())}; expected 0 to {n - 1}")


def _launch_cpp(
    spec: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls: Tensor,
    ids_shuffle: Tensor,
    n_visible: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    out_dtype = torch.promote_types(dtype, weight.dtype)
    # 16-bit tensors are read, but their product is no faster here and less exact.
    work = torch.promote_types(out_dtype, torch.float32)
    spec = spec.to(work)
    patch = weight.shape[-1]
    matrix = weight.to(work).flatten(1).T  # (p * p, D)
    table = torch.cat([cls[0].to(work) + pos[0, :1], bias.to(work) + pos[0, 1:]])  # (1 + N, D)

    def side(ids: Tensor) -> Tensor:
        batch, rows = ids.shape[0], 1 + ids.shape[1]
        out = table.new_empty((batch, rows, table.shape[1]))
        buffer = None
        for part in _chunks(batch, rows):
            size = part.stop - part.start
            if buffer is None or buffer.shape[0] != size:
                buffer = spec.new_empty((size, rows, patch * patch))
            _gather_cpp(spec[part], ids[part], patch, buffer, table, out[part])
            out[part].view(-1, table.shape[1]).addmm_(buffer.view(-1, patch * patch), matrix)
        return out.to(out_dtype)

    return side(ids_shuffle[:, :n_visible]), side(ids_shuffle[:, n_visible:])


def _backward_cpp(
    grad: Tensor, spec: Tensor, ids_shuffle: Tensor, n_visible: int, patch: int, dtype: torch.dtype
) -> Tensor:
    work = torch.promote_types(torch.promote_types(grad.dtype, dtype), torch.float32)
    spec, grad = spec.to(work), grad.to(work)
    ids, rows, width = ids_shuffle[:, :n_visible], 1 + n_visible, grad.shape[2]
    total = grad.new_zeros((width, patch * patch))
    for part in _chunks(grad.shape[0], rows):
        patches = spec.new_empty((part.stop - part.start, rows, patch * patch))
        _gather_cpp(spec[part], ids[part], patch, patches)
        total.addmm_(grad[part].view(-1, width).T, patches.view(-1, patch * patch))
    return total


def _launch_triton(spec: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels.masked_patch_embed import masked_patch_embed as launch

    with device_guard(spec):
        return launch(spec, *args)


def _backward_triton(grad: Tensor, *args: Any) -> Tensor:
    from ..kernels.masked_patch_embed import masked_patch_embed_backward as launch

    with device_guard(grad):
        return launch(grad, *args)


def _launch_reference(spec: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *rest, dtype = args
    return reference.masked_patch_embed(spec.to(dtype), weight.to(dtype), *rest)


def _backward_reference(
    grad: Tensor, spec: Tensor, ids_shuffle: Tensor, n_visible: int, patch: int, dtype: torch.dtype
) -> Tensor:
    ids = ids_shuffle[:, :n_visible, None].expand(-1, -1, patch * patch)
    patches = reference.patches(spec.to(dtype), patch).gather(1, ids).flatten(0, 1)  # (B * V, p * p)
    return grad[:, 1:].flatten(0, 1).to(dtype).T @ patches


_LAUNCHERS = {"cpp": _launch_cpp, "triton": _launch_triton, "reference": _launch_reference}
_BACKWARDS = {"cpp": _backward_cpp, "triton": _backward_triton, "reference": _backward_reference}


def _laid_out(spec: Tensor) -> Tensor:
    """With frames next to each other, and a sample within reach of 32 bits, also of a crop from hours."""
    near = spec.stride(2) == 1 and spec.shape[1] * spec.stride(1) < 2**31
    return spec if near else spec.contiguous()


def _impl(
    spec: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls: Tensor,
    ids_shuffle: Tensor,
    n_visible: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    spec = _laid_out(spec)
    weight, bias, pos, cls, ids_shuffle = (t.contiguous() for t in (weight, bias, pos, cls, ids_shuffle))
    launch = _LAUNCHERS[choose(_OP, spec.device, dtype)]
    return launch(spec, weight, bias, pos, cls, ids_shuffle, n_visible, dtype)


def _fake(spec: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *_, ids_shuffle, n_visible, dtype = args
    (b, n), d = ids_shuffle.shape, weight.shape[0]
    out_dtype = torch.promote_types(dtype, weight.dtype)
    return (
        spec.new_empty((b, 1 + n_visible, d), dtype=out_dtype),
        spec.new_empty((b, 1 + n - n_visible, d), dtype=out_dtype),
    )


def _backward_impl(
    grad: Tensor, spec: Tensor, ids_shuffle: Tensor, n_visible: int, patch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    spec = _laid_out(spec)
    grad = grad.contiguous()
    d = grad.shape[2]
    backward = _BACKWARDS[choose(_OP, spec.device, dtype)]
    weight = backward(grad, spec, ids_shuffle.contiguous(), n_visible, patch, dtype)
    return weight.to(grad.dtype).view(d, 1, patch, patch), grad[:, 1:].sum((0, 1)), grad[:, 0].sum(0).view(1, 1, d)


def _backward_fake(
    grad: Tensor, spec: Tensor, ids_shuffle: Tensor, n_visible: int, patch: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    d = grad.shape[2]
    return grad.new_empty((d, 1, patch, patch)), grad.new_empty((d,)), grad.new_empty((1, 1, d))


_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
_LIB.define(
    f"{_OP}(Tensor spec, Tensor weight, Tensor bias, Tensor pos, Tensor cls, Tensor ids_shuffle, SymInt n_visible, "
    "ScalarType dtype) -> (Tensor, Tensor)"
)
_LIB.define(
    f"{_OP}_backward(Tensor grad, Tensor spec, Tensor ids_shuffle, SymInt n_visible, SymInt patch, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)"
)
implement(_LIB, _OP, _impl, _fake)
implement(_LIB, f"{_OP}_backward", _backward_impl, _backward_fake)


class _MaskedPatchEmbed(torch.autograd.Function):
    """Gradients for weight, bias and CLS through the visible rows; kept for it: the spectrogram and the shuffle."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        spec, weight, _, _, _, ids_shuffle, n_visible, dtype = args
        ctx.save_for_backward(spec, ids_shuffle)
        ctx.n_visible, ctx.patch, ctx.dtype = n_visible, weight.shape[-1], dtype
        ctx.dtypes = [tensor.dtype for tensor in args[1:5]]
        with torch._C._AutoDispatchBelowAutograd():
            visible, masked = torch.ops.matpac_fast.masked_patch_embed(*args)
        ctx.mark_non_differentiable(masked)
        ctx.set_materialize_grads(False)  # zeros as large as the teacher's tokens
        return visible, masked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad is None:
            return (None,) * 8
        spec, ids_shuffle = ctx.saved_tensors
        weight, bias, cls = torch.ops.matpac_fast.masked_patch_embed_backward(
            grad, spec, ids_shuffle, ctx.n_visible, ctx.patch, ctx.dtype
        )
        to = ctx.dtypes
        return None, weight.to(to[0]), bias.to(to[1]), None, cls.to(to[3]), None, None, None


under_autograd(_LIB, _OP, _MaskedPatchEmbed)


def masked_patch_embed(
    spec: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor, ids_shuffle: Tensor, n_visible: int
) -> tuple[Tensor, Tensor]:
    """Embed the patches of a spectrogram, in shuffled order, straight into the student's and the teacher's input.

    Every patch is embedded once: token = patch @ weight + bias + position. The first `n_visible` of a sample's shuffle
    go behind a CLS row to the student, the others behind a CLS row to the teacher (2502.12031; in the official code a
    convolution, a sum, two gathers and two concatenations).

    Args:
        spec: (B, F, T) normalised log-mel, float32, float64, bfloat16 or float16; F and T multiples of p.
        weight: (D, 1, p, p), the patch projection as the convolution that official weights have; the dtype of spec,
            but for autocast.
        bias: (D,), like all parameters in the dtype of weight.
        pos: (1, 1 + N, D), the positions of CLS and of the N = F/p * T/p patches, frequency-major.
        cls: (1, 1, D), the CLS token.
        ids_shuffle: (B, N) int64, a permutation of the patches of each sample (`mask_shuffle`).
        n_visible: the number V of visible patches, 0 to N.

    Returns:
        visible (B, 1 + V, D) and masked (B, 1 + M, D) with M = N - V, contiguous. The dtype is weight's. Under
        autocast the product takes operands of autocast's dtype and the sum with the position is rounded to the
        promotion of both, so float32 parameters give float32 tokens, as in the official code. The sum is carried in
        float32 (float64 for float64); on the CPU the product's operands are not rounded either.

    Raises:
        TypeError: a dtype that is not listed, or spec and weight that differ outside of autocast.
        ValueError: a shape, a device or an `n_visible` that does not fit.
        IndexError: an id that names no patch, on the CPU. On a GPU that would wait for the device: there the token
            of such an id is NaN.

    Gradients: weight, bias and cls receive theirs through `visible`, over its rows alone, once differentiable and with
    the same bits every time. `masked` carries no gradient, since the teacher has none. Where spec or pos requires a
    gradient, the PyTorch reference computes all.
    """
    dtype = _check(spec, weight, bias, pos, cls, ids_shuffle, n_visible)
    differentiated = torch.is_grad_enabled() and (spec.requires_grad or pos.requires_grad)
    if differentiated or choose(_OP, spec.device, dtype) == "reference":
        return reference.masked_patch_embed(spec, weight, bias, pos, cls, ids_shuffle, n_visible)
    return torch.ops.matpac_fast.masked_patch_embed(spec, weight, bias, pos, cls, ids_shuffle, n_visible, dtype)
