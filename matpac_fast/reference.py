"""The formulas in plain PyTorch: the specification that every kernel is tested against.

Any float dtype, any device, differentiable. Nothing here is tuned, and nothing here validates: `ops` does.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LogMelConfig:
    """The log-mel of MATPAC: 25 ms windows every 10 ms, 80 Slaney mels of 50-8000 Hz, natural log, normalised.

    Lengths in samples, frequencies in Hz. `mean` and `std` are those of AudioSet's log-mels (2502.12031 and the
    official configuration); `log_offset` is float32's epsilon, added before the logarithm.
    """

    sample_rate: int = 16_000
    n_fft: int = 400
    win_length: int = 400
    hop: int = 160
    n_mels: int = 80
    f_min: float = 50.0
    f_max: float = 8_000.0
    log_offset: float = 1.1920928955078125e-07
    mean: float = -7.056
    std: float = 4.193

    def n_frames(self, n_samples: int) -> int:
        """Frames of a wave of `n_samples`: no padding, so the last incomplete window is dropped."""
        return 0 if n_samples < self.n_fft else 1 + (n_samples - self.n_fft) // self.hop

    def n_samples(self, n_frames: int) -> int:
        """The shortest wave that has `n_frames` frames."""
        return self.n_fft + (n_frames - 1) * self.hop


def hz_to_mel(hz: Tensor) -> Tensor:
    """Slaney's mel scale: linear below 1000 Hz (200/3 Hz a mel), then 27 steps of 6.4 ** (1 / 27)."""
    return torch.where(
        hz < 1000.0, hz * 3.0 / 200.0, 15.0 + torch.log(hz.clamp(min=1e-9) / 1000.0) * 27.0 / math.log(6.4)
    )


def mel_to_hz(mel: Tensor) -> Tensor:
    """Inverse of `hz_to_mel`."""
    return torch.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * torch.exp((mel - 15.0) * math.log(6.4) / 27.0))


def mel_bank(config: LogMelConfig) -> Tensor:
    """Triangular mel filters of unit area (Slaney), (n_mels, n_fft // 2 + 1) float64 on the CPU."""
    bins = torch.linspace(0, config.sample_rate // 2, config.n_fft // 2 + 1, dtype=torch.float64)  # Hz
    low, high = hz_to_mel(torch.tensor([config.f_min, config.f_max], dtype=torch.float64))
    edges = mel_to_hz(torch.linspace(low, high, config.n_mels + 2, dtype=torch.float64))  # Hz
    slopes = edges[:, None] - bins[None, :]  # (n_mels + 2, bins)
    width = edges.diff()[:, None]
    rising = -slopes[:-2] / width[:-1]
    falling = slopes[2:] / width[1:]
    triangles = torch.minimum(rising, falling).clamp(min=0.0)
    return triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None]


def window_and_bank(config: LogMelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    window = torch.hann_window(config.win_length, periodic=True, dtype=torch.float64)
    left = (config.n_fft - config.win_length) // 2
    window = F.pad(window, (left, config.n_fft - config.win_length - left))
    return window.to(device, dtype), mel_bank(config).to(device, dtype)


def log_mel(wave: Tensor, config: LogMelConfig = LogMelConfig()) -> Tensor:
    """(B, S) wave -> (B, n_mels, T) normalised log-mel. int16 counts 32768 as 1.0 and computes in float32."""
    if wave.dtype == torch.int16:
        wave = wave.to(torch.float32) / 32768.0
    window, bank = window_and_bank(config, wave.dtype, wave.device)
    frames = wave.unfold(-1, config.n_fft, config.hop) * window  # (B, T, n_fft)
    spectrum = torch.fft.rfft(frames)  # (B, T, bins)
    power = spectrum.real.square() + spectrum.imag.square()
    mel = bank @ power.transpose(-1, -2)  # (B, n_mels, T)
    return (torch.log(mel + config.log_offset) - config.mean) / config.std


def patches(spec: Tensor, size: int) -> Tensor:
    """(B, F, T) -> (B, F/size * T/size, size * size): frequency-major patches, each row-major as in a convolution."""
    b, f, t = spec.shape
    grid = spec.reshape(b, f // size, size, t // size, size).transpose(2, 3)  # (B, F/p, T/p, p, p)
    return grid.reshape(b, (f // size) * (t // size), size * size)


def masked_patch_embed(
    spec: Tensor,
    weight: Tensor,
    bias: Tensor,
    pos: Tensor,
    cls: Tensor,
    ids_shuffle: Tensor,
    n_visible: int,
) -> tuple[Tensor, Tensor]:
    """Embed every patch once; hand the first `n_visible` of the shuffle to the student, the rest to the teacher.

    Shapes: spec (B, F, T), weight (D, 1, p, p), bias (D,), pos (1, 1 + N, D) with the CLS row first, cls (1, 1, D),
    ids_shuffle (B, N). Returns visible (B, 1 + V, D) and masked (B, 1 + M, D); the masked one carries no gradient.
    """
    tokens = patches(spec, weight.shape[-1]) @ weight.flatten(1).T + bias + pos[:, 1:]  # (B, N, D)
    shuffled = tokens.gather(1, ids_shuffle[:, :, None].expand(-1, -1, tokens.shape[-1]))
    head = (cls + pos[:, :1]).expand(spec.shape[0], -1, -1)
    visible = torch.cat([head, shuffled[:, :n_visible]], dim=1)
    masked = torch.cat([head, shuffled[:, n_visible:]], dim=1)
    return visible, masked.detach()


def prototype_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    mean_of: str = "probabilities",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(student logits / temp) against softmax((teacher logits - center) / temp).

    Shapes: features (N, d), prototype matrices (K, d), center (K,). Returns loss (N,) and the column mean (K,) of the
    teacher's probabilities (the official centre) or of its logits (DINO's). Only the student's side has gradients.
    16-bit features and prototypes are multiplied in float32: their logits would be too coarse for these temperatures.
    """
    work = functools.reduce(
        torch.promote_types, (t.dtype for t in (student, student_weight, teacher, teacher_weight)), torch.float32
    )
    logits = student.to(work) @ student_weight.to(work).T  # (N, K)
    with torch.no_grad():
        teacher_logits = teacher.to(work) @ teacher_weight.to(work).T  # (N, K)
        target = torch.softmax((teacher_logits - center) / teacher_temp, dim=-1)
        mean = (target if mean_of == "probabilities" else teacher_logits).mean(0)
    return -(target * torch.log_softmax(logits / student_temp, dim=-1)).sum(-1), mean


def prediction_loss(
    prediction: Tensor, target: Tensor, temperature: float | None = None
) -> tuple[Tensor, Tensor | None]:
    """2 - 2 cos(prediction, target) a token; with MCL heads, their soft or hard minimum.

    prediction (N, D) and target (N, D) -> loss (N,), None. With heads, prediction (N, H, D), and a temperature: the
    losses of the heads are weighed by softmax(-loss / temperature), which carries no gradient (MATPAC++,
    2508.12709); temperature 0 takes the minimum. Returns loss (N,) and the best head (N,).
    """
    target = F.normalize(target, dim=-1)
    prediction = F.normalize(prediction, dim=-1)
    if temperature is None:
        return 2 - 2 * (prediction * target).sum(-1), None
    loss = 2 - 2 * (prediction * target[:, None]).sum(-1)  # (N, H)
    least, best = loss.min(dim=-1)
    if temperature > 0:
        return (torch.softmax(-loss / temperature, dim=-1).detach() * loss).sum(-1), best
    return least, best


# Odd constants of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), written as the signed 64-bit integers torch has.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64, which torch shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """splitmix64 of int64 counters, wrapping; the same bits on every device."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def wrap_int64(x: int) -> int:
    """The signed 64-bit integer that `x` is modulo 2 ** 64."""
    return x if -(1 << 63) <= x < 1 << 63 else (x + (1 << 63)) % (1 << 64) - (1 << 63)


def mask_shuffle(seed: int, step: int, index: Tensor, n_tokens: int) -> Tensor:
    """Random permutations that are a pure function of (seed, step, index): (B,) int64 -> (B, n_tokens) int64.

    Token t of sample i gets the key splitmix64(hash(seed, step, i) + t) with its low bits replaced by t, so that no
    two keys tie; the permutation is the ascending order of the keys as signed integers. `seed` and `step` count
    modulo 2 ** 64.
    """
    token = torch.arange(n_tokens, device=index.device)
    start = splitmix64(index.new_full((), wrap_int64(seed))) ^ wrap_int64(step)
    stream = splitmix64(splitmix64(start) ^ index)  # (B,)
    noise = splitmix64(stream[:, None] + token)  # (B, n_tokens)
    bits = max(1, (n_tokens - 1).bit_length())
    return (((noise >> bits) << bits) | token).argsort(dim=1)
