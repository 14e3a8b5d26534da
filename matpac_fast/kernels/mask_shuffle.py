"""mask_shuffle in Triton: each program ranks some tokens of one sample; see reference.mask_shuffle for the definition.

A token's place in the permutation is the number of smaller keys. Counting them takes n_tokens ** 2 comparisons, which
at some hundred tokens are fewer instructions than a sort, compile in a fraction of the time and need no upper bound.
"""

# Triton wraps what is passed as a constexpr, and a launch takes options of its own.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._aot import Launch

BLOCK_T, BLOCK_K, NUM_WARPS = 64, 64, 8


@triton.jit
def _splitmix64(x):
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _keys(stream, token, bits):
    """Noise whose low bits are the token, so that no two keys tie; ordered as signed integers."""
    noise = _splitmix64(stream + token.to(tl.uint64)).to(tl.int64, bitcast=True)
    return ((noise >> bits) << bits) | token


@triton.jit(do_not_specialize=["base", "bits"])
def mask_shuffle_kernel(index, base, out, n_tokens, bits, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # Unsigned for the logical shifts of splitmix64.
    sample = tl.load(index + row).to(tl.uint64, bitcast=True)
    # A small base arrives as int32.
    stream = _splitmix64(base.to(tl.int64).to(tl.uint64, bitcast=True) ^ sample)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BT]
    key = _keys(stream, token, bits)
    rank = tl.zeros([BLOCK_T], dtype=tl.int32)
    for start in range(0, n_tokens, BLOCK_K):
        other = start + tl.arange(0, BLOCK_K)  # [BK]
        smaller = (_keys(stream, other, bits)[None, :] < key[:, None]) & (other < n_tokens)[None, :]  # [BT, BK]
        rank += tl.sum(smaller.to(tl.int32), axis=1)
    tl.store(out + row * n_tokens + rank, token.to(tl.int64), mask=token < n_tokens)


def mask_shuffle(base: int, index: Tensor, n_tokens: int) -> Tensor:
    """(B,) int64 -> (B, n_tokens) int64; `base` is splitmix64(splitmix64(seed) ^ step) as a signed integer."""
    out = torch.empty((index.shape[0], n_tokens), dtype=torch.int64, device=index.device)
    if out.numel():
        bits = max(1, (n_tokens - 1).bit_length())
        grid = (index.shape[0], triton.cdiv(n_tokens, BLOCK_T))
        mask_shuffle_kernel[grid](index, base, out, n_tokens, bits, BLOCK_T, BLOCK_K, num_warps=NUM_WARPS)
    return out


AOT = [
    Launch(
        name="mask_shuffle",
        kernel=mask_shuffle_kernel,
        signature={"index": "*i64", "base": "i64", "out": "*i64", "n_tokens": "i32", "bits": "i32"},
        constexprs={"BLOCK_T": BLOCK_T, "BLOCK_K": BLOCK_K},
        num_warps=NUM_WARPS,
        max_registers=128,
    )
]
