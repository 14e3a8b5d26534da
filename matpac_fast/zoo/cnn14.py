"""PANNs' CNN14 (1912.10211): the convolutional, supervised kind, on a 32 kHz log-mel of 64 bands.

`load_encoder("cnn14:FILE")` takes the official Cnn14_mAP=0.431.pth, `load_encoder("cnn14")` is an untrained one. An
embedding is the official 2048-d "embedding": the mean plus the maximum over time, a linear layer and a ReLU. Any
length runs; a window over a minute is averaged over pieces of one. There are no frame embeddings.
Facts from qiuqiangkong/audioset_tagging_cnn, pytorch/models.py, and torchlibrosa, stft.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint
from ..errors import CheckpointError
from ..nn.initial import in_float32, seeded
from ..reference import LogMelConfig, mel_bank, mel_window
from .conv import ConvBlock, power_spectrum
from .network import Network, fill, recognised

CNN14_LOG_MEL = LogMelConfig(
    sample_rate=32_000,
    n_fft=1024,
    win_length=1024,
    hop=320,
    n_mels=64,
    f_min=50.0,
    f_max=14_000.0,
    framing="center",
    log_offset=0.0,
    log_floor=1e-10,
    mean=0.0,
    std=math.log(10.0) / 10.0,  # decibels of power
)
_CHANNELS = (64, 128, 256, 512, 1024, 2048)
_SHRINK = 2 ** (len(_CHANNELS) - 1)  # frames of the log-mel to one of the last block's
_MAX_SECONDS = 60
_STFT = "spectrogram_extractor."
_HEADS = ("fc_audioset.", _STFT)


class Cnn14(Network):
    """CNN14 under its official parameter names; its mel filters come from the checkpoint too.

    Args:
        channels: of each of the six blocks.
    """

    sample_rate = CNN14_LOG_MEL.sample_rate
    min_samples = CNN14_LOG_MEL.n_samples(_SHRINK)
    max_samples = _MAX_SECONDS * CNN14_LOG_MEL.sample_rate

    def __init__(self, channels: tuple[int, ...] = _CHANNELS):
        super().__init__()
        self.settings = {"kind": "cnn14"}
        self.embedding_dim = channels[-1]
        self.logmel_extractor = nn.Module()
        self.logmel_extractor.melW = nn.Parameter(
            torch.empty(CNN14_LOG_MEL.n_fft // 2 + 1, CNN14_LOG_MEL.n_mels)
        )  # (bins, mels)
        self.bn0 = nn.BatchNorm2d(CNN14_LOG_MEL.n_mels)
        for i, (inputs, outputs) in enumerate(zip((1, *channels), channels, strict=False)):
            self.add_module(f"conv_block{i + 1}", ConvBlock(inputs, outputs))
        self.fc1 = nn.Linear(channels[-1], channels[-1])

    def frames(self, n_samples: int) -> int:
        return CNN14_LOG_MEL.n_frames(n_samples) // _SHRINK

    def front_end(self, waves: Tensor) -> Tensor:
        """(N, S) -> (N, T, 64) decibels of mel power: Hann windows centred on every 320th sample, the ends mirrored."""
        config = CNN14_LOG_MEL
        wave = F.pad(waves[:, None], (config.n_fft // 2, config.n_fft // 2), mode="reflect")[:, 0]
        window = mel_window(config).to(waves.device, waves.dtype)
        power = power_spectrum(wave.unfold(-1, config.n_fft, config.hop), window)  # (N, T, bins)
        mel = power @ self.logmel_extractor.melW.to(power)  # type: ignore[operator]
        return 10.0 * torch.log10(mel.clamp(min=config.log_floor))

    def states(self, inputs: Tensor) -> Iterator[Tensor]:
        x = self.bn0(inputs.transpose(1, 2)[..., None]).permute(0, 3, 2, 1)  # (N, 1, T, 64)
        for i in range(len(_CHANNELS)):
            x = self.get_submodule(f"conv_block{i + 1}")(x)
            x = F.avg_pool2d(x, 2) if i + 1 < len(_CHANNELS) else x
        frames = x.shape[2]
        x = x.float().mean(3)  # (N, C, T // 32)
        x = F.relu(self.fc1((x.amax(2) + x.mean(2)).to(self.fc1.weight.dtype)))
        yield x.float()[:, None] * frames  # one embedding a piece stands for as many frames as the piece weighs


def from_official(state: Mapping[str, Tensor], source: str) -> Cnn14:
    """A CNN14 whose channels are read off the shapes; its classification head is left out.

    The file also holds the Fourier transform as a convolution; it must be that of a periodic Hann window of 1024
    samples, for which an FFT stands in.

    Raises:
        CheckpointError: no CNN14, one with another front end, or entries that are missing, left over or misshapen.
    """
    with recognised("CNN14", state, source):
        channels = tuple(state[f"conv_block{i + 1}.conv1.weight"].shape[0] for i in range(len(_CHANNELS)))
    n_fft = CNN14_LOG_MEL.n_fft
    with torch.device("cpu"):
        turns = torch.arange(n_fft // 2 + 1, dtype=torch.float64)[:, None] * torch.arange(n_fft) / n_fft
    window = mel_window(CNN14_LOG_MEL)
    for part, wave in (("real", (2 * math.pi * turns).cos()), ("imag", -(2 * math.pi * turns).sin())):
        name = f"{_STFT}stft.conv_{part}.weight"
        if name not in state:
            raise CheckpointError(f"{source} does not fit this model; 1 missing: {name}")
        kernel = state[name]
        if kernel.shape != (n_fft // 2 + 1, 1, n_fft) or (kernel[:, 0].double() - wave * window).abs().max() > 1e-4:
            raise CheckpointError(
                f"{source}: {name} {tuple(kernel.shape)} is not the Fourier transform of {n_fft} samples under a Hann "
                "window; only CNN14 at 32 kHz is supported"
            )
    with torch.device("meta"):
        model = Cnn14(channels)
    fill(model, state, source, _HEADS)
    return model


def load(argument: str, device: torch.device, dtype: torch.dtype) -> Network:
    """`load_encoder("cnn14:FILE")`; without a file untrained, for costs and as a floor."""
    if argument:
        return from_official(checkpoint.load(argument)[0], argument).ready(device, dtype, os.path.basename(argument))
    with seeded(0), in_float32(), torch.device("cpu"):
        model = Cnn14()
    with torch.no_grad():
        model.logmel_extractor.melW.copy_(mel_bank(CNN14_LOG_MEL).T)  # type: ignore[operator]
    return model.ready(device, dtype, "cnn14, untrained")
