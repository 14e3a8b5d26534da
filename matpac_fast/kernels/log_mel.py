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
from triton.language.extra.cuda import libdevice

from .. import backend, reference
from ..reference import LogMelConfig
from ._aot import CAPABILITIES, Launch, capability_of
from ._limits import MAX_MELS

# The DFTs' 101 sums and bins are padded to these.
SUMS = tl.constexpr(112)
BINS = tl.constexpr(128)
CLIPS = 65_535  # of one launch, at most


def _options(n_mels: int, frames: int, capability: int) -> dict[str, Any]:
    """Mels in two parts, frames of a program, sums of a step, bins of either parity at a time, and launch parameters.

    A warp has 16 frames, for with chained products Triton hands a tile's rows out to all warps, and warps beyond the
    rows would repeat others' work. One stage: with two, these tiles spill. Hopper's registers hold the sums of 64 bins,
    others' of 32, and Blackwell's tensor memory of no more than 64 frames; half as many beside the sums of more than 96
    mels, or where there are fewer frames than that, and every row has an address of its own.
    """
    wide, narrow = _mels_of(n_mels)
    tile = 64 if 100 <= capability < 120 else 128
    bins = 64 if 90 <= capability < 100 else 32
    short = frames < tile
    if short or wide + narrow > 96:
        bins //= 2
    mels = {"WIDE": wide, "NARROW": narrow, "BLOCK_N": 16}
    return {**mels, "SHORT": short, "BLOCK_F": tile, "BLOCK_K": bins, "num_warps": tile // 16, "num_stages": 1}


def _mels_of(n_mels: int) -> tuple[int, int]:
    """A wide and a narrow power of two from 16 that hold `n_mels` together: 80 = 64 + 16."""
    wide = max(16, 1 << ((n_mels - 1).bit_length() - 1)) if n_mels > 1 else 16
    return wide, max(16, 1 << (max(1, n_mels - wide) - 1).bit_length())


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
def _dot(high, low, table, size, acc, TRANSPOSED: tl.constexpr = False):
    """acc + (high + low) @ (table + its rest, which lies `size` further on), or both of these transposed."""
    exact = tl.load(table)
    rest = tl.load(table + size)
    if TRANSPOSED:
        exact, rest = tl.trans(exact), tl.trans(rest)
    if INTERPRETED:
        high, low = high.to(tl.float32), low.to(tl.float32)
        exact, rest = exact.to(tl.float32), rest.to(tl.float32)
    acc = tl.dot(low, exact, acc)
    acc = tl.dot(high, rest, acc)
    return tl.dot(high, exact, acc)


@triton.jit
def _powers(wave, start, window, dft, scale, i, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Squared magnitudes of the bins 2 i and 2 i + 1, times scale^2: twice (BLOCK_F, BLOCK_K)."""
    even_real = tl.zeros([BLOCK_F, BLOCK_K], dtype=tl.float32)
    odd_real = tl.zeros([BLOCK_F, BLOCK_K], dtype=tl.float32)
    even_imag = tl.zeros([BLOCK_F, BLOCK_K], dtype=tl.float32)
    odd_imag = tl.zeros([BLOCK_F, BLOCK_K], dtype=tl.float32)
    size = SUMS * BINS
    for first in range(0, SUMS, BLOCK_N):
        # Past n = 100 the tables are zero. At n = 0 there is no y[400], and y[200] counts once, as y2.
        n = first + tl.arange(0, BLOCK_N)  # [BN]
        forwards = wave + start[:, None] + n[None, :]
        backwards = wave + start[:, None] + tl.minimum(200 - n, 199)[None, :]
        y0 = tl.load(forwards).to(tl.float32) * tl.load(window + n)[None, :]
        y1 = tl.load(backwards).to(tl.float32) * tl.load(window + SUMS + n)[None, :]
        y2 = tl.load(forwards + 200).to(tl.float32) * tl.load(window + 2 * SUMS + n)[None, :]
        y3 = tl.load(backwards + 200).to(tl.float32) * tl.load(window + 3 * SUMS + n)[None, :]
        table = dft + n[:, None] * BINS + i[None, :]  # [BN, BK]
        outer, inner = (y0 + y3) * scale[:, None], (y1 + y2) * scale[:, None]
        high, low = _split(outer + inner, tl.float16)
        even_real = _dot(high, low, table, size, even_real)
        high, low = _split(outer - inner, tl.float16)
        odd_real = _dot(high, low, table + 4 * size, size, odd_real)
        outer, inner = (y0 - y3) * scale[:, None], (y1 - y2) * scale[:, None]
        high, low = _split(outer - inner, tl.float16)
        even_imag = _dot(high, low, table + 2 * size, size, even_imag)
        high, low = _split(outer + inner, tl.float16)
        odd_imag = _dot(high, low, table + 6 * size, size, odd_imag)
    return even_real * even_real + even_imag * even_imag, odd_real * odd_real + odd_imag * odd_imag


@triton.jit
def _mel(acc, high, low, bank, i, first: tl.constexpr, MELS: tl.constexpr, padded):
    """acc + (powers of some bins) @ their bank, for MELS mels from `first` on.

    The bank lies as (mels, bins), so that in shared memory all its parts and the DFTs' tables have rows of the same
    length. The ptxas of CUDA 12.8, which Triton 3.6 and 3.7 bring for sm_90, loses a register copy where the wgmma
    descriptors of two layouts come from one address, and the product then reads its table from a random place.
    """
    table = bank + (first + tl.arange(0, MELS))[:, None] * BINS + i[None, :]  # [MELS, BK]
    return _dot(high, low, table, BINS * padded, acc, TRANSPOSED=True)


@triton.jit
def _log(x):
    """The natural logarithm by the GPU's own instruction, to 2^-22. `tl.log` takes thirty instructions."""
    return tl.log(x) if INTERPRETED else libdevice.fast_logf(x)


@triton.jit
def _store(out, mel, m, t, mine, n_mels, frames, log_offset, mean, inverse_std):
    y = (_log(mel + log_offset) - mean) * inverse_std  # [BF, MELS]
    mask = mine[:, None] & (m < n_mels)[None, :]
    tl.store(out + m.to(tl.int64)[None, :] * frames + t[:, None], y.to(out.dtype.element_ty), mask)


# Were the stride known as a multiple of 16, a lane would take four samples of a row, and the warp's loads of single
# ones, which those that run backwards are, would lie in eight rows: three times the sectors. The hop is known as a
# number, so that all rows of a lane share an address.
@triton.jit(do_not_specialize=["stride", "frames", "n_mels"])
def log_mel_fwd_kernel(
    wave,
    out,
    window,
    dft,
    bank,
    stride,
    frames,
    n_mels,
    peak,
    log_offset,
    mean,
    inverse_std,
    HOP: tl.constexpr,
    SHORT: tl.constexpr,
    WIDE: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    clip = tl.program_id(1).to(tl.int64)
    # Frames from the first on that the tile has to itself; the last tile of many begins early.
    own = tl.program_id(0) * BLOCK_F
    begin = own if SHORT else tl.minimum(own, frames - BLOCK_F)
    start = tl.arange(0, BLOCK_F)  # [BF], of a frame, from the first one's first sample
    if SHORT:  # there is one tile, and the last frame stands in for those that are past it
        start = tl.minimum(start, frames - 1)
    start *= HOP
    wave += clip * stride + begin.to(tl.int64) * HOP

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
    for first in range(0, BINS, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        even, odd = _powers(wave, start, window, dft, scale, i, BLOCK_F, BLOCK_N, BLOCK_K)
        high, low = _split(even * unscale * unscale, tl.bfloat16)
        wide = _mel(wide, high, low, bank, i, 0, WIDE, WIDE + NARROW)
        narrow = _mel(narrow, high, low, bank, i, WIDE, NARROW, WIDE + NARROW)
        high, low = _split(odd * unscale * unscale, tl.bfloat16)
        bank_of_odd = bank + 2 * BINS * (WIDE + NARROW)
        wide = _mel(wide, high, low, bank_of_odd, i, 0, WIDE, WIDE + NARROW)
        narrow = _mel(narrow, high, low, bank_of_odd, i, WIDE, NARROW, WIDE + NARROW)
    t = begin + tl.arange(0, BLOCK_F)  # [BF]
    mine = t < frames if SHORT else t >= own
    out += clip * n_mels * frames
    _store(out, wide, tl.arange(0, WIDE), t, mine, n_mels, frames, log_offset, mean, inverse_std)
    _store(out, narrow, WIDE + tl.arange(0, NARROW), t, mine, n_mels, frames, log_offset, mean, inverse_std)


def _two_terms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(2, ...): x rounded to `dtype`, and the rest."""
    high = x.to(dtype)
    return torch.stack([high, (x - high.to(x.dtype)).to(dtype)])


@functools.cache  # for ever: a CUDA graph of the caller's may hold its addresses
def _tables(
    config: LogMelConfig, mels: int, device: torch.device, scale: float
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Window at n, 200 - n, 200 + n and 400 - n (4, SUMS), DFTs (parity, real and imaginary, term, SUMS, BINS), bank
    (parity, term, mels, BINS), peak."""
    window = reference.mel_window(config) * config.gain * scale
    n = torch.arange(SUMS.value, dtype=torch.float64, device="cpu")[:, None]
    once = torch.where(n < 100, 1.0, torch.where(n == 100, 0.5, 0.0))  # n = 100 is folded onto itself
    bank = reference.mel_bank(config)  # (n_mels, 201)
    dfts, banks = [], []
    for odd in range(2):
        k = torch.arange(odd, 2 * BINS.value, 2, device="cpu")[None, :]
        angle = n * k % 400 * (2 * math.pi / 400)
        exists = once * (k <= 200)
        dfts += [_two_terms(angle.cos() * exists, torch.float16), _two_terms(angle.sin() * exists, torch.float16)]
        padded = torch.zeros(mels, BINS.value, dtype=torch.float64, device="cpu")
        padded[: config.n_mels, : 101 - odd] = bank[:, odd::2]
        banks.append(_two_terms(padded, torch.bfloat16))
    at = torch.arange(SUMS.value, device="cpu")
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
    options = _options(config.n_mels, frames, capability)
    window, dft, bank, peak = _tables(config, options["WIDE"] + options["NARROW"], wave.device, scale)
    tiles = triton.cdiv(frames, options["BLOCK_F"])
    for first in range(0, batch, CLIPS):
        log_mel_fwd_kernel[(tiles, min(CLIPS, batch - first))](
            wave[first:],
            out[first:],
            window,
            dft,
            bank,
            wave.stride(0),
            frames,
            config.n_mels,
            peak,
            config.log_offset,
            config.mean,
            1 / config.std,
            HOP=config.hop,
            **options,
        )
    return out


_POINTERS = {"window": "*fp32", "dft": "*fp16", "bank": "*bf16"}
_INTEGERS = dict.fromkeys(("stride", "frames", "n_mels"), "i32")
_FLOATS = dict.fromkeys(("peak", "log_offset", "mean", "inverse_std"), "fp32")


def _launch(wave: str, out: str, n_mels: int, frames: int, capability: int) -> Launch:
    options = _options(n_mels, frames, capability)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    # sm_120 spills a few bytes, by Triton 3.7 24, by 3.8 88, which it reads again once a program, or once for 32 bins.
    # With 16 bins at a time it would spill nothing, and take half as many instructions again.
    few = 96 if capability == 120 and options["BLOCK_K"] == 32 else 0
    return Launch(
        f"log_mel_fwd {wave} to {out}, {n_mels} mels, {frames} frames, sm_{capability}",
        log_mel_fwd_kernel,
        {"wave": f"*{wave}", "out": f"*{out}", **_POINTERS, **_INTEGERS, **_FLOATS},
        {**options, "HOP": 160},
        num_warps=warps,
        num_stages=stages,
        capabilities=(capability,),
        max_spills=few,
    )


_CASES = (
    ("fp32", "fp32", 80, 998),
    ("fp32", "fp32", 80, 48),
    ("fp32", "fp32", MAX_MELS, 998),
    ("i16", "bf16", 80, 998),
)
AOT = [_launch(*case, capability) for case in _CASES for capability in CAPABILITIES]
