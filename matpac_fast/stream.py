"""Embeddings of audio that arrives in blocks: a microphone, a radio, a file of many hours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from .audio.decode import resampler
from .embedding import Embeddings, Network, Windowing, extract
from .errors import AudioError, ConfigError

_BYTES = 4  # of a sample in float32


class Stream:
    """Takes blocks of any size, gives embeddings as soon as their windows are full: those of `AudioEncoder.embed`.

    Memory is bounded by one window, one hop and one block, however long the stream. Make one with
    `AudioEncoder.stream`.

    >>> stream = encoder.stream(44_100, temporal_support=2.0, hop=0.5)
    >>> for found in stream.over(blocks): ...       # or by hand: found = stream.push(block), ..., stream.finish()
    """

    def __init__(self, encoder: Network, sample_rate: int, windowing: Windowing, batch_size: int | None):
        self._encoder, self._windowing, self._batch_size = encoder, windowing, batch_size
        self._size, self._hop = self._window()
        rates = sample_rate, encoder.sample_rate
        self._resampler = resampler(*rates) if rates[0] != rates[1] else None
        self._finished = False
        self._buffer = bytearray()  # float32 at the encoder's rate; grows and shrinks without being copied
        self._begin = 0  # the buffer's first sample in the stream
        self._received = 0  # samples, at the encoder's rate
        self._next = 0  # where the next window starts

    def over(self, blocks: Iterable[Tensor | np.ndarray]) -> Iterator[Embeddings]:
        """Embeddings as they come, to the end of the last block."""
        for block in blocks:
            if len(found := self.push(block)):
                yield found
        if len(found := self.finish()):
            yield found

    def push(self, block: Tensor | np.ndarray) -> Embeddings:
        """The embeddings that `block`, mono (S,) float or int16, completes: often none.

        Raises:
            AudioError: a block that is not mono, or with NaN or infinite samples; the stream is as it was before.
        """
        if self._finished:
            raise ConfigError("stream: it is finished; start another")
        wave = self._encoder.check_wave(block, "stream: block")
        if wave.ndim != 1:
            raise AudioError(f"stream: block is {tuple(wave.shape)}; expected (S,), mono: mix channels down first")
        self._extend(wave.cpu().numpy(), last=False)
        return self._embed(self._whole_windows())

    def finish(self) -> Embeddings:
        """The embeddings of what is left at the end, by `remainder`. The stream takes no more blocks.

        Raises:
            AudioError: no audio came at all.
        """
        if self._finished:
            raise ConfigError("stream: it is finished; start another")
        self._finished = True
        self._extend(np.empty(0, np.float32), last=True)
        if self._received == 0:
            raise AudioError("stream: no audio")
        return self._embed(self._whole_windows() + self._rest())

    def _window(self) -> tuple[int, int]:
        size, hop = self._windowing.samples(self._encoder.sample_rate)
        assert size is not None
        assert hop is not None
        return size, hop

    def _extend(self, wave: np.ndarray, last: bool) -> None:
        if self._resampler is not None:
            wave = self._resampler.resample_chunk(wave, last=last)
        begin = min(self._next, self._received)
        del self._buffer[: _BYTES * (begin - self._begin)]
        self._begin = begin
        self._received += len(wave)
        self._buffer += wave.tobytes()

    def _section(self, a: int, b: int) -> Tensor:
        # A copy: the buffer cannot grow while a tensor has its memory.
        return torch.from_numpy(np.frombuffer(self._buffer, np.float32)[a - self._begin : b - self._begin].copy())

    def _whole_windows(self) -> list[tuple[int, int]]:
        """Sections (start, end) of the stream that hold the windows which nothing to come can change."""
        # What is merged into the last whole window may still come, until another one is whole.
        needed = self._size + (self._hop if self._windowing.remainder == "merge" else 0)
        if self._received < self._next + needed:
            return []
        first = self._next
        self._next += ((self._received - first - needed) // self._hop + 1) * self._hop
        return [(first, self._next - self._hop + self._size)]

    def _rest(self) -> list[tuple[int, int]]:
        """What is left after all windows that were sure, as `windows` leaves it."""
        covered = self._next > 0 and self._next - self._hop + self._size >= self._received
        dropped = self._next > 0 and self._windowing.remainder == "drop"
        if self._next >= self._received or covered or dropped:
            return []
        return [(self._next, self._received)]

    def _embed(self, sections: list[tuple[int, int]]) -> Embeddings:
        return self._joined(self._found(sections))

    def _found(self, sections: list[tuple[int, int]]) -> list[Embeddings]:
        """The embeddings of each section, at their times in the stream."""
        device, rate = self._encoder.device, self._encoder.sample_rate
        waves = (self._section(a, b).to(device) for a, b in sections)
        with torch.no_grad():
            found = extract(self._encoder, waves, self._windowing, self._batch_size)
            # Counted in samples, so that the seconds are those of `embed` to the bit: tables are joined by them.
            return [
                Embeddings(f.values, *(((seconds * rate).round() + a) / rate for seconds in (f.start, f.end)))
                for f, (a, _) in zip(found, sections, strict=True)
            ]

    def _joined(self, found: list[Embeddings]) -> Embeddings:
        if not found:
            layers = (self._encoder.n_layers,) if self._windowing.layers == "all" else ()
            nothing = torch.empty(0, dtype=torch.float64, device="cpu")
            shape = (0, *layers, self._encoder.embedding_dim)
            empty = torch.empty(shape, dtype=torch.float32, device=self._encoder.device)
            return Embeddings(empty, nothing, nothing)
        return Embeddings(*(torch.cat([getattr(f, name) for f in found]) for name in ("values", "start", "end")))


class WholeStream(Stream):
    """A stream that is one window: the pieces of that window, each embedded as it fills up."""

    _sum: Tensor | None = None  # over the columns so far, (1, [L,] E)
    _columns = 0

    def _window(self) -> tuple[int, int]:
        if self._encoder.native_window is None:
            raise ConfigError(f"stream: {self._encoder.name} embeds no stream as a whole; give temporal_support")
        return self._encoder.native_window

    def _whole_windows(self) -> list[tuple[int, int]]:
        # A piece is sure once the next one has a frame: until then its last frame ends where the stream does.
        first, needed = self._next, self._hop + self._encoder.min_samples
        count = max(0, (self._received - first - needed) // self._hop + 1)
        self._next += count * self._hop
        return [(first + i * self._hop, first + i * self._hop + self._size) for i in range(count)]

    def _rest(self) -> list[tuple[int, int]]:
        return [(self._next, self._received)]

    def _embed(self, sections: list[tuple[int, int]]) -> Embeddings:
        found = self._found(sections)
        if self._windowing.pool == "none":
            return self._joined(found)
        for f, (a, b) in zip(found, sections, strict=True):
            columns = sum(self._encoder.columns(b - a))
            self._columns += columns
            self._sum = f.values * columns + (0 if self._sum is None else self._sum)
        if not self._finished:
            return self._joined([])
        assert self._sum is not None
        end = torch.tensor([self._received / self._encoder.sample_rate], dtype=torch.float64, device="cpu")
        return Embeddings(self._sum / self._columns, torch.zeros_like(end), end)
