"""Audio in the archives of a collection: what there is, by name, and what it holds, read beside those who decode."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..audio import archives
from ..audio.ahead import in_order
from ..audio.decode import AudioFile
from ..errors import AudioError

_KEPT = 32  # lists of archives, which are made anew where they are needed again
_TRIED = 4  # members, to learn how many seconds a byte is


class Listing:
    """What an archive held when it was listed: members by their names in the collection, and why that is not all."""

    def __init__(self, name: str, path: Path):
        self.path, self.state = path, state(path)
        inside, self.reason = archives.members(path)
        self.members = archives.named(name, inside)

    @functools.cached_property
    def seconds_a_byte(self) -> float:
        """Of the first member that tells; 0 where none does. To ask each would be to read a Parquet file twice."""
        readable = (member for member in self.members.values() if not member.reason)
        first = list(itertools.islice(readable, _TRIED))
        with contextlib.closing(archives.contents(self.path, first)) as contents:
            for member, data in zip(first, contents, strict=True):
                with (
                    contextlib.suppress(AudioError),
                    archives.unpacked(data, member.suffix) as path,
                    AudioFile(path) as file,
                ):
                    if file.seconds:
                        return file.seconds / path.stat().st_size
        return 0.0


class _Archive:
    """An archive, whose list is made when it is asked for, and anew when it has changed."""

    def __init__(self, name: str, path: Path):
        self._name, self._path, self._lock = name, path, threading.Lock()
        self._last: Listing | None = None

    def listing(self) -> Listing:
        """Many threads may ask; one of them makes the list."""
        with self._lock:
            if self._last is None or self._last.state != state(self._path):
                self._last = Listing(self._name, self._path)
            return self._last


class Content(NamedTuple):
    """What a member holds."""

    data: archives.Data
    suffix: str = ""  # by which a decoder is chosen
    listing: Listing | None = None

    def check(self) -> None:
        """To be called once `data` is read: raise AudioError where it may be something else that was read."""
        if self.listing is not None and state(self.listing.path) != self.listing.state:
            raise AudioError("its archive changed while it was read; try again with --retry-errors")

    @property
    def held(self) -> int:
        """Bytes that are in memory."""
        return len(self.data) if isinstance(self.data, bytes) else 0


class Packed:
    """The archives of a collection.

    Args:
        place: where a name of the collection is.
    """

    def __init__(self, place: Callable[[str], Path]):
        self._archive = functools.lru_cache(_KEPT)(lambda name: _Archive(name, place(name)))
        self._is_folder = functools.lru_cache(_KEPT)(lambda name: place(name).is_dir())
        self._reading: tuple[Listing, archives.Reader] | None = None  # the archive at hand, shard after shard

    def archive(self, name: str) -> str | None:
        """The archive that a name leads into, "train-00.tar" of "train-00.tar/a.flac"; None of a file's own."""
        end = -1
        while (end := name.find("/", end + 1)) >= 0:
            if archives.is_archive(Path(name[:end])) and not self._is_folder(name[:end]):
                return name[:end]
        return None

    def listing(self, archive: str) -> Listing:
        """As it is now."""
        return self._archive(archive).listing()

    def contents(self, archive: str, names: Sequence[str]) -> Generator[Content, None, None]:
        """What members of one archive hold, read one by one in a thread of its own, some ahead."""
        listing = self.listing(archive)
        found = [listing.members.get(name) for name in names]
        why = f"its archive: {listing.reason}" if listing.reason else "no longer in its archive"
        missing, read = Content(AudioError(why)), self._read(listing, [member for member in found if member])
        jobs = ((member.size, partial(next, read)) if member else (0, lambda: missing) for member in found)
        with contextlib.closing(in_order(jobs, 1)) as ahead:
            yield from ahead

    def _read(self, listing: Listing, wanted: Sequence[archives.Member]) -> Iterator[Content]:
        """Members that lie one behind the other in one go: a row of a Parquet file is reached through those before."""
        if self._reading is None or self._reading[0] is not listing:
            self._reading = listing, archives.Reader(listing.path)
        reader = self._reading[1]
        starts = [i for i, member in enumerate(wanted) if i == 0 or member.place <= wanted[i - 1].place]
        for start, end in itertools.pairwise([*starts, len(wanted)]):
            run = wanted[start:end]
            for member, data in zip(run, reader.contents(run), strict=True):
                yield Content(data, member.suffix, listing)


def state(path: Path) -> tuple[int, int, int] | None:
    """By which it is seen that a file has changed."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
