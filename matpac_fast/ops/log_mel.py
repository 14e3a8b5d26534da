"""log_mel: wave -> normalised log-mel in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..reference import LogMelConfig
from ._check import check_tensor, shape_of

_DTYPES = (torch.float32, torch.float64, torch.int16)


def _check(wave: Tensor, config: LogMelConfig) -> None:
    check_tensor("log_mel", "wave", wave, ndim=2, dtypes=_DTYPES)
    if wave.shape[1] < config.n_fft:
        raise ValueError(
            f"log_mel: wave is {shape_of(wave)}; one frame needs {config.n_fft} samples "
            f"({1000 * config.n_fft / config.sample_rate:g} ms): pad it first"
        )


def log_mel(wave: Tensor, config: LogMelConfig = LogMelConfig()) -> Tensor:
    """(B, S) wave -> (B, n_mels, T) normalised log-mel."""
    _check(wave, config)
    return reference.log_mel(wave, config)
