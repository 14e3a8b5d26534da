"""logmel-stats: mean and standard deviation over time of each band of MATPAC's log-mel. A floor: nothing is learnt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..audio_encoder import AudioEncoder
from ..errors import ConfigError
from ..reference import LogMelConfig


class LogMelStatistics(AudioEncoder):
    """80 means, then 80 standard deviations (those of the frames there are: nothing is corrected), of a whole window.

    It has no weights and no native length: a window of any length is seen at once.
    """

    name = "logmel-stats"

    def __init__(self, config: LogMelConfig = LogMelConfig()):
        super().__init__()
        self.config = config
        self.settings: dict[str, Any] = {"kind": "logmel-stats", "config": repr(config)}
        self.sample_rate, self.min_samples = config.sample_rate, config.n_fft
        self.embedding_dim = 2 * config.n_mels
        # Without weights, this is what tells the device.
        self.register_buffer("anchor", torch.empty(0, device="cpu"), persistent=False)

    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        spec = ops.log_mel(pieces, self.config)  # (N, 80, T)
        return torch.cat([spec.mean(2), spec.std(2, correction=0)], dim=1)[:, None]


def load(argument: str, device: torch.device, dtype: torch.dtype) -> AudioEncoder:
    """`load_encoder("logmel-stats")`, which is computed in float32 whatever dtype is asked for.

    Raises:
        ConfigError: an argument.
    """
    if argument:
        raise ConfigError(f"logmel-stats takes no argument; got {argument!r}")
    return LogMelStatistics().eval().to(device)
