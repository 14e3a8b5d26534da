"""What the encoders of the zoo share: a front end in float32, long windows cut into pieces, bfloat16 on request."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoint
from ..audio_encoder import AudioEncoder, in_pieces, products_dtype
from ..backend import without_autocast
from ..errors import CheckpointError


class Network(AudioEncoder):
    """An encoder that sees waves of at most `max_samples`; longer windows are averaged over pieces of that length.

    A subclass writes `front_end`, `states` and `frames`. A piece counts by its frames; where the last one is shorter
    than `min_samples` it is padded with zeros. A piece is the same as a window of its own, so streams are bounded.
    """

    max_samples: int
    dtype: torch.dtype = torch.float32
    beyond = "averaged over pieces of that length"
    autocasts = True

    def front_end(self, waves: Tensor) -> Tensor:
        """(N, S) float32 -> what the network takes, in float32 whatever `dtype` is."""
        return waves

    def states(self, inputs: Tensor) -> Iterator[Tensor]:
        """Each layer's frames (N, T, E), one layer after the other, T as `frames` says; or (N, 1, E), their sum."""
        raise NotImplementedError

    def frames(self, n_samples: int) -> int:
        """Frames of a piece of `n_samples`, from `min_samples` up: what it weighs."""
        return 1

    @property
    def native_window(self) -> tuple[int, int] | None:
        return self.max_samples, self.max_samples

    @property
    def native_seconds(self) -> float | None:
        return self.max_samples / self.sample_rate

    def _sizes(self, n_samples: int) -> list[int]:
        return [max(size, self.min_samples) for size in in_pieces(n_samples, self.max_samples)]

    def columns(self, n_samples: int) -> list[int]:
        return [self.frames(size) for size in self._sizes(n_samples)]

    def pieces(self, clip: Tensor, spans: np.ndarray) -> Iterator[Tensor]:
        for a, b in spans.tolist():
            sizes = self._sizes(b - a)
            yield from padded(clip[a:b], 0, sum(sizes)).split(sizes)

    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        dtypes = {p.dtype for p in self.parameters()}  # more than one where `ready` has rounded some
        weights = dtypes.pop() if len(dtypes) == 1 else torch.float32  # not float32 where the user has called half()
        dtype = products_dtype(weights, self.dtype, self.device)
        with without_autocast(self.device):
            inputs = self.front_end(pieces).to(weights)
        found: list[Tensor] = []
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            for state in self.states(inputs):
                if layers == "last":
                    found.clear()  # only the last one stays
                found.append(state.float().sum(1) if pool == "mean" else state.float())
        return torch.stack(found, dim=1)

    def ready(self, device: torch.device, dtype: torch.dtype, name: str) -> Network:
        """For inference: on its device, and where it computes in `dtype`, with weights rounded to it once."""
        self.dtype, self.name = dtype, name
        if dtype != torch.float32:
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                    module.to(dtype)
        return self.requires_grad_(False).eval().to(device)


def padded(wave: Tensor, before: int, length: int) -> Tensor:
    """The wave (S,) after `before` zeros, cut or filled up with zeros to `length` samples in all."""
    return F.pad(wave, (before, length - before - len(wave)))


def centred_pieces(
    clip: Tensor, spans: np.ndarray, columns: Callable[[int], list[int]], span: int, hop: int
) -> Iterator[Tensor]:
    """The pieces of a clip's windows, frame t of a window centred on its sample t * hop, with zeros around the window.

    Args:
        columns: samples of a window -> frames of each of its pieces, all but the last as many.
        span, hop: samples of a frame, and from one to the next.
    """
    for a, b in spans.tolist():
        counts = columns(b - a)
        wave = padded(clip[a:b], span // 2, (sum(counts) - 1) * hop + span)
        for i, count in enumerate(counts):
            begin = i * counts[0] * hop
            yield wave[begin : begin + (count - 1) * hop + span]


def fill(network: Network, state: Mapping[str, Any], source: str, ignored: tuple[str, ...]) -> None:
    """Make the official weights those of a network built without memory (on the device "meta").

    Args:
        ignored: beginnings of names that embedding does not need: classification heads.

    Raises:
        CheckpointError: entries that are missing, left over or of another shape, which are listed.
    """
    tensors = {key: value for key, value in state.items() if not key.startswith(ignored)}
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{source}: expected a dictionary of tensors")
    checkpoint.check_fits(network.state_dict(), tensors, source)
    tensors = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
    network.load_state_dict(tensors, assign=True)


@contextlib.contextmanager
def recognised(kind: str, state: Mapping[str, Any], source: str) -> Iterator[None]:
    """Within it, what `state` lacks or holds in another shape means that it is no checkpoint of this kind."""
    try:
        yield
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        names = ", ".join(list(state)[:3])
        raise CheckpointError(f"{source}: not a {kind} checkpoint ({error}); its first names are {names}") from None
