"""Self-attention over short sequences in Triton, on the packed output of the qkv layer: no copy before, none after.

A sequence of at most 256 tokens is at most four blocks of 64, so every loop over blocks is unrolled and a program keeps
what it has loaded: q, k and v of a head are read from memory once, and the backward pass needs no atomics.
"""

# Triton wraps what is passed as a constexpr, and unrolls the loops that name what is kept by block.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportUnboundVariable=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ._aot import CAPABILITIES, Launch, capability_of, is_data_centre
from ._limits import HEAD_WIDTHS
from .column_sums import column_sums

# Triton's interpreter would multiply the bits of bfloat16 as integers; float32 holds its products exactly.
INTERPRETED = tl.constexpr(backend.INTERPRETED)
BLOCK = tl.constexpr(64)


@triton.jit
def _dot(a, b, acc=None):
    """a @ b (+ acc) in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if acc is None:  # Triton 3.3 takes no None
        acc = tl.zeros([a.shape[0], b.shape[1]], dtype=tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _pick(x0, x1, x2, x3, I: tl.constexpr):
    """x_I: what is kept by block has names, because an array would leave the registers."""
    if I == 0:
        x = x0
    elif I == 1:
        x = x1
    elif I == 2:
        x = x2
    else:
        x = x3
    return x


@triton.jit
def _load_block(x, stride, n, I: tl.constexpr, BLOCKS: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr):
    """Rows of block I, [64, D], or [TAIL, D] for the last one with zeros past row n; of x itself if there is no I."""
    column = tl.arange(0, D)[None, :]
    if I < BLOCKS - 1:
        row = tl.arange(0, BLOCK) + I * BLOCK
        block = tl.load(x + row[:, None] * stride + column)
    else:
        row = tl.arange(0, TAIL) + (BLOCKS - 1) * BLOCK
        block = tl.load(x + row[:, None] * stride + column, mask=(row < n)[:, None], other=0.0)
    return block


@triton.jit
def _load_blocks(x, stride, n, BLOCKS: tl.constexpr, TAIL: tl.constexpr, D: tl.constexpr):
    """Every block of x (n, D); the names of those that do not exist repeat the first."""
    x0 = _load_block(x, stride, n, 0, BLOCKS, TAIL, D)
    x1, x2, x3 = x0, x0, x0
    if BLOCKS > 1:
        x1 = _load_block(x, stride, n, 1, BLOCKS, TAIL, D)
    if BLOCKS > 2:
        x2 = _load_block(x, stride, n, 2, BLOCKS, TAIL, D)
    if BLOCKS > 3:
        x3 = _load_block(x, stride, n, 3, BLOCKS, TAIL, D)
    return x0, x1, x2, x3


@triton.jit
def _store_rows(x, stride, n, start, value, MASKED: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr):
    row = tl.arange(0, SIZE) + start
    target = x + row[:, None] * stride + tl.arange(0, D)[None, :]
    if MASKED:
        tl.store(target, value.to(x.dtype.element_ty), mask=(row < n)[:, None])
    else:
        tl.store(target, value.to(x.dtype.element_ty))


@triton.jit
def attention_fwd_kernel(
    qkv, out, lse, n, scale2,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCKS: tl.constexpr, TAIL: tl.constexpr, NEED_LSE: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """A program per head, or per head and block of queries; n is in ((BLOCKS - 1) * 64, BLOCKS * 64]."""
    head = tl.program_id(0)
    sample = (head // HEADS).to(tl.int64) * n
    qkv += sample * (3 * HEADS * D) + head % HEADS * D
    out += sample * (HEADS * D) + head % HEADS * D
    lse += head.to(tl.int64) * n
    k0, k1, k2, k3 = _load_blocks(qkv + HEADS * D, 3 * HEADS * D, n, BLOCKS, TAIL, D)
    v0, v1, v2, v3 = _load_blocks(qkv + 2 * HEADS * D, 3 * HEADS * D, n, BLOCKS, TAIL, D)

    # Rows count from the program's first: a loop from 0 takes fewer registers.
    first = tl.program_id(1) * BLOCK
    qkv += first * (3 * HEADS * D)
    out += first * (HEADS * D)
    lse += first
    rest = n - first
    for start in range(0, QUERIES * BLOCK, BLOCK):
        row = start + tl.arange(0, BLOCK)  # [M]
        source = qkv + row[:, None] * (3 * HEADS * D) + tl.arange(0, D)[None, :]
        tile = tl.load(source, mask=(row < rest)[:, None], other=0.0)  # [M, D]
        for j in tl.static_range(BLOCKS):
            k, v = _pick(k0, k1, k2, k3, j), _pick(v0, v1, v2, v3, j)
            s = _dot(tile, tl.trans(k))  # [M, keys]
            if j == BLOCKS - 1:
                s = tl.where((tl.arange(0, TAIL) + j * BLOCK < n)[None, :], s, float("-inf"))
            # In base 2, and scaled only here; the first block starts the sums, so that no -inf meets another.
            if j == 0:
                top = tl.max(s, axis=1) * scale2  # [M]
                p = tl.exp2(s * scale2 - top[:, None])
                total = tl.sum(p, axis=1)
                acc = _dot(p.to(v.dtype), v)  # [M, D]
            else:
                new = tl.maximum(top, tl.max(s, axis=1) * scale2)
                shrink = tl.exp2(top - new)
                p = tl.exp2(s * scale2 - new[:, None])
                total = total * shrink + tl.sum(p, axis=1)
                acc = _dot(p.to(v.dtype), v, acc * shrink[:, None])
                top = new
        _store_rows(out, HEADS * D, rest, start, acc * (1.0 / total)[:, None], True, BLOCK, D)
        if NEED_LSE:
            tl.store(lse + row, top + tl.log2(total), mask=row < rest)


@triton.jit
def _load_lse(lse, n, I: tl.constexpr, BLOCKS: tl.constexpr, TAIL: tl.constexpr):
    """lse of block I; infinite past row n, whose probabilities thus are zero."""
    if I < BLOCKS - 1:
        value = tl.load(lse + (tl.arange(0, BLOCK) + I * BLOCK))
    else:
        row = tl.arange(0, TAIL) + (BLOCKS - 1) * BLOCK
        value = tl.load(lse + row, mask=row < n, other=float("inf"))
    return value


@triton.jit
def _sum_of_rows(x0, x1, x2, x3, BLOCKS: tl.constexpr):
    """(D,) float32, over the rows of all blocks; whole ones are added up first, for rows lie on several warps."""
    total = x0
    for i in tl.static_range(1, BLOCKS):
        x = _pick(x0, x1, x2, x3, i)
        if x.shape[0] == x0.shape[0]:
            total += x
    rows = tl.sum(total, axis=0)
    last = _pick(x0, x1, x2, x3, BLOCKS - 1)
    if last.shape[0] != x0.shape[0]:
        rows += tl.sum(last, axis=0)
    return rows


@triton.jit
def attention_bwd_kernel(
    grad, qkv, out, lse, dqkv, sums, n, scale, scale2,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCKS: tl.constexpr, TAIL: tl.constexpr,
    KEYS: tl.constexpr, NEED_SUMS: tl.constexpr,
):  # fmt: skip
    """One program per head, which keeps q and grad for all keys; n is in ((BLOCKS - 1) * 64, BLOCKS * 64].

    `sums` (B, 3, H, D) float32 is what each sample's rows of dqkv add up to. That is zero for keys, for a softmax does
    not see what is added to all of its logits; and for values what the rows of grad do, for its weights add up to one.
    """
    head = tl.program_id(0)
    sample = (head // HEADS).to(tl.int64) * n
    ROW: tl.constexpr = HEADS * D
    qkv += sample * (3 * ROW) + head % HEADS * D
    dqkv += sample * (3 * ROW) + head % HEADS * D
    out += sample * ROW + head % HEADS * D
    grad += sample * ROW + head % HEADS * D
    lse += head.to(tl.int64) * n
    if NEED_SUMS:
        sums += (head // HEADS).to(tl.int64) * (3 * ROW) + head % HEADS * D + tl.arange(0, D)

    for i in tl.static_range(BLOCKS):
        g = _load_block(grad, ROW, n, i, BLOCKS, TAIL, D)
        o = _load_block(out, ROW, n, i, BLOCKS, TAIL, D)
        delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
        zero = tl.zeros(g.shape, dtype=tl.float32)
        if i == 0:
            g0, delta0, dq0 = g, delta, zero
            g1, g2, g3, delta1, delta2, delta3, dq1, dq2, dq3 = g, g, g, delta, delta, delta, zero, zero, zero
        elif i == 1:
            g1, delta1, dq1 = g, delta, zero
        elif i == 2:
            g2, delta2, dq2 = g, delta, zero
        else:
            g3, delta3, dq3 = g, delta, zero
    if NEED_SUMS:
        w0, w1, w2, w3 = g0.to(tl.float32), g1.to(tl.float32), g2.to(tl.float32), g3.to(tl.float32)
        tl.store(sums + ROW, tl.zeros([D], dtype=tl.float32))
        tl.store(sums + 2 * ROW, _sum_of_rows(w0, w1, w2, w3, BLOCKS))
    q0, q1, q2, q3 = _load_blocks(qkv, 3 * ROW, n, BLOCKS, TAIL, D)

    # A loop: unrolled, the compiler would work on several blocks of keys at once, for which no registers are left.
    for start in range(0, (BLOCKS - 1) * BLOCK + TAIL, KEYS):
        key = tl.arange(0, KEYS) + start  # [keys]
        inside = key < n
        source = qkv + key[:, None] * (3 * ROW) + tl.arange(0, D)[None, :]
        k = tl.load(source + ROW, mask=inside[:, None], other=0.0)  # [keys, D]
        v = tl.load(source + 2 * ROW, mask=inside[:, None], other=0.0)
        dk = tl.zeros([KEYS, D], dtype=tl.float32)
        dv = tl.zeros([KEYS, D], dtype=tl.float32)
        for i in tl.static_range(BLOCKS):
            q, g = _pick(q0, q1, q2, q3, i), _pick(g0, g1, g2, g3, i)  # [queries, D]
            log_p = _dot(q, tl.trans(k)) * scale2 - _load_lse(lse, n, i, BLOCKS, TAIL)[:, None]  # [queries, keys]
            p = tl.exp2(tl.where(inside[None, :], log_p, float("-inf")))
            dv = _dot(tl.trans(p.to(k.dtype)), g, dv)
            dp = _dot(g, tl.trans(v))
            ds = (p * (dp - _pick(delta0, delta1, delta2, delta3, i)[:, None])).to(k.dtype)
            dk = _dot(tl.trans(ds), q, dk)
            if i == 0:
                dq0 = _dot(ds, k, dq0)
            elif i == 1:
                dq1 = _dot(ds, k, dq1)
            elif i == 2:
                dq2 = _dot(ds, k, dq2)
            else:
                dq3 = _dot(ds, k, dq3)
        _store_rows(dqkv + ROW, 3 * ROW, n, start, dk * scale, True, KEYS, D)
        _store_rows(dqkv + 2 * ROW, 3 * ROW, n, start, dv, True, KEYS, D)

    if NEED_SUMS:
        tl.store(sums, _sum_of_rows(dq0, dq1, dq2, dq3, BLOCKS) * scale)
    for i in tl.static_range(BLOCKS):
        dq = _pick(dq0, dq1, dq2, dq3, i)
        _store_rows(dqkv, 3 * ROW, n, i * BLOCK, dq * scale, i == BLOCKS - 1, dq.shape[0], D)


# From so many heads on a program takes all queries of one and reads its keys and values once; so many, four to each of
# the 132 multiprocessors of Hopper, fill it.
FWD_HEADS = 4 * 132
_FWD = {"num_warps": 4, "num_stages": 1}
# Keys of a step of the backward pass and warps, by head size and blocks of 64 tokens: none spills up to 192 tokens
# on Hopper and data-centre Blackwell, which multiply out of shared memory. Elsewhere operands take registers as well.
_BWD = {
    (d, blocks): {
        "KEYS": 64 if blocks == 1 or (d == 32 and blocks < 4) else 32,
        "num_warps": 8 if d * blocks > 128 else 4,
    }
    for d in HEAD_WIDTHS
    for blocks in (1, 2, 3, 4)
}


def _bwd_options(d: int, blocks: int, capability: int) -> dict[str, int]:
    options = _BWD[d, blocks]
    return options if capability == 0 or is_data_centre(capability) else {**options, "KEYS": 16}


def _blocks(n: int) -> dict[str, int]:
    """Blocks of 64 that n tokens fill, and the size of the last one: the least that tl.dot takes."""
    blocks = -(-n // 64)
    return {"BLOCKS": blocks, "TAIL": 1 << max(4, (n - 64 * (blocks - 1) - 1).bit_length())}


def forward(qkv: Tensor, need_lse: bool) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3, H, D) contiguous -> attention (B, N, H, D), and log2 of each sum of exponentials (B, H, N) float32
    for `backward`, empty unless `need_lse`."""
    batch, n, _, heads, d = qkv.shape
    blocks = _blocks(n)
    out = qkv.new_empty((batch, n, heads, d))
    lse = qkv.new_empty((batch, heads, n) if need_lse else (0,), dtype=torch.float32)
    if batch:
        queries = blocks["BLOCKS"] if batch * heads >= FWD_HEADS else 1
        grid = (batch * heads, blocks["BLOCKS"] // queries)
        scale2 = d**-0.5 * math.log2(math.e)
        attention_fwd_kernel[grid](
            qkv, out, lse, n, scale2,
            HEADS=heads, D=d, NEED_LSE=need_lse, QUERIES=queries, **blocks, **_FWD,
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, need_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """grad (B, N, H, D) and what `forward` took and gave, contiguous -> the gradient of qkv (B, N, 3, H, D), the same
    bits every time; and with `need_sums` that of a bias in qkv, (3 H D,) float32."""
    batch, n, _, heads, d = qkv.shape
    blocks = _blocks(n)
    options = _bwd_options(d, blocks["BLOCKS"], capability_of(qkv))
    dqkv = torch.empty_like(qkv)
    sums = qkv.new_empty((batch, 3 * heads * d), dtype=torch.float32) if need_sums else None
    if batch:
        scale = d**-0.5
        attention_bwd_kernel[(batch * heads,)](
            grad, qkv, out, lse, dqkv, sums, n, scale, scale * math.log2(math.e),
            HEADS=heads, D=d, NEED_SUMS=need_sums, num_stages=1, **blocks, **options,
        )  # fmt: skip
    return dqkv, None if sums is None else column_sums(sums)


def _aot() -> list[Launch]:
    """What a step of ViT-B launches: 58 tokens of the student, 134 of the teacher without gradient, 191 to predict."""
    pointers = dict.fromkeys(("qkv", "out", "grad", "dqkv"), "*bf16")
    signature = {**pointers, "lse": "*fp32", "sums": "*fp32", "n": "i32", "scale": "fp32", "scale2": "fp32"}
    launches = []
    for n, d, heads in ((58, 64, 12), (134, 64, 12), (191, 32, 16)):
        blocks = _blocks(n)
        constexprs = {**blocks, "HEADS": heads, "D": d, "NEED_LSE": n != 134, "QUERIES": blocks["BLOCKS"]}
        constexprs["NEED_SUMS"] = True
        # What the teacher launches stands for all of its kind, and holds the most.
        capabilities = CAPABILITIES if n == 134 else (90,)
        fwd = attention_fwd_kernel
        launches.append(Launch(f"attention_fwd {n} x {d}", fwd, signature, constexprs, 4, 1, capabilities=capabilities))
        if n == 134:  # a small batch
            apart, name = {**constexprs, "QUERIES": 1}, f"attention_fwd {n} x {d}, few heads"
            launches.append(Launch(name, fwd, signature, apart, 4, 1, capabilities=capabilities))
        for capabilities in ((90, 100), (80, 120)) if n != 134 else ():
            options = _bwd_options(d, blocks["BLOCKS"], capabilities[0])
            launches.append(
                Launch(
                    f"attention_bwd {n} x {d}, {options['KEYS']} keys",
                    attention_bwd_kernel,
                    signature,
                    {**constexprs, "KEYS": options["KEYS"]},
                    num_warps=options["num_warps"],
                    num_stages=1,
                    capabilities=capabilities,
                )
            )
    return launches


AOT = _aot()
