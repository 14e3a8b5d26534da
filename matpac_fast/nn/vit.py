"""The vision transformer of MATPAC: pre-norm blocks under timm's parameter names, which official weights have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..backend import dtype_of_products
from ..ops.attention import has_kernel
from .linear import is_plain, linear, linear_gelu


class Attention(nn.Module):
    """Multi-head self-attention (`ops.attention`); parameters qkv (3D, D) and proj (D, D)."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, first_query: int = 0) -> Tensor:
        """(B, N, D) -> (B, N - first_query, D): every token is a key, only those from `first_query` on are queries."""
        return linear(self.proj, self.attend(x, first_query))

    def attend(self, x: Tensor, first_query: int = 0) -> Tensor:
        """`forward` without its last layer."""
        b, n, d = x.shape
        heads = (self.num_heads, d // self.num_heads)
        # A kernel's queries cost less than taking them apart from keys.
        one = first_query == 0 or has_kernel(x.device, dtype_of_products(x), b, n, *heads)
        if one or not is_plain(self.qkv, nn.Linear) or self.qkv.bias is None:
            out = ops.attention(linear(self.qkv, x).view(b, n, 3, *heads))[:, first_query:]  # (B, N, H, D/H)
        else:
            q = F.linear(x[:, first_query:], self.qkv.weight[:d], self.qkv.bias[:d])
            q = q.reshape(b, n - first_query, *heads).transpose(1, 2)
            kv = F.linear(x, self.qkv.weight[d:], self.qkv.bias[d:])
            k, v = kv.reshape(b, n, 2, *heads).permute(2, 0, 3, 1, 4).unbind(0)
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return out.reshape(b, n - first_query, d)


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.fc2, self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """(..., D) -> the activated hidden layer (..., hidden)."""
        return linear_gelu(self.fc1, x)


class Block(nn.Module):
    """One pre-norm transformer block, LayerNorm eps 1e-6."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, mlp_ratio * width)

    def forward(self, x: Tensor, first_query: int = 0) -> Tensor:
        """(B, N, D) -> (B, N - first_query, D)."""
        x = x[:, first_query:] + self.attn(self.norm1(x), first_query)
        return x + self.mlp(self.norm2(x))


def through(blocks: nn.ModuleList, norm: nn.LayerNorm, x: Tensor, first_query: int = 0) -> Tensor:
    """Tokens (B, N, D) through all blocks and `norm` -> (B, N - first_query, D); of the last block only the tokens from
    `first_query` on are queries."""
    from . import fused

    if fused.serves(blocks, norm, x):
        return fused.run(blocks, norm, x, first_query)
    for block in blocks[:-1]:
        x = block(x, 0)  # as the last one is called: torch.compile counts the arguments
    return norm(blocks[-1](x, first_query))


class Transformer(nn.Module):
    """Blocks and a final LayerNorm: the student's and the teacher's encoder."""

    def __init__(self, width: int, depth: int, num_heads: int, mlp_ratio: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), after the LayerNorm."""
        return through(self.blocks, self.norm, x)

    def layers(self, x: Tensor):
        """Yield each block's output (B, N, D) as it is made; the last one after the LayerNorm, as the official code."""
        for block in self.blocks[:-1]:
            x = block(x)
            yield x
        yield self.norm(self.blocks[-1](x))


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linear weights and zero biases, as the official code; LayerNorm starts at identity anyway."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def sincos_positions(width: int, freq: int, time: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, (1, 1 + freq * time, width), frequency-major, a zero row for CLS first.

    The first half of the channels encodes time, the second frequency; each half is sines, then cosines, of the position
    times 10000 ** (-i / (width / 4)).
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def code(position: Tensor) -> Tensor:
        angle = position[:, None].double() * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # (N, width / 2)

    time_code = code(torch.arange(time)).repeat(freq, 1)
    freq_code = code(torch.arange(freq)).repeat_interleave(time, 0)
    grid = torch.cat([time_code, freq_code], dim=1)
    # In the default dtype, but never in fewer digits, which a checkpoint would keep.
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return torch.cat([grid.new_zeros(1, width), grid])[None].to(dtype)


def shorten_positions(pos: Tensor, freq: int, time: int, like: Tensor) -> Tensor:
    """Positions (1, 1 + freq * T, D) of a grid of T >= time columns -> (1, 1 + freq * time, D), in the dtype of the
    parameter `like`: a default dtype of 16 bits and FSDP's mixed precision leave these tables in float32."""
    if pos.shape[1] != 1 + freq * time:
        d = pos.shape[-1]
        grid = pos[:, 1:].reshape(1, freq, -1, d)[:, :, :time]
        pos = torch.cat([pos[:, :1], grid.reshape(1, freq * time, d)], dim=1)
    return pos.to(like.dtype)
