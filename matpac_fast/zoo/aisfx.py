"""aiSFX (ISMIR 2022), a convolutional net for sound effects libraries, with the weights of the package aisfx.

An embedding is the package's own, with its original (Essentia) log-mel: blocks of 100 frames, 2.3 s at 44.1 kHz. A
shorter window is filled up with silence, as the package does; a longer one is the mean over blocks that follow each
other (the package's `emb_hop_size=1, drop_partial_block=False`), each counting by the frames it holds.
Facts from alisonbma/aisfx 0.1.2 and Essentia's documentation of MelBands and FrameCutter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import pickles
from ..audio_encoder import in_pieces
from ..errors import CheckpointError, ConfigError
from ..reference import LogMelConfig, mel_bank, mel_window
from . import wheel
from .conv import ConvBlock, power_spectrum
from .network import Network, centred_pieces, fill

_MEL = LogMelConfig(
    sample_rate=44_100,
    n_fft=2048,
    win_length=2048,
    hop=1024,
    n_mels=96,
    f_min=0.0,
    f_max=22_050.0,
    bank="kaldi",
    window="hann_symmetric",
)
_BLOCK = 100  # frames
_GREATEST = 9.457798957824707  # log10(1 + 10000 * power) in the package's training data: its 1.0
_CHANNELS = (64, 128, 256, 512)


class AiSfx(Network):
    """aiSFX's embedding net under its official parameter names."""

    sample_rate = _MEL.sample_rate
    embedding_dim = _CHANNELS[-1]
    max_samples = _BLOCK * _MEL.hop
    beyond = "averaged over blocks of that length"

    def __init__(self):
        super().__init__()
        self.settings = {"kind": "aisfx"}
        for i, (inputs, outputs) in enumerate(zip((1, *_CHANNELS), _CHANNELS, strict=False)):
            self.add_module(f"conv_block{i + 1}", ConvBlock(inputs, outputs))

    @property
    def native_window(self) -> None:
        return None  # a block also sees half a frame of its neighbours

    def columns(self, n_samples: int) -> list[int]:
        return in_pieces(1 - (-n_samples // _MEL.hop), _BLOCK)

    def pieces(self, clip: Tensor, spans: np.ndarray) -> Iterator[Tensor]:
        return centred_pieces(clip, spans, self.columns, _MEL.n_fft, _MEL.hop)

    def front_end(self, waves: Tensor) -> Tensor:
        """(N, S) -> (N, T, 96): log10(1 + 10000 * power) of bands whose weights add up to 1, over its greatest."""
        bank = mel_bank(_MEL)
        bank = (bank / bank.sum(1, keepdim=True)).to(waves.device, waves.dtype)
        window = mel_window(_MEL).to(waves.device, waves.dtype)
        power = power_spectrum(waves.unfold(1, _MEL.n_fft, _MEL.hop), window)  # (N, T, bins)
        return torch.log10(1.0 + 1e4 * (power @ bank.T)) / _GREATEST

    def states(self, inputs: Tensor) -> Iterator[Tensor]:
        frames = inputs.shape[1]
        x = F.pad(inputs, (0, 0, 0, _BLOCK - frames))[:, None]  # (N, 1, 100, 96); silence is 0
        for i in range(len(_CHANNELS)):
            x = self.get_submodule(f"conv_block{i + 1}")(x)
            x = F.max_pool2d(x, 2) if i + 1 < len(_CHANNELS) else x
        x = x.float().mean(3).amax(2)  # (N, 512)
        yield x[:, None] * frames  # one embedding a block stands for as many frames as the block weighs


def load(argument: str, device: torch.device, dtype: torch.dtype) -> Network:
    """`load_encoder("aisfx")`.

    Raises:
        ConfigError: an argument.
        CheckpointError: aisfx is not installed, or its file is another.
    """
    if argument:
        raise ConfigError(f"aisfx takes no argument; got {argument!r}")
    path = wheel.find("aisfx", "models/checkpoint.pth")
    content = pickles.unpickle(path)
    # (weights of net and classifiers, the data sets' classes)
    if not isinstance(content, tuple) or not content or not isinstance(content[0], Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected that of aisfx 0.1.2, a pair")
    state = {name.removeprefix("embedding_net."): tensor for name, tensor in content[0].items()}
    with torch.device("meta"):
        model = AiSfx()
    fill(model, state, str(path), ("fc.",))
    return model.ready(device, dtype, "aisfx")
