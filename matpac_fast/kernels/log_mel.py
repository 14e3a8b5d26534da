"""log_mel in Triton: the 400-point DFT as matrix products on the tensor cores, mel and logarithm in the same kernel.

With y the windowed frame, cos(2 pi n k / 400) is the same at n and 400 - n, and up to (-1)^k at n and 200 - n; the sine
is opposite at n and 400 - n, and up to -(-1)^k at n and 200 - n. So y folds twice, to sums over n = 0 ... 100, which
differ for even and odd k:

    real part       sum_n ((y[n] + y[400 - n]) +- (y[200 - n] + y[200 + n])) cos(2 pi n k / 400)
    imaginary part  sum_n ((y[n] - y[400 - n]) -+ (y[200 - n] - y[200 + n])) sin(2 pi n k / 400)    (its sign is lost)

four products of (frames, 101) by (101, 101) in place of two of (frames, 400) by (400, 201).

The products are float16 with float32 sums, at near float32's precision: both factors are split into two float16 terms,
of which three products count (the fourth is below 2^-22). A power of two a frame, so that its largest sample fills
float16's range, keeps quiet frames as exact as loud ones. The mel product takes two bfloat16 terms, for the range.
"""

# Triton wraps what is passed as a constexpr, and a launch takes options of its own.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend, reference
from ..reference import LogMelConfig
from ._aot import CAPABILITIES, Launch, capability_of
from ._limits import MAX_MELS

# The DFTs' 101 sums and bins are padded to these.
SUMS = tl.constexpr(112)
BINS = tl.constexpr(128)


def _options(n_mels: int, capability: int) -> dict[str, int]:
    """Mels in two parts, frames of a program, sums of a step, bins at a time, and launch parameters.

    A warp has 16 frames, for with chained products Triton hands a tile's rows out to all warps, and warps beyond the
    rows would repeat others' work. One stage: with two, these tiles spill. With the sums of more than 96 mels 128
    frames are more than Blackwell's tensor memory holds, and beside 32 bins they spill on sm_80 and sm_120.
    """
    wide, narrow = _mels_of(n_mels, capability)
    mels = {"WIDE": wide, "NARROW": narrow, "BLOCK_N": 16}
    if _hopper(capability):
        return {**mels, "BLOCK_F": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1}
    frames, bins = (128, 32) if wide + narrow <= 96 else (64, 16)
    return {**mels, "BLOCK_F": frames, "BLOCK_K": bins, "num_warps": frames // 16, "num_stages": 1}


def _mels_of(n_mels: int, capability: int) -> tuple[int, int]:
    """A wide and a narrow power of two from 16 that hold `n_mels` together: 80 = 64 + 16.

    On Hopper 64 and 64, as wide as the DFTs' tables, so that one layout in shared memory serves every table. The ptxas
    of CUDA 12.8, which Triton 3.6 and 3.7 bring for sm_90, loses a register copy where the wgmma descriptors of two
    layouts come from one address, and the product then reads its table from a random place.
    """
    if _hopper(capability):
        return 64, 64
    wide = max(16, 1 << ((n_mels - 1).bit_length() - 1)) if n_mels > 1 else 16
    narrow = max(16, 1 << (max(1, n_mels - wide) - 1).bit_length())
    return wide, narrow


def _hopper(capability: int) -> bool:
    return 90 <= capability < 100


# Triton's interpreter truncates to bfloat16 where GPUs round, and would multiply its bits as integers; there float32
# holds the terms and their products, exactly.
INTERPRETED = tl.constexpr(backend.INTERPRETED)


@triton.jit
def _round(x, dtype: tl.constexpr):
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _split(x, dtype: tl.constexpr):
    """Two terms of `dtype` that sum to x."""
    high = _round(x, dtype)
    return high, _round(x - high.to(tl.float32), dtype)


@triton.jit
def _dot(high, low, table, size, acc):
    """acc + (high + low) @ (table + its rest, which lies `size` further on)."""
    exact = tl.load(table)
    rest = tl.load(table + size)
    if INTERPRETED:
        high, low = high.to(tl.float32), low.to(tl.float32)
        exact, rest = exact.to(tl.float32), rest.to(tl.float32)
    acc = tl.dot(low, exact, acc)
    acc = tl.dot(high, rest, acc)
    return tl.dot(high, exact, acc)


@triton.jit
def _powers(
    wave,
    start,
    window,
    dft,
    scale,
    odd,
    i,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Squared magnitudes of the bins 2 i + odd, times scale^2: (BLOCK_F, BLOCK_K)."""
    real = tl.zeros([BLOCK_F, BLOCK_K], dtype=tl.float32)
    imag = tl.zeros([BLOCK_F, BLOCK_K], dtype=tl.float32)
    size = SUMS * BINS
    sign = 1.0 - 2.0 * odd
    for first in range(0, SUMS, BLOCK_N):
        # Past n = 100 the tables are zero. At n = 0 there is no y[400], and y[200] counts once, as y2.
        n = first + tl.arange(0, BLOCK_N)  # [BN]
        forwards = wave + start[:, None] + n[None, :]
        backwards = wave + start[:, None] + tl.minimum(200 - n, 199)[None, :]
        y0 = tl.load(forwards).to(tl.float32) * tl.load(window + n)[None, :]
        y1 = tl.load(backwards).to(tl.float32) * tl.load(window + SUMS + n)[None, :]
        y2 = tl.load(forwards + 200).to(tl.float32) * tl.load(window + 2 * SUMS + n)[None, :]
        y3 = tl.load(backwards + 200).to(tl.float32) * tl.load(window + 3 * SUMS + n)[None, :]
        even_part, odd_part = (y0 + y3) + sign * (y1 + y2), (y0 - y3) - sign * (y1 - y2)
        table = dft + odd * 4 * size + n[:, None] * BINS + i[None, :]  # [BN, BK]
        high, low = _split(even_part * scale[:, None], tl.float16)
        real = _dot(high, low, table, size, real)
        high, low = _split(odd_part * scale[:, None], tl.float16)
        imag = _dot(high, low, table + 2 * size, size, imag)
    return real * real + imag * imag


@triton.jit
def _mel(acc, high, low, bank, i, first: tl.constexpr, MELS: tl.constexpr, padded):
    """acc + (powers of some bins) @ their bank, for MELS mels from `first` on."""
    table = bank + i[:, None] * padded + first + tl.arange(0, MELS)[None, :]  # [BK, MELS]
    return _dot(high, low, table, BINS * padded, acc)


@triton.jit
def _store(out, mel, m, t, n_mels, frames, log_offset, mean, inverse_std):
    y = (tl.log(mel + log_offset) - mean) * inverse_std  # [BF, MELS]
    mask = (t < frames)[:, None] & (m < n_mels)[None, :]
    tl.store(out + m.to(tl.int64)[None, :] * frames + t[:, None], y.to(out.dtype.element_ty), mask)


# Were stride and hop known as multiples of 16, a lane would take four samples of a row, and the warp's loads of single
# ones, which those that run backwards are, would lie in eight rows: three times the sectors.
@triton.jit(do_not_specialize=["stride", "hop", "frames", "n_mels", "tiles"])
def log_mel_fwd_kernel(
    wave,
    out,
    window,
    dft,
    bank,
    stride,
    hop,
    frames,
    n_mels,
    tiles,
    peak,
    log_offset,
    mean,
    inverse_std,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles * BLOCK_F
    t = tile + tl.arange(0, BLOCK_F)  # [BF]
    wave += clip * stride + tile.to(tl.int64) * hop
    # [BF], from the tile's first sample. Past the last frame the tile's first stands in, so that no load has a mask.
    start = tl.where(t < frames, tl.arange(0, BLOCK_F) * hop, 0)

    # The scale: 4 |y| < 2^15 after the two folds.
    peaks = tl.zeros([BLOCK_F, BLOCK_N], dtype=tl.float32)
    for first in range(0, 400, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        peaks = tl.maximum(peaks, tl.abs(tl.load(wave + start[:, None] + n[None, :]).to(tl.float32)))
    top = tl.max(peaks, axis=1)
    exponent = tl.maximum(((top * peak).to(tl.int32, bitcast=True) >> 23) & 255, 13)  # top * peak < 2^(exponent - 126)
    scale = ((266 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^(139 - exponent)
    unscale = ((exponent - 12) << 23).to(tl.float32, bitcast=True)[:, None]

    wide = tl.zeros([BLOCK_F, WIDE], dtype=tl.float32)
    narrow = tl.zeros([BLOCK_F, NARROW], dtype=tl.float32)
    half = BINS // BLOCK_K
    for step in range(0, 2 * half):  # one loop: two take more registers
        odd = step // half
        i = (step - odd * half) * BLOCK_K + tl.arange(0, BLOCK_K)
        powers = _powers(wave, start, window, dft, scale, odd, i, BLOCK_F, BLOCK_N, BLOCK_K)
        high, low = _split(powers * unscale * unscale, tl.bfloat16)
        rows = bank + odd * 2 * BINS * (WIDE + NARROW)
        wide = _mel(wide, high, low, rows, i, 0, WIDE, WIDE + NARROW)
        narrow = _mel(narrow, high, low, rows, i, WIDE, NARROW, WIDE + NARROW)
    out += clip * n_mels * frames
    _store(out, wide, tl.arange(0, WIDE), t, n_mels, frames, log_offset, mean, inverse_std)
    _store(out, narrow, WIDE + tl.arange(0, NARROW), t, n_mels, frames, log_offset, mean, inverse_std)


def _two_terms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(2, ...): x rounded to `dtype`, and the rest."""
    high = x.to(dtype)
    return torch.stack([high, (x - high.to(x.dtype)).to(dtype)])


@functools.cache  # for ever: a CUDA graph of the caller's may hold its addresses
def _tables(
    config: LogMelConfig, mels: int, device: torch.device, scale: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Window at n, 200 - n, 200 + n and 400 - n (4, SUMS), DFTs (parity, real and imaginary, term, SUMS, BINS), bank
    (parity, term, BINS, mels), peak."""
    window = reference.mel_window(config) * config.gain * scale
    n = torch.arange(SUMS.value, dtype=torch.float64)[:, None]
    once = torch.where(n < 100, 1.0, torch.where(n == 100, 0.5, 0.0))  # n = 100 is folded onto itself
    bank = reference.mel_bank(config)  # (n_mels, 201)
    dfts, banks = [], []
    for odd in range(2):
        k = torch.arange(odd, 2 * BINS.value, 2)[None, :]
        angle = n * k % 400 * (2 * math.pi / 400)
        exists = once * (k <= 200)
        dfts += [_two_terms(angle.cos() * exists, torch.float16), _two_terms(angle.sin() * exists, torch.float16)]
        padded = torch.zeros(BINS.value, mels, dtype=torch.float64)
        padded[: 101 - odd, : config.n_mels] = bank[:, odd::2].T
        banks.append(_two_terms(padded, torch.bfloat16))
    at = torch.arange(SUMS.value)
    windows = torch.stack([window[at], window[200 - at], window[200 + at], window[(400 - at).clamp(max=399)]])
    windows[1::2, 0] = 0.0
    return (
        windows.to(device, torch.float32),
        torch.stack(dfts).contiguous().to(device),
        torch.stack(banks).contiguous().to(device),
        float(window.abs().max()),
    )


def log_mel(wave: Tensor, config: LogMelConfig, dtype: torch.dtype) -> Tensor:
    """(B, S) float32 or int16, samples next to each other -> (B, n_mels, T) float32 or bfloat16."""
    batch, frames = wave.shape[0], config.n_frames(wave.shape[1])
    out = wave.new_empty((batch, config.n_mels, frames), dtype=dtype)
    scale = 1 / 32768 if wave.dtype == torch.int16 else 1.0
    capability = capability_of(wave)
    options = _options(config.n_mels, capability)
    window, dft, bank, peak = _tables(config, options["WIDE"] + options["NARROW"], wave.device, scale)
    tiles = triton.cdiv(frames, options["BLOCK_F"])
    if batch:
        log_mel_fwd_kernel[(batch * tiles,)](
            wave,
            out,
            window,
            dft,
            bank,
            wave.stride(0),
            config.hop,
            frames,
            config.n_mels,
            tiles,
            peak,
            config.log_offset,
            config.mean,
            1 / config.std,
            **options,
        )
    return out


_POINTERS = {"window": "*fp32", "dft": "*fp16", "bank": "*bf16"}
_INTEGERS = dict.fromkeys(("stride", "hop", "frames", "n_mels", "tiles"), "i32")
_FLOATS = dict.fromkeys(("peak", "log_offset", "mean", "inverse_std"), "fp32")


def _launch(wave: str, out: str, n_mels: int, capabilities: tuple[int, ...]) -> Launch:
    """For architectures that have their options in common."""
    options: dict[str, Any] = _options(n_mels, capabilities[0])
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    return Launch(
        f"log_mel_fwd {wave} to {out}, {n_mels} mels, {options['BLOCK_K']} bins",
        log_mel_fwd_kernel,
        {"wave": f"*{wave}", "out": f"*{out}", **_POINTERS, **_INTEGERS, **_FLOATS},
        options,
        num_warps=warps,
        num_stages=stages,
        capabilities=capabilities,
    )


_HOPPER = tuple(filter(_hopper, CAPABILITIES))
_OTHERS = tuple(capability for capability in CAPABILITIES if capability not in _HOPPER)

AOT = [
    _launch("fp32", "fp32", 80, _OTHERS),
    _launch("fp32", "fp32", MAX_MELS, _OTHERS),
    _launch("fp32", "fp32", 80, _HOPPER),  # and all other numbers of mels
    _launch("i16", "bf16", 80, _HOPPER),  # the smaller variant stands in for its kind once
]
