"""From clips of any lengths to embeddings: their windows share forward passes, and each clip gets its own back."""

from __future__ import annotations

import numbers
import operator
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .audio.windows import REMAINDERS, windows
from .backend import transformed
from .errors import ConfigError
from .oom import is_out_of_memory

# Clips that may wait for company in a batch before the oldest is sent off in a smaller one: bounds memory and delay.
_CLIPS_WAITING = 128


@dataclass(frozen=True)
class Embeddings:
    """Embeddings and what each one saw.

    Attributes:
        values: float32, (W, E), or (W, L, E) with `layers="all"`; for a batch of clips (B, W, ...). W counts windows,
            or with `pool="none"` frames.
        start, end: (W,) float64, seconds from the start of the clip. A frame ends where the next one starts, or with
            its window: of an encoder whose frames are centred (M2D, CREPE) the last may have no length.
    """

    values: Tensor
    start: Tensor
    end: Tensor

    def __len__(self) -> int:
        return len(self.start)

    def __repr__(self) -> str:
        kind = str(self.values.dtype).removeprefix("torch.")
        said = f"Embeddings of shape {tuple(self.values.shape)}, {kind} on {self.values.device}"
        if len(self):
            seen = self.end - self.start
            least, most = f"{seen.min().item():.6g}", f"{seen.max().item():.6g}"
            said += f", from {self.start.min().item():.6g} to {self.end.max().item():.6g} s"
            said += f", of {most if least == most else f'{least} to {most}'} s each"
        return f"<{said}>"


@dataclass(frozen=True)
class Windowing:
    """What an embedding sees and what is kept of it; the options of `AudioEncoder.embed`, checked when made."""

    temporal_support: float | None = None
    hop: float | None = None
    pool: str = "mean"
    layers: str = "last"
    remainder: str = "keep"

    def __post_init__(self) -> None:
        for name, allowed in (("pool", ("mean", "none")), ("layers", ("last", "all")), ("remainder", REMAINDERS)):
            if getattr(self, name) not in allowed:
                options = " or ".join([", ".join(map(repr, allowed[:-1])), repr(allowed[-1])])
                raise ConfigError(f"embed: {name} is {getattr(self, name)!r}; expected {options}")
        if self.hop is not None and self.temporal_support is None:
            raise ConfigError(f"embed: hop is {self.hop} s without a temporal_support; give both, or neither")

    def samples(self, sample_rate: int) -> tuple[int | None, int | None]:
        """Window and hop in samples; None for the whole clip."""
        sizes = []
        for name in ("temporal_support", "hop"):
            seconds = getattr(self, name)
            if seconds is None:
                sizes.append(None)
                continue
            if not isinstance(seconds, numbers.Real):
                raise ConfigError(f"embed: {name} is {seconds!r}, a {type(seconds).__name__}; expected seconds, as 2.0")
            n = round(float(seconds) * sample_rate) if np.isfinite(float(seconds)) else 0
            if n < 1:
                raise ConfigError(f"embed: {name} is {seconds} s; expected at least one sample, {1 / sample_rate:g} s")
            sizes.append(n)
        return sizes[0], sizes[0] if sizes[1] is None else sizes[1]

    def spans(self, n_samples: int, sample_rate: int) -> np.ndarray:
        """(W, 2) samples: where each window of a clip of `n_samples` starts and ends."""
        size, hop = self.samples(sample_rate)
        return windows(n_samples, n_samples if size is None else size, hop or n_samples, self.remainder)


class Network(Protocol):
    """What `extract` and `Stream` need of an encoder: `AudioEncoder` says what each of these is."""

    name: str
    sample_rate: int
    embedding_dim: int
    n_layers: int
    min_samples: int
    frame_samples: int | None
    native_window: tuple[int, int] | None

    @property
    def device(self) -> torch.device: ...
    def check_wave(self, wave: Tensor | np.ndarray, what: str) -> Tensor: ...
    def columns(self, n_samples: int) -> list[int]: ...
    def rows(self, n_samples: int) -> list[int]: ...
    def pieces(self, clip: Tensor, spans: np.ndarray) -> Iterator[Tensor]: ...
    def forward_groups(self, groups: list[Tensor], pool: str, layers: str) -> list[Tensor]: ...


def windows_at_once(device: torch.device) -> int:
    """Windows per forward pass where nobody says: a GPU must have enough of them that the host keeps up with it."""
    return 16 if device.type == "cpu" else 128


def extract(
    network: Network,
    clips: Iterable[Tensor],
    windowing: Windowing,
    batch_size: int | None,
    products: torch.dtype | None = None,
) -> Iterator[Embeddings]:
    """Embed clips (S,), each checked, resampled and on the device, in order; windows of all share batches.

    The network's products are autocast to `products`, or taken in its own dtype.
    """
    at_once = windows_at_once(network.device) if batch_size is None else _whole(batch_size)
    batches = _Batches(network, windowing, at_once, products)
    waiting: deque[_Clip] = deque()
    faults: list[Exception] = []
    for wave in _until_fault(clips, faults):
        with _no_autocast(network):
            clip = _Clip(network, len(wave), windowing)
            waiting.append(clip)
            for i, piece in enumerate(clip.pieces(wave)):
                batches.add(piece, clip, i)
            while len(waiting) > _CLIPS_WAITING and waiting[0].missing:
                batches.flush(waiting[0])
        while waiting and not waiting[0].missing:
            yield waiting.popleft().embeddings()
    with _no_autocast(network):
        batches.flush()
    while waiting:
        yield waiting.popleft().embeddings()
    if faults:
        raise faults[0]


def _whole(batch_size: int) -> int:
    try:
        size = operator.index(batch_size)
    except TypeError:
        size = 0
    if size < 1:
        raise ConfigError(f"embed: batch_size is {batch_size!r}; expected a whole number, at least 1")
    return size


def _until_fault(clips: Iterable[Tensor], faults: list[Exception]) -> Iterator[Tensor]:
    """The clips before one that cannot be had, whose error is kept in `faults`."""
    try:
        yield from clips
    except Exception as error:
        faults.append(error)


def _no_autocast(network: Network) -> torch.autocast:
    """Out of the caller's autocast: the encoder knows its own dtype, and a log-mel must not be rounded.

    Not around a `yield`, after which it would be the caller's.
    """
    return torch.autocast(network.device.type, enabled=False)


class _Clip:
    """Where the results for one clip gather.

    A window is one or more pieces, a piece one or more columns in time. With pool "mean" a piece leaves one row, the
    sum over its columns; with "none" a row a column.
    """

    def __init__(self, network: Network, n_samples: int, windowing: Windowing):
        self._network, self._n_samples, self._windowing = network, n_samples, windowing
        self.spans = windowing.spans(n_samples, network.sample_rate)
        lengths, which = np.unique(self.spans[:, 1] - self.spans[:, 0], return_inverse=True)
        count = network.rows if windowing.pool == "none" else network.columns
        columns = [count(int(n)) for n in lengths]  # few lengths, many windows
        self._columns = [columns[i] for i in which]
        pieces = [n for window in self._columns for n in window]
        self._first_row = np.cumsum([0, *(pieces if windowing.pool == "none" else [1] * len(pieces))])
        self._rows: Tensor | None = None  # (R, L, E)
        self.missing = len(pieces)

    def pieces(self, wave: Tensor) -> Iterator[Tensor]:
        """Of the network, if they are as many as its `columns` or `rows` says."""
        count, promised = 0, self.missing
        for piece in self._network.pieces(wave, self.spans):
            count += 1
            if count <= promised:
                yield piece
        if count != promised or not all(self._columns):
            raise ConfigError(
                f"{self._network.name}: pieces gave {count} for {len(self.spans)} windows, and columns (or rows) lists "
                f"{promised}; expected of each window a piece or more, and as many numbers in that list"
            )

    def receive(self, first: int, results: Tensor) -> None:
        """Results of pieces that follow each other from number `first`: (N, L, E), or with pool "none" (N, L, T, E)."""
        n = len(results)
        if self._windowing.pool == "none":
            promised = np.diff(self._first_row[first : first + n + 1])
            if (wrong := promised != results.shape[2]).any():
                raise ConfigError(
                    f"{self._network.name}: forward_pieces gave {results.shape[2]} frames for a piece, and columns (or "
                    f"rows) says {promised[wrong][0]}; expected as many: mend whichever is wrong"
                )
            results = results.transpose(1, 2).flatten(0, 1)  # (N * T, L, E)
        if self._rows is None:
            self._rows = results.new_empty((int(self._first_row[-1]), *results.shape[1:]))
        begin = int(self._first_row[first])
        self._rows[begin : begin + len(results)] = results
        self.missing -= n

    def embeddings(self) -> Embeddings:
        assert self._rows is not None
        assert self.missing == 0
        values = self._rows
        if self._windowing.pool == "mean":
            if len(values) > len(self.spans):
                pieces = values.split([len(window) for window in self._columns])
                values = torch.stack([window.sum(0) for window in pieces])
            columns = [sum(window) for window in self._columns]
            # Windows of one length are divided by a number: a tensor of them would have to be copied to the device.
            same = min(columns) == max(columns)
            values = values / (columns[0] if same else values.new_tensor(columns)[:, None, None])
        start, end = self._times()
        return Embeddings(values if self._windowing.layers == "all" else values[:, 0], start, end)

    def _times(self) -> tuple[Tensor, Tensor]:
        """Seconds at which each window, or each frame, starts and ends; ends stop at the end of the clip."""
        spans = self.spans
        if self._windowing.pool == "none":
            frame = self._network.frame_samples
            assert frame is not None
            frames = []
            for (a, b), window in zip(spans.tolist(), self._columns, strict=True):
                starts = a + frame * np.arange(sum(window))
                frames.append(np.minimum(np.stack([starts, starts + frame], axis=1), b))
            spans = np.concatenate(frames)
        seconds = torch.from_numpy(np.minimum(spans, self._n_samples) / self._network.sample_rate)
        return seconds[:, 0], seconds[:, 1]


_Job: TypeAlias = "tuple[Tensor, _Clip, int]"  # a piece, whose it is, and its number there


class _Batches:
    """Pieces of one shape wait here for each other until they fill a batch, whichever clips they come from."""

    def __init__(self, network: Network, windowing: Windowing, batch_size: int, products: torch.dtype | None = None):
        self._network, self._windowing, self._batch_size = network, windowing, batch_size
        self._products = products
        self._waiting: dict[torch.Size, list[_Job]] = {}

    def add(self, piece: Tensor, clip: _Clip, index: int) -> None:
        # A small piece of a long clip must not keep all of it alive while it waits.
        # What traces or transforms has tensors without a storage.
        plain = not (transformed() or torch.compiler.is_compiling())
        if plain and piece.untyped_storage().nbytes() > 4 * piece.nbytes:
            piece = piece.clone()
        jobs = self._waiting.setdefault(piece.shape, [])
        jobs.append((piece, clip, index))
        if len(jobs) >= self._batch_size:
            self._run([self._waiting.pop(piece.shape)])

    def flush(self, clip: _Clip | None = None) -> None:
        """Send off what waits, shapes together: all of it, or the shapes of which `clip` has a piece."""
        shapes = [
            shape for shape, jobs in self._waiting.items() if clip is None or any(owner is clip for _, owner, _ in jobs)
        ]
        self._run([self._waiting.pop(shape) for shape in shapes])

    def _run(self, waiting: list[list[_Job]]) -> None:
        while waiting:
            room, groups = self._batch_size, []
            while waiting and room:
                jobs = waiting.pop(0)
                groups.append(jobs[:room])
                if jobs[room:]:
                    waiting.insert(0, jobs[room:])
                room -= len(groups[-1])
            results = self._forward(groups)
            if results is None:
                tried = sum(map(len, groups))
                self._batch_size = tried // 2
                warnings.warn(
                    f"out of memory with {tried} windows a batch; going on with {self._batch_size}", stacklevel=2
                )
                waiting = groups + waiting
                continue
            for jobs, found in zip(groups, results, strict=True):
                _deliver(jobs, found)

    def _forward(self, groups: list[list[_Job]]) -> list[Tensor] | None:
        """The network's results, or None where more than one piece at a time does not fit into memory."""
        pieces: list[Tensor] = []
        try:
            pieces += [torch.stack([piece for piece, _, _ in jobs]) for jobs in groups]
            with torch.autocast(self._network.device.type, self._products, enabled=self._products is not None):
                results = self._network.forward_groups(pieces, self._windowing.pool, self._windowing.layers)
            return [self._checked(found, len(piece)) for piece, found in zip(pieces, results, strict=True)]
        except RuntimeError as error:
            if sum(map(len, groups)) == 1 or not is_out_of_memory(error):
                raise
        # Only here, with the error and the tensors that it held gone, is there something to give back.
        pieces.clear()
        if groups[0][0][0].is_cuda:
            torch.cuda.empty_cache()
        return None

    def _checked(self, found: Any, n: int) -> Tensor:
        """As float32; raises on what a network of somebody else's may have got wrong."""
        network, frames = self._network, ["T"] * (self._windowing.pool == "none")
        if not isinstance(found, Tensor) or not found.is_floating_point():
            kind = found.dtype if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise ConfigError(f"{network.name}: forward_pieces gave {kind}; expected a floating-point tensor of torch")
        layers = network.n_layers if self._windowing.layers == "all" else 1
        if tuple(found.shape) != (n, layers, *found.shape[2 : 2 + len(frames)], network.embedding_dim):
            wanted = ", ".join(map(str, [n, layers, *frames, network.embedding_dim]))
            raise ConfigError(
                f"{network.name}: forward_pieces gave {tuple(found.shape)} with pool {self._windowing.pool!r}; "
                f"expected ({wanted}): pieces, layers, {'frames, ' * len(frames)}embedding_dim"
            )
        return found.float()


def _deliver(jobs: list[_Job], results: Tensor) -> None:
    """Hand each clip its results, pieces that follow each other in one go."""
    begin = 0
    for i in range(1, len(jobs) + 1):
        _, clip, index = jobs[begin]
        if i == len(jobs) or jobs[i][1] is not clip or jobs[i][2] != index + i - begin:
            clip.receive(index, results[begin:i])
            begin = i
