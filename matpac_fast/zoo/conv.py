"""Two 3x3 convolutions with batch norm: the block of PANNs' CNN14 and, with another pooling, of aiSFX."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """(N, C, T, F) -> (N, C', T, F), under the official names conv1, conv2, bn1, bn2; the caller pools."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


def power_spectrum(frames: Tensor, window: Tensor) -> Tensor:
    """(..., n_fft) windows of a wave -> (..., n_fft // 2 + 1)."""
    spectrum = torch.fft.rfft(frames * window)
    return spectrum.real.square() + spectrum.imag.square()
