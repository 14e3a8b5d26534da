"""log_mel: wave -> normalised log-mel in one pass."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from .. import backend, reference
from ..backend import choose, device_guard, without_autocast
from ..errors import BackendError
from ..kernels._limits import MAX_MELS
from ..reference import LogMelConfig
from ._check import check_tensor, shape_of
from ._native import DTYPE
from ._once import implement, once_differentiable, under_autograd

_WAVE_DTYPES = (torch.float32, torch.float64, torch.int16)
# A block of the CUDA kernel keeps 32 frames of samples; with longer hops than this they would not fit into the 99 KiB
# of shared memory of sm_86, 89 and 120 (csrc/log_mel_block.h counts them).
_CUDA_HOP = 353


def _check(wave: Tensor, config: LogMelConfig, dtype: torch.dtype | None) -> torch.dtype:
    """Raise on what cannot be; else the dtype of the output."""
    check_tensor("log_mel", "wave", wave, ndim=2, dtypes=_WAVE_DTYPES)
    if not isinstance(config, LogMelConfig):
        raise TypeError(
            f"log_mel: config is a {type(config).__name__}; expected a LogMelConfig, such as LogMelConfig(n_mels=80), "
            "or the log_mel of a MatpacConfig"
        )
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


def _obstacle(launcher: str, wave: Tensor, config: LogMelConfig) -> str | None:
    """Why the kernel of `launcher` does not compute this, or None where it does."""
    if config.n_fft != 400 or config.win_length != 400:
        return f"windows are {config.win_length} samples in {config.n_fft}; kernels have 400 in 400"
    if config.framing != "valid" or config.preemphasis or config.log_floor:
        return "the configuration has another framing, pre-emphasis or a floor; kernels have none"
    if launcher != "cpp" and wave.dtype == torch.float64:
        return "it has no float64"
    if launcher == "cuda" and config.hop > _CUDA_HOP:
        return f"it has hops of at most {_CUDA_HOP} samples, not {config.hop}"
    if launcher == "triton" and config.n_mels > MAX_MELS:
        return f"it has at most {MAX_MELS} mels, not {config.n_mels}"
    return None


def _choose(wave: Tensor, config: LogMelConfig) -> str:
    launcher = choose("log_mel", wave.device, wave.dtype)
    if launcher == "reference":
        return launcher
    reason = _obstacle(launcher, wave, config)
    if reason is None:
        return launcher
    if backend._forced != "auto":
        raise BackendError(f"log_mel: backend {backend._forced!r} is forced and has no kernel for this: {reason}")
    if launcher == "cuda" and backend.unavailable("triton") is None and _obstacle("triton", wave, config) is None:
        return "triton"
    return "reference"


@functools.cache  # for ever: a CUDA graph of the caller's may hold its addresses
def _plan(
    config: LogMelConfig, dtype: torch.dtype, device: torch.device, fours: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the kernels need of `config`.

    window (400,) float64; bands (n_mels, 3) int32: a mel's first bin, how many, where its weights begin; weights: all
    mels', one after the other; inverse_sums (n_mels,): 1 / the sum of a mel's weights.

    With `fours`, as the CUDA kernel wants it, four mels at a time have as many bins, a multiple of four, some of weight
    0. Bands are then (n_mels, 2): how many fours, and where they begin; and weights (fours, 8) int32: the bits of four
    in float32, and where the kernel puts the powers of their bins.
    """
    window = reference.mel_window(config) * config.gain
    bank = reference.mel_bank(config)
    spans = []
    for row in bank:
        bins = row.nonzero()[:, 0].tolist()
        spans.append((bins[0], bins[-1] - bins[0] + 1) if bins else (0, 0))
    bands, weights, indices, start = [], [], [], 0
    for m, (row, (first, count)) in enumerate(zip(bank, spans, strict=True)):
        if fours:
            count = max(count for _, count in spans[m - m % 4 :][:4])
            count += -count % 4
            first = min(first, len(row) - count)
        bands.append((count // 4, start // 4) if fours else (first, count, start))
        weights.append(row[first : first + count])
        indices += range(first, first + count)
        start += count
    flat = torch.cat(weights).to(dtype)
    if fours:
        from .. import _C

        places = torch.tensor(_C.log_mel_places(), dtype=torch.int32, device="cpu")[indices]
        flat = torch.cat([flat.view(torch.int32).view(-1, 4), places.view(-1, 4)], dim=1)
    return (
        window.to(device),
        torch.tensor(bands, dtype=torch.int32, device=device),
        flat.to(device),
        (1 / bank.sum(dim=1)).to(device, dtype),
    )


def _arguments(wave: Tensor, out: Tensor, config: LogMelConfig, plan: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Those of csrc/ops.h's LogMelArgs, in its order."""
    window, bands, weights, inverse_sums = plan
    return (
        wave.data_ptr(),
        DTYPE[wave.dtype],
        wave.shape[0],
        wave.stride(0),
        config.hop,
        out.shape[2],
        out.data_ptr(),
        DTYPE[out.dtype],
        window.data_ptr(),
        bands.data_ptr(),
        weights.data_ptr(),
        inverse_sums.data_ptr(),
        config.n_mels,
        config.log_offset,
        config.mean,
        config.std,
    )


def _args(wave: Tensor, out: Tensor, config: LogMelConfig, plan: tuple[Tensor, ...]) -> Any:
    from .. import _C

    return _C.LogMelArgs(*_arguments(wave, out, config, plan))


def _launch_cpp(wave: Tensor, config: LogMelConfig, dtype: torch.dtype) -> Tensor:
    from .. import _C

    work = torch.float64 if wave.dtype == torch.float64 else torch.float32
    out = wave.new_empty((wave.shape[0], config.n_mels, config.n_frames(wave.shape[1])), dtype=work)
    plan = _plan(config, work, wave.device)  # held here: of threads that make one at once the cache keeps one thread's
    _C.log_mel_cpu(_args(wave, out, config, plan), torch.get_num_threads())
    return out.to(dtype)


def _launch_cuda(wave: Tensor, config: LogMelConfig, dtype: torch.dtype) -> Tensor:
    from .. import _C

    out = wave.new_empty((wave.shape[0], config.n_mels, config.n_frames(wave.shape[1])), dtype=dtype)
    plan = _plan(config, torch.float32, wave.device, fours=True)  # held as above
    args = _args(wave, out, config, plan)
    _C.log_mel_cuda(args, wave.device.index, torch.cuda.current_stream(wave.device).cuda_stream)
    return out


def _launch_triton(wave: Tensor, config: LogMelConfig, dtype: torch.dtype) -> Tensor:
    from ..kernels import log_mel as kernel

    with device_guard(wave):
        return kernel.log_mel(wave, config, dtype)


_LAUNCHERS = {"cpp": _launch_cpp, "cuda": _launch_cuda, "triton": _launch_triton}


_config = functools.lru_cache(LogMelConfig)  # its checks take 20 us


def _reference(wave: Tensor, config: LogMelConfig, dtype: torch.dtype) -> Tensor:
    with without_autocast(wave.device):  # it would take the mel filters' product in 16 bits
        return reference.log_mel(wave, config).to(dtype)


def _impl(wave: Tensor, *scalars: Any) -> Tensor:
    *fields, dtype = scalars
    config = _config(*fields)
    if wave.stride(1) != 1:
        wave = wave.contiguous()
    launcher = _choose(wave, config)
    if launcher == "reference":
        return _reference(wave, config, dtype)
    return _LAUNCHERS[launcher](wave, config, dtype)


def _fake(wave: Tensor, *scalars: Any) -> Tensor:
    *fields, dtype = scalars
    config = LogMelConfig(*fields)
    return wave.new_empty((wave.shape[0], config.n_mels, 1 + (wave.shape[1] - config.n_fft) // config.hop), dtype=dtype)


def _backward_impl(grad: Tensor, wave: Tensor, *scalars: Any) -> Tensor:
    *fields, dtype = scalars
    with torch.enable_grad(), without_autocast(wave.device):
        wave = wave.detach().requires_grad_()
        out = reference.log_mel(wave, _config(*fields)).to(dtype)
        return torch.autograd.grad(out, wave, grad)[0]


# The configuration travels field by field, in the order of the dataclass: a schema holds plain scalars only.
_FIELDS = tuple(field.name for field in dataclasses.fields(LogMelConfig))
_SCALARS = ", ".join(f"{field.type} {field.name}" for field in dataclasses.fields(LogMelConfig)) + ", ScalarType dtype"
_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
_LIB.define(f"log_mel(Tensor wave, {_SCALARS}) -> Tensor")
_LIB.define(f"log_mel_backward(Tensor grad, Tensor wave, {_SCALARS}) -> Tensor")
implement(_LIB, "log_mel", _impl, _fake)
_LIB.impl("log_mel_backward", _backward_impl, "CompositeExplicitAutograd")
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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (wave,) = ctx.saved_tensors
        return torch.ops.matpac_fast.log_mel_backward(grad, wave, *ctx.scalars), *[None] * len(ctx.scalars)


under_autograd(_LIB, "log_mel", _LogMel)


def log_mel(wave: Tensor, config: LogMelConfig = LogMelConfig(), dtype: torch.dtype | None = None) -> Tensor:
    """Normalised log-mel spectrogram, (ln(mel + log_offset) - mean) / std, in one pass over the wave.

    The power spectrum of windows of `config.n_fft` samples every `config.hop`, through triangular mel filters
    (MATPAC's front end: 2502.12031 and the official package). Windows of 400 samples without padding or pre-emphasis
    have kernels, whatever the hop, window and bank; every other configuration takes the PyTorch reference, and so does
    float64 on a GPU. Forcing a backend that has no kernel for the configuration raises BackendError. Autocast does not
    apply inside.

    Args:
        wave: (B, S) float32, float64 or int16 at `config.sample_rate`, where int16 counts 32768 as 1.0; S at least
            one frame, `config.n_samples(1)`. Any strides; B may be 0.
        config: the parameters; the default is MATPAC's.
        dtype: of the result: float32 (the default) or bfloat16; float64 for a float64 wave.

    Returns:
        (B, n_mels, T) with T = config.n_frames(S). A NaN in the wave stays in the frames that hold it. On the CPU a
        clip has the same bits in any batch and for any number of threads.

    Raises:
        TypeError: a wave or result of another dtype, a config of another type.
        ValueError: a wave that is not (B, S), or shorter than one frame.

    Gradients reach the wave through the PyTorch reference, which the backward pass computes anew (once differentiable).
    The transform is float32's, and on the CPU float64's in frames with a band 75 dB below their energy, where float32's
    rounding would show. So errors on the CPU stay below 1e-4 on any wave; noise has 2e-6, music 1e-5.
    """
    dtype = _check(wave, config, dtype)
    if _choose(wave, config) == "reference":
        return _reference(wave, config, dtype)
    return torch.ops.matpac_fast.log_mel(wave, *(getattr(config, name) for name in _FIELDS), dtype)
