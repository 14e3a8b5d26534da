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
from ..ops.add_layer_norm import MAX_WIDTH
from .vit import Block

Pending = tuple[Tensor, Tensor] | tuple[None, None]  # a product without its bias, and that


def serves(blocks: nn.ModuleList, x: Tensor) -> bool:
    """Whether `run` is for these blocks and tokens (B, N, D): float32 weights under autocast, not compiled."""
    dtype = dtype_of_products(x)
    if dtype == x.dtype or dtype.itemsize != 2:
        return False
    block = blocks[0]
    assert isinstance(block, Block)
    weight = block.norm1.weight
    # FSDP hands out a block's weights when the block is called, and torch.compile is what the user asked for.
    plain = not hasattr(weight, "to_local") and block._compiled_call_impl is None
    fits = weight.dtype == torch.float32 and x.shape[-1] <= MAX_WIDTH
    return plain and fits and fuses("add_layer_norm", x.device, dtype)


def run(blocks: nn.ModuleList, norm: nn.LayerNorm, x: Tensor, first_query: int = 0) -> Tensor:
    """Tokens (B, N, D) through all blocks and `norm` -> (B, N - first_query, D) float32; of the last block only the
    tokens from `first_query` on are queries."""
    dtype = dtype_of_products(x)
    pending: Pending = (None, None)
    for i, block in enumerate(blocks):
        assert isinstance(block, Block)
        x, pending = _block(block, x, pending, first_query if i + 1 == len(blocks) else 0, dtype)
    return ops.add_layer_norm(x, *pending, norm, torch.float32)[1]


def _block(block: Block, x: Tensor, pending: Pending, first_query: int, dtype: torch.dtype) -> tuple[Tensor, Pending]:
    x, normed = ops.add_layer_norm(x, *pending, block.norm1, dtype)
    attended = block.attn.attend(normed, first_query)
    proj, fc2 = block.attn.proj, block.mlp.fc2
    x = x[:, first_query:].contiguous()
    x, normed = ops.add_layer_norm(x, F.linear(attended, proj.weight), proj.bias, block.norm2, dtype)
    return x, (F.linear(block.mlp.hidden(normed), fc2.weight), fc2.bias)
