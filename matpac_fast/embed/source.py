"""Where the audio of a collection is: in files and archives, of a folder or a list; or in the clips of a corpus."""

from __future__ import annotations

import codecs
import itertools
import os
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from ..audio.ahead import in_order
from ..audio.archives import ARCHIVES, COMPRESSED, is_archive, unpacked
from ..audio.corpus import FULL_SCALE, INDEX, METADATA, SHARDS, Corpus
from ..audio.decode import AudioFile, read_blocks, resampled
from ..audio.find import find_audio, folder_reason
from ..errors import AudioError, ConfigError, CorpusError
from ..files import arrow_file, local, storable
from .packed import Content, Listing, Packed, state

Tell: TypeAlias = "Callable[[int, int], None]"  # (files looked at, of how many)
Blocks: TypeAlias = "Generator[np.ndarray, None, None]"
Reader: TypeAlias = "Callable[[int, float], Blocks]"  # (sample rate, seconds of a block) -> audio in blocks


@dataclass(frozen=True, slots=True)
class Entry:
    """A file: `seconds` are what its header says, 0 where that cannot be read; in an archive estimated by its bytes."""

    path: str
    seconds: float
    bytes: int


class Found(NamedTuple):
    """What is new in a source: files; what archives hold, in their order; and all that cannot be a file, with why."""

    files: list[str]
    members: list[Entry]
    unusable: list[tuple[str, str]]


class Files:
    """The audio of a folder, a list, or an archive. Names are UTF-8, relative to the folder, or to that of the file."""

    def __init__(self, path: Path):
        self.path = path
        self._packed = Packed(self.place)

    @property
    def root(self) -> Path:
        """What names are relative to."""
        return self.path.parent if self.path.is_file() else self.path

    def find(self, known: Container[str], workers: int, tell: Tell) -> Found:
        """What is not `known`, archives listed in so many threads.

        Raises:
            AudioError: no such folder, or nothing that could be one, a list or an archive.
        """
        names, unusable = self._names()
        files: list[str] = []
        packed: list[str] = []
        for name in names:
            try:
                stored = os.fsencode(name).decode("utf-8")
            except UnicodeDecodeError:
                unusable.append((storable(name), "the name is not UTF-8: rename the file"))
                continue
            own = is_archive(Path(stored)) and self._packed.archive(stored) is None  # a list may name one in another
            (packed if own else files).append(stored)
        members: list[Entry] = []
        jobs = ((1, partial(self._members, archive, known)) for archive in packed)
        for done, (archive, (new, reason)) in enumerate(zip(packed, in_order(jobs, workers), strict=True), 1):
            members += new
            if reason is not None:
                unusable.append((archive, reason))
            tell(done, len(packed))
        inside = {entry.path for entry in members}  # a list may name an archive, and also what is in it
        return Found([name for name in files if name not in known and name not in inside], members, unusable)

    def _names(self) -> tuple[list[str], list[tuple[str, str]]]:
        """Of files and archives, UTF-8 or not, as the system has them; and of folders that cannot be read, with why."""
        unusable: list[tuple[str, str]] = []
        if self.path.is_file():
            return [self.path.name] if is_archive(self.path) else _listed(self.path), unusable
        if self.path.exists() and not self.path.is_dir():  # each worker reads it, and so does the same call again
            raise AudioError(
                f"{self.path}: neither a folder nor a regular file; a list of paths must be one: save it as a file"
            )

        def passed_over(folder: Path, error: OSError) -> None:
            unusable.append((storable(os.path.relpath(folder, self.path)), folder_reason(error)))

        found = find_audio(self.path, passed_over, ARCHIVES | COMPRESSED)
        return [os.path.relpath(path, self.path) for path in found], unusable

    def _members(self, archive: str, known: Container[str]) -> tuple[list[Entry], str | None]:
        """What is new in an archive, and why that is not all."""
        listing = self._packed.listing(archive)
        return [self._member(listing, name) for name in listing.members if name not in known], listing.reason

    @staticmethod
    def _member(listing: Listing, name: str) -> Entry:
        member = listing.members[name]
        return Entry(name, 0.0 if member.reason else member.size * listing.seconds_a_byte, member.size)

    def place(self, name: str) -> Path:
        return self.root / local(name)

    def entry(self, name: str) -> Entry:
        if (archive := self._packed.archive(name)) is not None:
            listing = self._packed.listing(archive)
            return self._member(listing, name) if name in listing.members else Entry(name, 0.0, 0)
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
        if (archive := self._packed.archive(name)) is not None:
            member = self._packed.listing(archive).members.get(name)
            return None if member is None else member.size
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

    def readers(self, names: Sequence[str]) -> Iterator[tuple[int, Reader]]:
        """What decodes each, in any thread, and the bytes that it holds already.

        Messages of the AudioError that a reader raises begin with the `place` of its name.

        Archives are read while this is iterated, so ask for each when its turn comes.
        """
        for archive, group in itertools.groupby(names, self._packed.archive):
            if archive is None:
                yield from ((0, partial(self._file, name)) for name in group)
                continue
            inside = list(group)
            with closing(self._packed.contents(archive, inside)) as contents:
                for name, content in zip(inside, contents, strict=True):
                    yield content.held, partial(self._content, name, content)

    def _file(self, name: str, sample_rate: int, block_seconds: float) -> Blocks:
        """`read_blocks` of a file that stays as it is meanwhile."""
        path = self.place(name)
        before = state(path)
        try:
            yield from read_blocks(path, sample_rate, block_seconds)
        except AudioError as error:
            if state(path) != before:
                raise _changed(path) from None
            raise error
        except OSError as error:
            raise AudioError(f"{path}: cannot be read: {error.strerror}") from None
        if state(path) != before:
            raise _changed(path)

    def _content(self, name: str, content: Content, sample_rate: int, block_seconds: float) -> Blocks:
        """`read_blocks` of what an archive holds."""
        place, path = self.place(name), None
        try:
            with unpacked(content.data, content.suffix) as path:
                content.check()
                yield from read_blocks(path, sample_rate, block_seconds)
        except AudioError as error:
            try:
                content.check()
                said = str(error)
            except AudioError as changed:  # which explains what cannot be read
                said = str(changed)
            raise AudioError(f"{place}: {said.removeprefix(f'{path}: ')}") from None


class Clips:
    """The clips of a corpus that `prepare` made, by the names that their files had."""

    def __init__(self, path: Path):
        self.path = path
        self._corpus = Corpus(path)
        # At once: of clips that are replaced while another worker is waited for, the index no longer says the names.
        self._numbers = {name: i for i, name in enumerate(self._corpus.paths)}

    def find(self, known: Container[str], workers: int, tell: Tell) -> Found:
        """Clips that are not `known`."""
        return Found(sorted(name for name in self._numbers if name not in known), [], [])

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

    def readers(self, names: Sequence[str]) -> Iterator[tuple[int, Reader]]:
        """As those of `Files`."""
        return ((0, partial(self._clip, name)) for name in names)

    def _clip(self, name: str, sample_rate: int, block_seconds: float) -> Blocks:
        """A clip, full scale 1, at a rate."""
        if name not in self._numbers:
            raise AudioError(f"{self.place(name)}: no longer in the corpus")
        clip, own = self._numbers[name], self._corpus.sample_rate
        frames, n = int(self._corpus.frames[clip]), max(1, round(block_seconds * own))

        def stored() -> Blocks:
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


def _listed(source: Path) -> list[str]:
    """The paths in a list, one a line, each once; empty lines are passed over."""
    try:
        lines = source.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise AudioError(f"{source}: cannot be read: {error.strerror}") from None
    if any(b"\0" in line for line in lines):
        raise AudioError(
            f"{source}: no text in UTF-8; expected a folder, or a text file with one path of audio a line: to embed "
            f"this file alone, write its path into one; for all beside it, give {source.parent}"
        )
    names = (os.fsdecode(line.rstrip(b"\r")) for line in lines)
    return list(dict.fromkeys(str(Path(name)) for name in names if name))  # ".." stays: before it may be a link


def _changed(path: Path) -> AudioError:
    return AudioError(f"{path}: it changed while it was read; try again with --retry-errors once it is at rest")
