"""Transformer blocks as a GPU runs them in 16 bits: between two products one kernel each, which makes both gradients.

A block's last sum waits for the norm that reads it, in the next block or behind the last, and a layer's bias is added
where its product is read next. The result is that of `Block`, to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..backend import dtype_of_products, fuses
from ..kernels._limits import MAX_WIDTH
from ..ops.attention import by_kernel, is_fused
from . import halves
from .linear import is_plain, is_watched
from .vit import Attention, Block, Mlp

Pending = tuple[Tensor, Tensor] | tuple[None, None]  # a product without its bias, and that


def serves(blocks: nn.ModuleList, norm: nn.LayerNorm, x: Tensor) -> bool:
    """Whether `run` is for these blocks, norm and tokens (B, N, D): float32 norms under autocast, and no part of a
    block that its user has replaced, hooked, wrapped, sharded or compiled."""
    dtype = dtype_of_products(x)
    if dtype == x.dtype or dtype.itemsize != 2 or x.shape[-1] > MAX_WIDTH:
        return False
    return fuses("add_layer_norm", x.device, dtype) and _norms(norm) and all(map(_is_read, blocks))


def _is_read(block: nn.Module) -> bool:
    """Whether all that `_block` reads, where it calls nothing, is as this package wrote it."""
    if not isinstance(block, Block) or not is_plain(block, Block):
        return False
    layers = (block.attn.proj, block.mlp.fc2)
    plain = is_plain(block.attn, Attention) and is_plain(block.mlp, Mlp) and all(is_plain(x, nn.Linear) for x in layers)
    return plain and _norms(block.norm1, block.norm2)


def _norms(*norms: nn.Module) -> bool:
    return all(
        is_plain(norm, nn.LayerNorm)
        and norm.weight is not None
        and norm.weight.dtype == torch.float32
        and norm.bias is not None
        for norm in norms
    )


def run(blocks: nn.ModuleList, norm: nn.LayerNorm, x: Tensor, first_query: int = 0) -> Tensor:
    """Tokens (B, N, D) through all blocks and `norm` -> (B, N - first_query, D) float32; of the last block only the
    tokens from `first_query` on are queries."""
    dtype = dtype_of_products(x)
    pending: Pending = (None, None)
    at_once = type(x) is Tensor and not torch.compiler.is_compiling() and not is_watched()
    for i, block in enumerate(blocks):
        assert isinstance(block, Block)
        run_block = _in_halves if at_once and _has_halves(block) else _block
        x, pending = run_block(block, x, pending, first_query if i + 1 == len(blocks) else 0, dtype)
    return ops.add_layer_norm(x, *pending, norm, torch.float32)[1]


def _has_halves(block: Block) -> bool:
    """Whether the layers that `_block` calls may be read too: a user may have put others in their places, as LoRA, or
    tensors that multiply in their own way, as quantised ones."""
    called, read = (block.attn.qkv, block.mlp.fc1), (block.attn.proj, block.mlp.fc2, block.norm1, block.norm2)
    if not all(is_plain(x, nn.Linear) for x in called) or any(x.bias is None for x in (*called, block.attn.proj)):
        return False
    weights = (weight for x in (*called, *read) for weight in x._parameters.values() if weight is not None)
    return all(type(weight) in (Tensor, nn.Parameter) for weight in weights)


def _in_halves(
    block: Block, x: Tensor, pending: Pending, first_query: int, dtype: torch.dtype
) -> tuple[Tensor, Pending]:
    attn, fc1, fc2 = block.attn, block.mlp.fc1, block.mlp.fc2
    b, n, d = x.shape
    # For few numbers too: to leave them to torch would spare the host alone, which launches most steps as one graph.
    by_triton = is_fused(x.device, dtype, n, d // attn.num_heads)
    of_bias = by_triton and torch.is_grad_enabled() and attn.qkv.bias.requires_grad
    x, qkv = halves.norm_linear(x, *pending, block.norm1, attn.qkv, dtype, not of_bias)
    qkv = qkv.view(b, n, 3, attn.num_heads, d // attn.num_heads)
    if of_bias:
        attended = halves.attend(qkv, attn.qkv.bias)
    else:
        attended = by_kernel(qkv) if by_triton else ops.attention(qkv)
    if first_query:
        attended, x = attended[:, first_query:], x[:, first_query:].contiguous()
    x, out = halves.mlp(attended.reshape(x.shape), x, attn.proj, block.norm2, fc1, fc2)
    return x, (out, fc2.bias)


def _block(block: Block, x: Tensor, pending: Pending, first_query: int, dtype: torch.dtype) -> tuple[Tensor, Pending]:
    x, normed = ops.add_layer_norm(x, *pending, block.norm1, dtype)
    attended = block.attn.attend(normed, first_query)
    proj, fc2 = block.attn.proj, block.mlp.fc2
    x = x[:, first_query:].contiguous()
    x, normed = ops.add_layer_norm(x, F.linear(attended, proj.weight), proj.bias, block.norm2, dtype)
    return x, (F.linear(block.mlp.hidden(normed), fc2.weight), fc2.bias)
