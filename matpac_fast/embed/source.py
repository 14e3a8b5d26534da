"""Where the audio of a collection is: in files, of a folder or a list; or in the clips of a corpus."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from ..audio.archives import ARCHIVES, COMPRESSED, holds_audio, is_archive
from ..audio.corpus import FULL_SCALE, INDEX, METADATA, SHARDS, Corpus
from ..audio.decode import AudioFile, find_audio, read_blocks, resampled
from ..errors import AudioError, ConfigError, CorpusError
from ..files import arrow_file

PassedOver: TypeAlias = "Callable[[Path, OSError], None]"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file: `seconds` are what its header says, 0 where that cannot be read."""

    path: str
    seconds: float
    bytes: int


class Files:
    """The audio files of a folder, or of a list. Names are UTF-8, relative to the folder, or to that of the list."""

    packed: Sequence[Path] = ()  # archives of audio in the folder, which are passed over

    def __init__(self, path: Path):
        self.path = path

    @property
    def root(self) -> Path:
        """What names are relative to."""
        return self.path.parent if self.path.is_file() else self.path

    def names(self, passed_over: PassedOver) -> list[str]:
        """As the system has them, UTF-8 or not; `passed_over` is told of folders that cannot be read.

        Raises:
            AudioError: no such folder, or nothing that could be one or a list.
        """
        if self.path.is_file():
            return _listed(self.path)
        if self.path.exists() and not self.path.is_dir():  # each worker reads it, and so does the same call again
            raise AudioError(
                f"{self.path}: neither a folder nor a regular file; a list of paths must be one: save it as a file"
            )
        found = find_audio(self.path, passed_over, ARCHIVES | COMPRESSED)
        self.packed = [path for path in found if is_archive(path) and holds_audio(path)]
        return [os.path.relpath(path, self.path) for path in found if not is_archive(path)]

    def place(self, name: str) -> Path:
        return self.root / local(name)

    def entry(self, name: str) -> Entry:
        seconds, size = 0.0, 0
        try:
            size = os.stat(self.place(name)).st_size
            with AudioFile(self.place(name)) as file:
                seconds = file.seconds or 0.0
        except (AudioError, OSError):
            pass  # reading it will say why
        return Entry(name, seconds, size)

    def size(self, name: str) -> int | None:
        """In bytes; None where there is no such file, or none that can be reached."""
        try:
            return os.stat(self.place(name)).st_size
        except OSError:
            return None

    def check_there(self) -> None:
        """Raise AudioError where the source is gone or empty: without its disk every file would seem unusable."""
        try:
            if self.path.is_file():
                return
            with os.scandir(self.path) as entries:
                if next(entries, None) is not None:
                    return
            reason = "an empty folder"
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
        raise AudioError(f"{self.path}: {reason}, where audio was; is its disk mounted? Then run the same again")

    def check_rate(self, sample_rate: int) -> None:
        """Files are resampled to any."""

    def blocks(self, name: str, sample_rate: int, block_seconds: float) -> Generator[np.ndarray, None, None]:
        """`read_blocks` of a file that stays as it is meanwhile. Messages of AudioError begin with its `place`."""
        path = self.place(name)
        before = _state(path)
        try:
            yield from read_blocks(path, sample_rate, block_seconds)
        except AudioError as error:
            if _state(path) != before:
                raise _changed(path) from None
            raise error
        except OSError as error:
            raise AudioError(f"{path}: cannot be read: {error.strerror}") from None
        if _state(path) != before:
            raise _changed(path)


class Clips:
    """The clips of a corpus that `prepare` made, by the names that their files had."""

    packed: Sequence[Path] = ()

    def __init__(self, path: Path):
        self.path, self.root = path, path
        self._corpus = Corpus(path)
        # At once: of clips that are replaced while another worker is waited for, the index no longer says the names.
        self._numbers = {name: i for i, name in enumerate(self._corpus.paths)}

    def names(self, passed_over: PassedOver) -> list[str]:
        """As the system would have them, as those of files."""
        return sorted(map(local, self._numbers))

    def place(self, name: str) -> Path:
        return self.path / name

    def entry(self, name: str) -> Entry:
        if name not in self._numbers:
            return Entry(name, 0.0, 0)  # reading it will say why
        frames = int(self._corpus.frames[self._numbers[name]])
        return Entry(name, frames / self._corpus.sample_rate, 2 * frames)

    def size(self, name: str) -> int | None:
        return self.entry(name).bytes if name in self._numbers else None

    def check_there(self) -> None:
        """Raise AudioError where the corpus is gone, or all of its samples."""
        if not (self.path / INDEX).exists() or not _has_shards(self.path):
            raise AudioError(f"{self.path}: no corpus, where one was; is its disk mounted? Then run the same again")

    def check_rate(self, sample_rate: int) -> None:
        """Raise ConfigError where the corpus lacks the frequencies that an encoder of this rate is used to."""
        if (own := self._corpus.sample_rate) < sample_rate:
            raise ConfigError(
                f"{self.path}: a corpus at {own} Hz, and the encoder takes {sample_rate}; prepare one with "
                f"--sample-rate {sample_rate}, or embed the audio itself"
            )

    def blocks(self, name: str, sample_rate: int, block_seconds: float) -> Generator[np.ndarray, None, None]:
        """A clip, full scale 1, at a rate. Messages of AudioError begin with its `place`."""
        if name not in self._numbers:
            raise AudioError(f"{self.place(name)}: no longer in the corpus")
        clip, own = self._numbers[name], self._corpus.sample_rate
        frames, n = int(self._corpus.frames[clip]), max(1, round(block_seconds * own))

        def stored() -> Generator[np.ndarray, None, None]:
            for start in range(0, frames, n):
                samples = self._corpus.gather([clip], [start], min(n, frames - start))[0]
                yield samples.astype(np.float32) / np.float32(FULL_SCALE)

        try:
            yield from resampled(stored(), own, sample_rate, self.place(name))
        except CorpusError as error:
            raise AudioError(f"{self.place(name)}: {error}") from None


Source: TypeAlias = "Files | Clips"


def open_source(path: Path) -> Source:
    """A corpus where `path` is one, else the files of a folder or list.

    Raises:
        CorpusError: a corpus that is damaged, lacks its samples, or whose preparation was interrupted.
    """
    if _has_shards(path):
        return Clips(path)
    if _is_index(path / INDEX):
        raise CorpusError(
            f"{path}: a corpus without its {SHARDS}/*.i16: copy it again, or run the same matpac-fast prepare again"
        )
    return Files(path)


def _has_shards(corpus: Path) -> bool:
    return (corpus / SHARDS).is_dir() and any(corpus.glob(f"{SHARDS}/*.i16"))


def _is_index(path: Path) -> bool:
    """Whether a file is the index of a corpus, and not just called so."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with arrow_file(path) as file:
            return METADATA in (pq.read_schema(file).metadata or {})
    except (OSError, pa.ArrowException):
        return False


def local(name: str) -> str:
    """A manifest's name, which is UTF-8, as Python calls that file in whatever locale."""
    return os.fsdecode(name.encode("utf-8"))


def _listed(source: Path) -> list[str]:
    """The paths in a list, one a line, each once; empty lines are passed over."""
    try:
        lines = source.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise AudioError(f"{source}: cannot be read: {error.strerror}") from None
    if any(b"\0" in line for line in lines):
        raise AudioError(
            f"{source}: no text; expected a folder, or a text file with one path of audio a line: to embed this file "
            f"alone, write its path into one; for all beside it, give {source.parent}"
        )
    names = (os.fsdecode(line.rstrip(b"\r")) for line in lines)
    return list(dict.fromkeys(os.path.normpath(name) for name in names if name))


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _changed(path: Path) -> AudioError:
    return AudioError(f"{path}: it changed while it was read; try again with --retry-errors once it is at rest")
