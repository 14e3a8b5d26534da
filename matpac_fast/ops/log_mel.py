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
    least = config.n_samples(1)
    if wave.shape[1] < least:
        raise ValueError(
            f"log_mel: wave is {shape_of(wave)}; one frame needs {least} samples "
            f"({1000 * least / config.sample_rate:g} ms): pad it first"
        )
    expected = (torch.float64,) if wave.dtype == torch.float64 else (torch.float32, torch.bfloat16)
    if dtype is None:
        return expected[0]
    if dtype not in expected:
        names = " or ".join(str(d).removeprefix("torch.") for d in expected)
        raise TypeError(f"log_mel: dtype is {dtype}; expected {names} for the wave {shape_of(wave)}")
    return dtype


def _is_native(config: LogMelConfig) -> bool:
    """Whether the kernels compute `config`: plain windows of 400 samples, with any hop, window and bank."""
    return (
        config.n_fft == config.win_length == 400
        and config.framing == "valid"
        and config.preemphasis == 0
        and config.log_floor == 0
    )


@functools.lru_cache(maxsize=16)
def _plan(config: LogMelConfig, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernels need of `config`.

    window (400,) float64; bands (n_mels, 2) int32: the first bin of a mel and how many; weights: theirs, one after
    the other; inverse_sums (n_mels,): 1 / the sum of a mel's weights.
    """
    window = reference.mel_window(config) * config.gain
    bank = reference.mel_bank(config)
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


# The configuration travels field by field, in the order of the dataclass: a schema holds plain scalars only.
_SCALARS = ", ".join(f"{field.type} {field.name}" for field in dataclasses.fields(LogMelConfig)) + ", ScalarType dtype"
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


def _autograd(wave: Tensor, *scalars: Any) -> Tensor:
    if torch.is_grad_enabled() and wave.requires_grad:
        return _LogMel.apply(wave, *scalars)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.matpac_fast.log_mel(wave, *scalars)


_LIB.impl("log_mel", _autograd, "Autograd")


def log_mel(wave: Tensor, config: LogMelConfig = LogMelConfig(), dtype: torch.dtype | None = None) -> Tensor:
    """Normalised log-mel spectrogram, (ln(mel + log_offset) - mean) / std, in one pass over the wave.

    The power spectrum of windows of `config.n_fft` samples every `config.hop`, through triangular mel filters
    (MATPAC's front end: 2502.12031 and the official package). Windows of 400 samples without padding or pre-emphasis
    have kernels, whatever the hop, window and bank; every other configuration takes the PyTorch reference.

    Args:
        wave: (B, S) float32, float64 or int16 at `config.sample_rate`, where int16 counts 32768 as 1.0; S at least
            one frame, `config.n_samples(1)`. Any strides; B may be 0.
        config: the parameters; the default is MATPAC's.
        dtype: of the result: float32 (the default) or bfloat16; float64 for a float64 wave.

    Returns:
        (B, n_mels, T) with T = config.n_frames(S). A NaN in the wave stays in the frames that hold it. On the CPU a
        clip has the same bits in any batch and for any number of threads.

    Raises:
        TypeError: a wave or result of another dtype.
        ValueError: a wave that is not (B, S), or shorter than one frame.

    Gradients reach the wave through the PyTorch reference, which the backward pass computes anew (once differentiable).
    On the CPU the transform is float32's, but frames with a band 69 dB below their energy, where float32's rounding
    would show, are transformed in float64: errors stay within a few 1e-6.
    """
    dtype = _check(wave, config, dtype)
    if not _is_native(config) or choose("log_mel", wave.device) == "reference":
        return reference.log_mel(wave, config).to(dtype)
    return torch.ops.matpac_fast.log_mel(wave, *dataclasses.astuple(config), dtype)
