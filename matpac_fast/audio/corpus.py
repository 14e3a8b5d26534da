"""A corpus: clips as int16 in shards, found through one Parquet index.

A prepared folder holds

    index.parquet          one row a clip, in the order of the shards; its metadata say how it was made
    rejected.parquet       path and reason of every file that was left out
    shards/00000.i16 ...   samples and nothing else: int16, little-endian, mono, 32768 = full scale, clip after clip

Shards are raw so that they are written as the clips come, before their length is known, and so that any tool reads
them; all that a header could say stands in the index. `prepare` (prepare.py) makes such a folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import resource
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import AudioError, ConfigError, CorpusError, first_line
from ..files import read_parquet
from .decode import check_samples

INDEX = "index.parquet"
REJECTED = "rejected.parquet"
SHARDS = "shards"
PARTS = "parts"  # rows of shards that are finished but not yet in the index
METADATA = b"matpac_fast.corpus"
FORMAT = 1
FULL_SCALE = 32768


class Corpus:
    """The clips of a prepared folder, or of several, one folder's clips behind the other's.

    Nothing but the index is read on opening; a shard is opened when it is first needed. May be used from several
    threads, and sent to other processes, which open the shards anew.

    Attributes:
        folders: where they are; none of a corpus in memory.
        sizes: how many clips are in each of the folders.
        sample_rate: Hz.
        frames: (N,) int64, samples of each clip.

    Raises:
        ConfigError: folders of different sample rates, or one that is given twice.
        CorpusError: no corpus, one whose preparation never finished, or (when it is needed) a shard that is not whole.
    """

    _memory: NDArray[np.int16]  # all samples, of a corpus that is in no folder

    def __init__(self, folder: str | os.PathLike[str], *more: str | os.PathLike[str]):
        self.folders = tuple(map(Path, (folder, *more)))
        indices = [_read_index(folder) for folder in self.folders]
        _check_joined(self.folders, [rate for rate, _ in indices])
        self.sample_rate = indices[0][0]
        self.sizes = tuple(len(frames) for _, (frames, _, _) in indices)
        # Shards are numbered through all folders: the number of each one's first.
        shards = [int(shard.max(initial=-1)) + 1 for _, (_, shard, _) in indices]
        self._first = np.cumsum([0, *shards[:-1]])
        self.frames, self._shard, self._offset = (
            np.concatenate(column) for column in zip(*(columns for _, columns in indices), strict=True)
        )
        self._shard += np.repeat(self._first, self.sizes)
        self._files = _Opened()

    @classmethod
    def from_arrays(cls, waves: Iterable[Any], sample_rate: int = 16_000, paths: Iterable[str] | None = None) -> Corpus:
        """A corpus in memory, of mono waves (S,), arrays or tensors, int16 or float in [-1, 1].

        Raises:
            AudioError: a wave that `AudioEncoder.embed` would refuse too, by its name in `paths`, else its number.
        """
        waves = list(waves)
        paths = [f"clip-{i}" for i in range(len(waves))] if paths is None else list(paths)
        if len(paths) != len(waves):
            raise ConfigError(f"from_arrays: {len(paths)} paths of {len(waves)} waves; expected one of each")
        self = cls.__new__(cls)
        self.folders = ()
        self.sample_rate = sample_rate
        clips = [_checked(wave, f"from_arrays: {path}") for wave, path in zip(waves, paths, strict=True)]
        self.frames = np.array([len(clip) for clip in clips], np.int64)
        self.sizes = (len(clips),)
        self._shard = np.zeros(len(clips), np.int64)
        self._offset = np.cumsum(self.frames) - self.frames
        self._memory = np.concatenate([np.empty(0, np.int16), *clips])
        self.paths = paths
        return self

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def seconds(self) -> float:
        """Of audio, all clips together."""
        return float(self.frames.sum()) / self.sample_rate

    @cached_property
    def paths(self) -> list[str]:
        """The source file of each clip, relative to the folder it was prepared from; read when first asked for.

        Of several folders each begins with that of the corpus.
        """
        return self._column("path")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over rate, places and source files' hashes of the clips: what training sees, whatever its names."""
        digest = hashlib.sha256(f"{FORMAT} {self.sample_rate} {len(self)}".encode())
        if len(self.sizes) > 1:  # by which clips may be visited more often than others
            digest.update(repr(self.sizes).encode())
        for column in (self.frames, self._shard, self._offset):
            digest.update(np.ascontiguousarray(column, "<i8").tobytes())
        if not self.folders:
            digest.update(self._memory.astype("<i2").tobytes())
        else:
            digest.update("".join(self._column("sha256")).encode())
        return digest.hexdigest()

    def read(self, index: int, start: int = 0, n: int | None = None) -> NDArray[np.int16]:
        """`n` samples of a clip from `start`, by default all that follow: (n,).

        Raises IndexError where they reach beyond the clip.
        """
        return self.gather([index], [start], int(self.frames[index]) - start if n is None else n)[0]

    def gather(
        self, indices: ArrayLike, starts: ArrayLike, n: int, out: NDArray[np.int16] | None = None
    ) -> NDArray[np.int16]:
        """Crops of `n` samples: clip indices (B,) and first samples (B,) -> (B, n), written into `out` where given.

        Raises IndexError where a crop reaches beyond its clip.
        """
        indices, starts = np.asarray(indices, np.int64), np.asarray(starts, np.int64)
        self._check(indices, starts, n)
        out = np.empty((len(indices), n), np.int16) if out is None else out
        begins = (self._offset[indices] + starts).tolist()
        for row, shard, begin in zip(out, self._shard[indices].tolist(), begins, strict=True):
            if not self.folders:
                row[:] = self._memory[begin : begin + n]
            else:
                self._read_into(row, shard, begin)
        return out

    def _read_into(self, row: NDArray[np.int16], shard: int, begin: int) -> None:
        """Read, not mapped: of a shard that is cut short while it is in use, a map's pages end the process (SIGBUS)."""
        file = self._files.get(shard, len(self._bytes), lambda shard: _File(self._whole(shard)))
        if not len(row):
            return
        direct = row.flags.c_contiguous and row.dtype == np.dtype("<i2")
        samples = row if direct else np.empty(len(row), "<i2")
        file.read_into(samples.data.cast("B"), 2 * begin)
        if not direct:
            row[:] = samples

    def _check(self, indices: NDArray[np.int64], starts: NDArray[np.int64], n: int) -> None:
        wrong = (starts < 0) | (starts + n > self.frames[indices])
        if n < 0 or wrong.any():
            row = int(wrong.argmax())
            raise IndexError(
                f"samples {starts[row]} to {starts[row] + n} of clip {indices[row]}, "
                f"which has {self.frames[indices[row]]}"
            )

    def _whole(self, shard: int) -> Path:
        """The path of a shard that is as long as the index needs it."""
        folder = int(np.searchsorted(self._first, shard, side="right")) - 1
        path = shard_path(self.folders[folder], shard - int(self._first[folder]))
        try:
            size, expected = path.stat().st_size, int(self._bytes[shard])
        except OSError as error:
            raise _unreadable(path, error) from None
        if size < expected:
            raise CorpusError(f"{path}: {size} bytes, the index needs {expected}: copy or prepare the corpus again")
        return path

    @cached_property
    def _bytes(self) -> NDArray[np.int64]:
        """What each shard must hold at least; clips whose file was replaced since may follow."""
        needed = np.zeros(int(self._shard.max(initial=-1)) + 1, np.int64)
        np.maximum.at(needed, self._shard, 2 * (self._offset + self.frames))
        return needed

    def _column(self, name: str) -> list[Any]:
        # A corpus may have been prepared again since it was opened; a clip keeps its place, which no other one gets.
        found: dict[tuple[int, int], Any] = {}
        for folder, first in zip(self.folders, self._first.tolist(), strict=True):
            table = read_parquet(folder / INDEX, ["shard", "offset", name])
            shards, offsets, values = (table[column].to_pylist() for column in ("shard", "offset", name))
            if name == "path" and len(self.folders) > 1:
                values = [f"{folder}/{value}" for value in values]
            places = zip((first + shard for shard in shards), offsets, strict=True)
            found |= dict(zip(places, values, strict=True))
        wanted = zip(self._shard.tolist(), self._offset.tolist(), strict=True)
        return [found.get(place, f"{place}, no longer in {INDEX}") for place in wanted]


class _Opened:
    """The shards used last, kept open: all of them where a process may have so many."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}  # the one used last stands last
        self._lock = threading.Lock()
        self._limit: int | None = None

    def __reduce__(self) -> tuple[type[_Opened], tuple[()]]:
        return _Opened, ()  # another process opens them anew

    def get(self, shard: int, of: int, open_shard: Callable[[int], Any]) -> Any:
        """Shard number `shard`, of `of` in all, opened where it is not."""
        with self._lock:
            if self._limit is None:
                self._limit = _may_open(of)
            opened = self._kept.pop(shard, None)
            if opened is None:
                while len(self._kept) >= self._limit:
                    del self._kept[next(iter(self._kept))]  # closed once nobody uses it
                opened = open_shard(shard)
            self._kept[shard] = opened
            return opened


def _may_open(n: int) -> int:
    """How many of n files to keep open at once; the process's limit is raised for them as far as it may be."""
    for_others = 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= n + for_others:
        return n
    raised = n + for_others if hard == resource.RLIM_INFINITY else min(n + for_others, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = raised
    return max(16, min(n, soft - for_others))


class _File:
    """A shard opened for reading at any place, from any thread."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _unreadable(path, error) from None

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # as Python ends, `os` may be gone
        if hasattr(self, "_handle"):
            close(self._handle)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the bytes from `offset` on."""
        while buffer:
            try:
                got = os.preadv(self._handle, [buffer], offset)
            except OSError as error:
                raise _unreadable(self._path, error) from None
            if got == 0:
                size = os.fstat(self._handle).st_size
                raise CorpusError(f"{self._path}: cut short to {size} bytes: copy or prepare the corpus again")
            buffer, offset = buffer[got:], offset + got


def _unreadable(path: Path, error: OSError) -> Exception:
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # the process's or machine's lack, not the shard's
        return error
    return CorpusError(f"{path}: {error.strerror}: copy or prepare the corpus again")


def damaged(path: Path, error: Exception) -> CorpusError:
    """Of a Parquet file; not to be prepared again in the same folder, whose shards nothing would describe."""
    said = first_line(error)
    return CorpusError(f"{path}: cannot be read ({said}): copy it again, or prepare the corpus in a new folder")


def shard_path(folder: Path, shard: int) -> Path:
    return folder / SHARDS / f"{shard:05d}.i16"


def _checked(wave: Any, what: str) -> NDArray[np.int16]:
    """A wave in memory as int16; what would become noise is refused, as `AudioEncoder.check_mono` does of tensors."""
    array = wave.numpy(force=True) if hasattr(wave, "numpy") else wave  # a tensor's
    if not isinstance(array, np.ndarray):
        raise AudioError(f"{what} is a {type(wave).__name__}; expected a tensor or array")
    if array.ndim != 1:
        raise AudioError(f"{what} is {array.shape}; expected (S,), mono: mix channels down first")
    if array.dtype.newbyteorder("=") == np.int16:
        return array.astype(np.int16, copy=False)
    if array.dtype.kind != "f":
        raise AudioError(f"{what} is {array.dtype}; expected float or int16")
    check_samples(float(np.abs(array).max(initial=0.0)), what)
    return to_int16(array)[0]


def to_int16(wave: np.ndarray) -> tuple[NDArray[np.int16], int]:
    """Float samples as int16, 32768 to 1.0, rounded without dither, and how many had to be clipped."""
    scaled = np.rint(wave * np.float32(FULL_SCALE))
    clipped = int(np.count_nonzero((scaled > FULL_SCALE - 1) | (scaled < -FULL_SCALE)))
    return np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1).astype("<i2"), clipped


def read_metadata(schema: Any, path: Path) -> dict[str, Any]:
    """What the metadata of a Parquet file of a corpus say; CorpusError where it is none."""
    metadata = json.loads((schema.metadata or {}).get(METADATA, b"{}"))
    if metadata.get("format") != FORMAT:
        found = f"format {metadata['format']}" if "format" in metadata else "no index of a corpus"
        raise CorpusError(f"{path}: {found}, expected format {FORMAT}: prepare the corpus in a new folder")
    return metadata


def _check_joined(folders: Sequence[Path], rates: Sequence[int]) -> None:
    """Raise ConfigError for folders that make no corpus together."""
    if len(set(rates)) > 1:
        told = ", ".join(f"{folder} at {rate} Hz" for folder, rate in zip(folders, rates, strict=True))
        raise ConfigError(f"{told}: expected one sample rate: prepare again with --sample-rate, in a new folder")
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (real := folder.resolve()) in seen:
            raise ConfigError(
                f"{seen[real]} and {folder} are one corpus; expected each once: pretrain's --visits has clips visited "
                "more often than others"
            )
        seen[real] = folder


def _read_index(folder: Path) -> tuple[int, list[NDArray[np.int64]]]:
    """Its sample rate, and of each clip frames, shard and offset."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise CorpusError(f"reading a corpus needs pyarrow ({error}): pip install pyarrow") from error
    path = folder / INDEX
    if not path.exists():
        if (folder / SHARDS).exists():
            raise CorpusError(f"{folder}: its preparation was interrupted: run the same matpac-fast prepare again")
        raise CorpusError(f"{folder}: no corpus, it has no {INDEX}: make one with matpac-fast prepare AUDIO {folder}")
    try:
        table = read_parquet(path, ["frames", "shard", "offset"])
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from None
    metadata = read_metadata(table.schema, path)
    return metadata["sample_rate"], [table[name].to_numpy().astype(np.int64) for name in ("frames", "shard", "offset")]
