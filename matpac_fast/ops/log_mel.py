"""log_mel: wave -> normalised log-mel in one pass."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import choose
from ..reference import LogMelConfig
from ._check import check_tensor, shape_of

_WAVE_DTYPES = (torch.float32, torch.float64, torch.int16)
_NATIVE_DTYPE = {torch.float32: 0, torch.float64: 1, torch.int16: 2, torch.bfloat16: 3}


def _check(wave: Tensor, config: LogMelConfig, dtype: torch.dtype | None) -> torch.dtype:
    """Raise on what cannot be; else the dtype of the output."""
    check_tensor("log_mel", "wave", wave, ndim=2, dtypes=_WAVE_DTYPES)
    if wave.shape[1] < config.n_fft:
        raise ValueError(
            f"log_mel: wave is {shape_of(wave)}; one frame needs {config.n_fft} samples "
            f"({1000 * config.n_fft / config.sample_rate:g} ms): pad it first"
        )
    double = wave.dtype == torch.float64
    expected = (torch.float64,) if double else (torch.float32, torch.bfloat16)
    if dtype is None:
        return expected[0]
    if dtype not in expected:
        raise TypeError(f"log_mel: dtype is {dtype}; expected one of {expected} for a wave of {wave.dtype}")
    return dtype


@functools.lru_cache(maxsize=16)
def _plan(config: LogMelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernels need of `config`.

    window (400,) float64; bands (n_mels, 2) int32: the first bin of a mel and how many; weights: theirs, one after the other;
    inverse_sums (n_mels,): 1 / the sum of a mel's weights.
    """
    window, bank = reference.window_and_bank(config, torch.float64, torch.device("cpu"))
    bands, weights = [], []
    for row in bank:
        bins = row.nonzero()[:, 0].tolist()
        first, count = (bins[0], bins[-1] - bins[0] + 1) if bins else (0, 0)
        bands.append((first, count))
        weights.append(row[first : first + count])
    return (
        window.to(device),
        torch.tensor(bands, dtype=torch.int32, device=device),
        torch.cat(weights).to(device, dtype),
        (1 / bank.sum(dim=1)).to(device, dtype),
    )


def _args(wave: Tensor, out: Tensor, config: LogMelConfig, plan: tuple[Tensor, ...]) -> Any:
    from .. import _C

    window, bands, weights, inverse_sums = plan
    return _C.LogMelArgs(
        wave.data_ptr(),
        _NATIVE_DTYPE[wave.dtype],
        wave.shape[0],
        wave.stride(0),
        config.hop,
        out.shape[2],
        out.data_ptr(),
        _NATIVE_DTYPE[out.dtype],
        window.data_ptr(),
        bands.data_ptr(),
        weights.data_ptr(),
        inverse_sums.data_ptr(),
        config.n_mels,
        config.log_offset,
        config.mean,
        config.std,
    )


def _launch_cpp(wave: Tensor, config: LogMelConfig, dtype: torch.dtype) -> Tensor:
    from .. import _C

    work = torch.float64 if wave.dtype == torch.float64 else torch.float32
    out = wave.new_empty((wave.shape[0], config.n_mels, config.n_frames(wave.shape[1])), dtype=work)
    _C.log_mel_cpu(_args(wave, out, config, _plan(config, work, wave.device)), torch.get_num_threads())
    return out.to(dtype)


_LAUNCHERS = {"cpp": _launch_cpp}


# The configuration travels as plain scalars: a schema holds nothing else.
def _impl(wave: Tensor, *scalars: Any) -> Tensor:
    *fields, dtype = scalars
    config = LogMelConfig(*fields)
    if wave.stride(1) != 1:
        wave = wave.contiguous()
    launcher = choose("log_mel", wave.device)
    if launcher == "reference":
        return reference.log_mel(wave, config).to(dtype)
    return _LAUNCHERS[launcher](wave, config, dtype)


def _fake(wave: Tensor, *scalars: Any) -> Tensor:
    *fields, dtype = scalars
    config = LogMelConfig(*fields)
    return wave.new_empty((wave.shape[0], config.n_mels, 1 + (wave.shape[1] - config.n_fft) // config.hop), dtype=dtype)


def _backward_impl(grad: Tensor, wave: Tensor, *scalars: Any) -> Tensor:
    *fields, dtype = scalars
    with torch.enable_grad():
        wave = wave.detach().requires_grad_()
        out = reference.log_mel(wave, LogMelConfig(*fields)).to(dtype)
        return torch.autograd.grad(out, wave, grad)[0]


_SCALARS = (
    "int sample_rate, int n_fft, int win_length, int hop, int n_mels, float f_min, float f_max, "
    "float log_offset, float mean, float std, ScalarType dtype"
)
_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
_LIB.define(f"log_mel(Tensor wave, {_SCALARS}) -> Tensor")
_LIB.define(f"log_mel_backward(Tensor grad, Tensor wave, {_SCALARS}) -> Tensor")
for _device in ("CPU", "CUDA"):
    _LIB.impl("log_mel", _impl, _device)
_LIB.impl("log_mel_backward", _backward_impl, "CompositeExplicitAutograd")
torch.library.register_fake("matpac_fast::log_mel", _fake, lib=_LIB)
torch.library.register_fake(
    "matpac_fast::log_mel_backward", lambda grad, wave, *_: wave.new_empty(wave.shape), lib=_LIB
)


class _LogMel(torch.autograd.Function):
    """The op forwards; the reference, computed again, backwards."""

    @staticmethod
    def forward(ctx: Any, wave: Tensor, *scalars: Any) -> Tensor:
        ctx.save_for_backward(wave)
        ctx.scalars = scalars
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.matpac_fast.log_mel(wave, *scalars)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (wave,) = ctx.saved_tensors
        return torch.ops.matpac_fast.log_mel_backward(grad, wave, *ctx.scalars), *[None] * len(ctx.scalars)


_LIB.impl("log_mel", lambda *args: _LogMel.apply(*args), "Autograd")


def log_mel(wave: Tensor, config: LogMelConfig = LogMelConfig(), dtype: torch.dtype | None = None) -> Tensor:
    """Normalised log-mel spectrogram: (ln(mel + log_offset) - mean) / std, in one pass over the wave.

    Frames of `config.n_fft` samples every `config.hop`, without padding, so the last incomplete one is dropped; a
    periodic Hann window; the power spectrum; triangular mel filters (2502.12031; the official package's front end).

    Args:
        wave: (B, S) float32, float64 or int16 at `config.sample_rate`, where int16 counts 32768 as 1.0; S at least
            one frame. Any strides.
        config: the parameters; the default is MATPAC's.
        dtype: of the result: float32 (the default) or bfloat16; float64 for a float64 wave.

    Returns:
        (B, n_mels, T) with T = config.n_frames(S), contiguous. A NaN in the wave stays in the frames that hold it.
        The same bits for a clip in any batch and for any number of threads.

    Raises:
        TypeError: a wave or result of another dtype.
        ValueError: a wave that is not (B, S), or shorter than one frame.

    Gradients reach the wave through the PyTorch reference, which the backward pass computes anew (once differentiable).
    """
    dtype = _check(wave, config, dtype)
    if config.n_fft != 400 or config.win_length != 400 or choose("log_mel", wave.device) == "reference":
        return reference.log_mel(wave, config).to(dtype)
    return torch.ops.matpac_fast.log_mel(wave, *dataclasses.astuple(config), dtype)
