"""The formulas in plain PyTorch: the specification that every kernel is tested against.

Any float dtype, any device, differentiable. Nothing here is tuned, and nothing here validates: `ops` does.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError
from .fields import convert


@dataclass(frozen=True)
class LogMelConfig:
    """The log-mel of MATPAC: 25 ms windows every 10 ms, 80 Slaney mels of 50-8000 Hz, natural log, normalised.

    The defaults are MATPAC's; the fields reach the front ends of other encoders too, such as PaSST's and BEATs'.

    Args:
        sample_rate: in Hz.
        n_fft, win_length, hop: in samples; a window shorter than `n_fft` is padded with zeros, on both sides, or
            after it where `framing` is "kaldi".
        n_mels, f_min, f_max: how many filters, and their range in Hz.
        log_offset: added before the logarithm; float32's epsilon.
        mean, std: the result is (ln(mel + log_offset) - mean) / std; those of AudioSet (2502.12031, official code).
        bank: "slaney" (Slaney's scale, filters of unit area, as librosa), "htk" (HTK's scale, filters of unit height,
            as torchaudio's default) or "kaldi" (HTK's scale, triangles straight in mel, not in Hz, as Kaldi).
        window: "hann" (periodic), "hann_symmetric", or "povey" (Kaldi's: a symmetric Hann to the power 0.85).
        framing: "valid" (no padding; the last incomplete window is dropped), "center" (frame t is centred on sample
            t * hop, the ends mirrored) or "kaldi" (as valid, and each frame loses its mean and is pre-emphasised on
            its own).
        preemphasis: a in x[n] - a x[n - 1]; outside "kaldi" on the whole wave, which loses its first sample.
        gain: the wave's factor.
        log_floor: mels below it count as it.

    Raises:
        ConfigError: values that cannot be.
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
    bank: str = "slaney"
    window: str = "hann"
    framing: str = "valid"
    preemphasis: float = 0.0
    gain: float = 1.0
    log_floor: float = 0.0

    def __post_init__(self) -> None:
        convert(self, "log-mel: ")
        for name, known in (("bank", BANKS), ("window", WINDOWS), ("framing", FRAMINGS)):
            if getattr(self, name) not in [*known]:  # a list, for what comes may have no hash
                raise ConfigError(f"log-mel: {name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"log-mel: {field.name} is {value}; expected a finite number")
        for name in ("log_offset", "log_floor"):
            if getattr(self, name) < 0:
                raise ConfigError(f"log-mel: {name} is {getattr(self, name)}; expected 0 or more, for its logarithm")
        if not 1 <= self.win_length <= self.n_fft or self.hop < 1 or self.n_mels < 1 or self.std == 0:
            raise ConfigError(
                f"log-mel: expected 1 <= win_length <= n_fft, hop and n_mels from 1, std not 0; got {self}"
            )
        if not 0 <= self.f_min < self.f_max <= self.sample_rate / 2:
            raise ConfigError(
                f"log-mel: f_min {self.f_min:g} and f_max {self.f_max:g} Hz; expected 0 <= f_min < f_max <= "
                f"{self.sample_rate / 2:g}, half the sample rate"
            )

    @property
    def _lost(self) -> int:
        return 1 if self.preemphasis and self.framing != "kaldi" else 0

    @property
    def _span(self) -> int:
        return self.win_length if self.framing == "kaldi" else self.n_fft

    def n_frames(self, n_samples: int) -> int:
        """Frames of a wave of `n_samples`; 0 where it is too short for one."""
        if n_samples < self.n_samples(1):
            return 0
        if self.framing == "center":
            return 1 + (n_samples - self._lost - self.n_fft % 2) // self.hop
        return 1 + (n_samples - self._lost - self._span) // self.hop

    def n_samples(self, n_frames: int) -> int:
        """The shortest wave that has `n_frames` frames (mirrored ends need more than half a window)."""
        if self.framing == "center":
            return max((n_frames - 1) * self.hop + self.n_fft % 2, self.n_fft // 2 + 1) + self._lost
        return self._span + (n_frames - 1) * self.hop + self._lost


# Of banks and windows, whichever device is torch's default: they are the same to the bit everywhere.
_ON_CPU: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def hz_to_mel(hz: Tensor, scale: str = "slaney") -> Tensor:
    """Slaney's mel scale: linear below 1000 Hz (200/3 Hz a mel), then 27 steps of 6.4 ** (1 / 27); or "htk"."""
    if scale == "htk":
        return 1127.0 * torch.log1p(hz / 700.0)
    return torch.where(
        hz < 1000.0, hz * 3.0 / 200.0, 15.0 + torch.log(hz.clamp(min=1e-9) / 1000.0) * 27.0 / math.log(6.4)
    )


def mel_to_hz(mel: Tensor, scale: str = "slaney") -> Tensor:
    """Inverse of `hz_to_mel`."""
    if scale == "htk":
        return 700.0 * torch.expm1(mel / 1127.0)
    return torch.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * torch.exp((mel - 15.0) * math.log(6.4) / 27.0))


def _triangles(edges: Tensor, at: Tensor) -> Tensor:
    """Filters of unit height: row i rises from edges[i] to edges[i + 1] and falls to edges[i + 2]; (n_mels, bins)."""
    distance = at[None, :] - edges[:, None]
    width = edges.diff()[:, None]
    return torch.minimum(distance[:-2] / width[:-1], -distance[2:] / width[1:]).clamp(min=0.0)


def _edges(config: LogMelConfig, scale: str) -> Tensor:
    """Where the filters begin, peak and end, in mel: (n_mels + 2,)."""
    low, high = hz_to_mel(torch.tensor([config.f_min, config.f_max], **_ON_CPU), scale)
    return torch.linspace(low, high, config.n_mels + 2, **_ON_CPU)


def _slaney(config: LogMelConfig, bins: Tensor) -> Tensor:
    edges = mel_to_hz(_edges(config, "slaney"))
    return _triangles(edges, bins) * (2.0 / (edges[2:] - edges[:-2]))[:, None]


def _htk(config: LogMelConfig, bins: Tensor) -> Tensor:
    return _triangles(mel_to_hz(_edges(config, "htk"), "htk"), bins)


def _kaldi(config: LogMelConfig, bins: Tensor) -> Tensor:
    bank = _triangles(_edges(config, "htk"), hz_to_mel(bins, "htk"))
    return F.pad(bank[:, :-1], (0, 1))  # Kaldi leaves the Nyquist bin out


BANKS = {"slaney": _slaney, "htk": _htk, "kaldi": _kaldi}
WINDOWS = {
    "hann": lambda n: torch.hann_window(n, periodic=True, **_ON_CPU),
    "hann_symmetric": lambda n: torch.hann_window(n, periodic=False, **_ON_CPU),
    "povey": lambda n: torch.hann_window(n, periodic=False, **_ON_CPU) ** 0.85,
}
FRAMINGS = ("valid", "center", "kaldi")


def mel_bank(config: LogMelConfig) -> Tensor:
    """The mel filters `config.bank`, (n_mels, n_fft // 2 + 1) float64 on the CPU."""
    bins = torch.arange(config.n_fft // 2 + 1, **_ON_CPU) * (config.sample_rate / config.n_fft)  # Hz
    return BANKS[config.bank](config, bins)


def mel_window(config: LogMelConfig) -> Tensor:
    """The window `config.window`, padded to (n_fft,), float64 on the CPU."""
    room = config.n_fft - config.win_length
    left = 0 if config.framing == "kaldi" else room // 2
    return F.pad(WINDOWS[config.window](config.win_length), (left, room - left))


def _frames(wave: Tensor, config: LogMelConfig) -> Tensor:
    """(B, S) -> (B, T, n_fft), before the window."""
    a = config.preemphasis
    if config.framing == "kaldi":
        frames = wave.unfold(-1, config.win_length, config.hop)
        frames = frames - frames.mean(dim=-1, keepdim=True)
        frames = frames - a * torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        return F.pad(frames, (0, config.n_fft - config.win_length))
    if a:
        wave = wave[:, 1:] - a * wave[:, :-1]
    if config.framing == "center":
        wave = F.pad(wave, (config.n_fft // 2, config.n_fft // 2), mode="reflect")
    return wave.unfold(-1, config.n_fft, config.hop)


def log_mel(wave: Tensor, config: LogMelConfig = LogMelConfig()) -> Tensor:
    """(B, S) wave -> (B, n_mels, T) normalised log-mel. int16 counts 32768 as 1.0 and computes in float32."""
    if wave.dtype == torch.int16:
        wave = wave.to(torch.float32) / 32768.0
    if wave.shape[0] == 0:  # no FFT of nothing
        return wave[:, :1, None].expand(0, config.n_mels, config.n_frames(wave.shape[1]))
    window = mel_window(config).to(wave.device, wave.dtype)
    bank = mel_bank(config).to(wave.device, wave.dtype)
    spectrum = torch.fft.rfft(_frames(wave * config.gain, config) * window)  # (B, T, bins)
    power = spectrum.real.square() + spectrum.imag.square()
    mel = bank @ power.transpose(-1, -2)  # (B, n_mels, T)
    return (torch.log(mel.clamp(min=config.log_floor) + config.log_offset) - config.mean) / config.std


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
    return hand_out((cls + pos[:, :1]).expand(spec.shape[0], -1, -1), tokens, ids_shuffle, n_visible)


def hand_out(head: Tensor, tokens: Tensor, ids_shuffle: Tensor, n_visible: int) -> tuple[Tensor, Tensor]:
    """Embedded patches (B, N, D) as `masked_patch_embed` deals them out, behind the CLS row `head` (B, 1, D)."""
    shuffled = tokens.gather(1, ids_shuffle[:, :, None].expand(-1, -1, tokens.shape[-1]))
    visible = torch.cat([head, shuffled[:, :n_visible]], dim=1)
    masked = torch.cat([head, shuffled[:, n_visible:]], dim=1)
    return visible, masked.detach()


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a loss and of its arithmetic: float64 if any input is, else float32."""
    return functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)


def prototype_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: float | Tensor,
    teacher_temp: float | Tensor,
    mean_of: str = "probabilities",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(student logits / temp) against softmax((teacher logits - center) / temp).

    Shapes: features (N, d), prototype matrices (K, d), center (K,); the temperatures are numbers or tensors (). Returns
    loss (N,) and the column mean (K,) of the teacher's probabilities (the official centre) or of its logits (DINO's).
    Only the student's side has gradients. 16-bit inputs are multiplied in float32: their logits would be too coarse for
    these temperatures.
    """
    work = work_dtype(student, student_weight, teacher, teacher_weight)
    logits = student.to(work) @ student_weight.to(work).T  # (N, K)
    with torch.no_grad():
        teacher_logits = teacher.to(work) @ teacher_weight.to(work).T  # (N, K)
        target = torch.softmax((teacher_logits - center) / teacher_temp, dim=-1)
        mean = (target if mean_of == "probabilities" else teacher_logits).mean(0)
    return -(target * torch.log_softmax(logits / student_temp, dim=-1)).sum(-1), mean


def prediction_loss(
    prediction: Tensor, target: Tensor, temperature: float | Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """2 - 2 cos(prediction, target) a token; with MCL heads, their soft or hard minimum.

    prediction (N, D) and target (N, D) -> loss (N,), None. With heads, prediction (N, H, D), and a temperature: the
    losses of the heads are weighed by softmax(-loss / temperature), which carries no gradient (MATPAC++,
    2508.12709); temperature 0 takes the minimum, a tensor () is positive. Returns loss (N,) and the best head (N,).
    16-bit inputs are computed in float32: float16 has no such epsilon as keeps a vector of zeros from becoming NaN.
    """
    work = work_dtype(prediction, target)
    target = F.normalize(target.to(work), dim=-1)
    prediction = F.normalize(prediction.to(work), dim=-1)
    if temperature is None:
        return 2 - 2 * (prediction * target).sum(-1), None
    return over_heads(2 - 2 * (prediction * target[:, None]).sum(-1), temperature)


def over_heads(loss: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """The heads' losses (N, H) -> their soft or hard minimum (N,), and the best head (N,)."""
    least, best = loss.min(dim=-1)
    if isinstance(temperature, Tensor) or temperature > 0:
        return (torch.softmax(-loss / temperature, dim=-1).detach() * loss).sum(-1), best
    return least, best


def attention(qkv: Tensor) -> Tensor:
    """Self-attention from packed queries, keys and values (B, N, 3, H, d) -> (B, N, H, d), by torch's own kernels."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def bias_gelu(h: Tensor, bias: Tensor) -> Tensor:
    """The exact GELU of h (..., C) + bias (C,), in the dtype of h."""
    return F.gelu(h + bias.to(h.dtype))


def add_layer_norm(
    x: Tensor, delta: Tensor | None, bias: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x + delta + bias, (..., D) in the dtype of x, and its LayerNorm in `dtype`."""
    if delta is not None:
        x = (x + delta + (0 if bias is None else bias)).to(x.dtype)
    weight = norm.weight.to(torch.promote_types(x.dtype, torch.float32))
    return x, F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, norm.bias.to(weight.dtype), norm.eps).to(dtype)


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
