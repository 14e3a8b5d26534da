"""One shard: its files decoded in threads, taken by the encoder as they come, the rows written when all are there."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..audio.ahead import in_order
from ..audio_encoder import AudioEncoder
from ..embedding import Embeddings, windows_at_once
from ..errors import AudioError
from .source import Entry, Reader, Source
from .writer import Rows

# A file beyond this is never held as a whole: it streams through the encoder block by block.
LONG_SECONDS = 300.0
_BLOCK_SECONDS = (10.0, 60.0)


@dataclass
class Long:
    """A long file's samples, in blocks; iterating raises AudioError where it turns out to be damaged."""

    path: Path
    blocks: Generator[np.ndarray, None, None]


Audio: TypeAlias = "np.ndarray | Long | str"  # a wave, a long one, or the reason why there is none
Job: TypeAlias = "tuple[int, Callable[[], Audio]]"  # bytes it will hold, for `in_order`


@dataclass
class Work:
    """What a worker did and where its time went."""

    files: int = 0
    rows: int = 0
    audio_seconds: float = 0.0
    model_seconds: float = 0.0
    waited_seconds: float = 0.0  # the model, for audio


class ShardEmbedder:
    """Embeds shards with one encoder and one set of options.

    Args:
        encoder, options, batch_size: as `AudioEncoder.embed_many` takes them.
        dtype: of the rows.
        work: where to count.

    Attributes:
        tick: to be set: called after each file with its entry, and the reason where it failed.
        within: to be set: called in a long file, with its entry and how many of its seconds are embedded.
    """

    tick: Callable[[Entry, str | None], None]
    within: Callable[[Entry, float], None]

    def __init__(self, encoder: AudioEncoder, options: dict[str, Any], batch_size: int | None, dtype: str, work: Work):
        self._encoder, self._options, self._dtype = encoder, options, dtype
        self._batch_size = windows_at_once(encoder.device) if batch_size is None else batch_size
        self.work = work
        # Options that cannot be are named here, before anything is made.
        silence = np.zeros(400, np.float32)
        found = encoder.embed(silence, encoder.sample_rate, batch_size=batch_size, **options)
        self._shape = tuple(found.values.shape[1:])
        self._whole_only = options["temporal_support"] is None and encoder.native_window is None

    def jobs(self, source: Source, shard: Sequence[Entry]) -> Iterator[Job]:
        """Decoding of a shard's files, for threads."""
        longest = float("inf") if self._whole_only else LONG_SECONDS
        hop = self._options["hop"] or self._options["temporal_support"] or 0.0
        seconds = float(np.clip(self._batch_size * hop, *_BLOCK_SECONDS))  # a block fills a batch, within limits
        rate = self._encoder.sample_rate
        readers = source.readers([entry.path for entry in shard])
        for entry, (held, reader) in zip(shard, readers, strict=True):
            held += round(min(entry.seconds, longest) * rate) * 4
            yield held, partial(_read, reader, source.place(entry.path), rate, longest, seconds)

    def embed(self, shard: list[Entry], audio: Iterator[Audio], out: Path) -> Rows:
        """The rows of a shard, whose files' audio `audio` gives in their order."""
        rows = Rows(out, self._shape, self._dtype)
        work, clock = self.work, time.perf_counter()
        waited = work.waited_seconds
        try:
            todo = deque(shard)
            while todo:
                long = self._embed_short(rows, todo, audio)
                if long is not None:
                    self._embed_long(rows, *long)
        except BaseException:
            rows.close()
            raise
        work.model_seconds += time.perf_counter() - clock - (work.waited_seconds - waited)
        work.rows += len(rows)
        return rows

    def _embed_short(self, rows: Rows, todo: deque[Entry], audio: Iterator[Audio]) -> tuple[Entry, Long] | None:
        """Embed files, whose windows share batches, up to the next long one, which is returned."""
        taken: deque[Entry] = deque()
        long: list[tuple[Entry, Long]] = []
        rate = self._encoder.sample_rate

        def waves() -> Iterator[np.ndarray]:
            while todo and not long:
                entry, found = todo.popleft(), self.waited(audio)
                if isinstance(found, str):
                    self._done(rows, entry, found)
                elif isinstance(found, Long):
                    long.append((entry, found))
                else:
                    self.work.audio_seconds += len(found) / rate
                    taken.append(entry)
                    yield found

        for found in self._encoder.embed_many(waves(), rate, batch_size=self._batch_size, **self._options):
            entry = taken.popleft()
            rows.add(*_arrays(found))
            self._done(rows, entry)
        return long[0] if long else None

    def _embed_long(self, rows: Rows, entry: Entry, long: Long) -> None:
        rate = self._encoder.sample_rate
        stream = self._encoder.stream(rate, batch_size=self._batch_size, **self._options)
        ahead = in_order(((0, partial(next, long.blocks, None)) for _ in itertools.count()), 1)
        reason, done = None, 0.0
        with closing(long.blocks), closing(ahead):
            try:
                while (block := self.waited(ahead)) is not None:
                    self.work.audio_seconds += len(block) / rate
                    rows.add(*_arrays(stream.push(block)))
                    done += len(block) / rate
                    self.within(entry, done)
                rows.add(*_arrays(stream.finish()))
            except AudioError as error:
                reason = _reason(error, long.path)
        self._done(rows, entry, reason)

    def waited(self, audio: Iterator[Any]) -> Any:
        """The next of `audio`, None at its end; the time that it took counts as waited."""
        clock = time.perf_counter()
        found = next(audio, None)
        self.work.waited_seconds += time.perf_counter() - clock
        return found

    def _done(self, rows: Rows, entry: Entry, reason: str | None = None) -> None:
        reason = rows.keep(entry.path) if reason is None else rows.drop(entry.path, reason)
        self.work.files += 1
        self.tick(entry, reason)


def _arrays(found: Embeddings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return found.start.numpy(), found.end.numpy(), found.values.float().cpu().numpy()


def _read(reader: Reader, path: Path, sample_rate: int, longest: float, block_seconds: float) -> Audio:
    """A file's wave; or its blocks, where it is longer than `longest` seconds; or the reason why it has none."""
    blocks = reader(sample_rate, block_seconds)
    head: list[np.ndarray] = []
    samples = 0
    try:
        for block in blocks:
            head.append(block)
            samples += len(block)
            if samples > longest * sample_rate:
                return Long(path, _chained(head, blocks))
    except AudioError as error:
        return _reason(error, path)
    return np.concatenate(head)


def _chained(head: list[np.ndarray], rest: Generator[np.ndarray, None, None]) -> Generator[np.ndarray, None, None]:
    with closing(rest):
        while head:
            yield head.pop(0)
        yield from rest


def _reason(error: AudioError, path: Path) -> str:
    """The message without the path that it begins with."""
    return str(error).removeprefix(f"{path}: ")
