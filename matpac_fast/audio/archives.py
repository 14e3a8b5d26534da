"""Audio inside tar files, as WebDataset has it, zip files, and Parquet files, as data sets on Hugging Face are.

An archive is listed, then read once from its beginning to its end; nothing of it is unpacked to disk as a whole. What
a tar file holds lies there as it is, and is read where it is wanted.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from ..errors import AudioError, CorpusError, first_line
from ..files import storable
from . import parquet
from .decode import AUDIO_SUFFIXES, NO_DECODER
from .find import APPLE_DOUBLE

ARCHIVES = frozenset({".tar", ".zip", ".parquet"})
# Which cannot be read from any place in them. Found all the same, so that whoever has a folder of them learns why.
COMPRESSED = frozenset({".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst"})
WHY_COMPRESSED = "a compressed tar file: unpack it, or pack it again without compression"
_WHY_NESTED = "an archive in an archive, which is not looked into: unpack the outer one"
_BEGIN = 2**26  # bytes of a compressed tar file, unpacked, in which audio is looked for
_BLOCK = 1 << 20  # bytes copied at a time
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, Zstandard
_MAC = "__MACOSX/"  # where zip files of macOS have what that keeps about their files
_CHANGED = "no longer in its archive, which changed meanwhile: run the same again once it is at rest"


class Member(NamedTuple):
    """Audio in an archive: its name there, and where it is: an offset, a number, or a row.

    Names are UTF-8 whatever the locale, with bytes that are none as \\udcNN.
    """

    archive: Path
    name: str
    place: int
    size: int  # in bytes, as the list of the archive says; of a row of a Parquet file the mean of its row group
    reason: str = ""  # why it cannot be read, where the list says that

    @property
    def suffix(self) -> str:
        """By which a decoder is chosen; "" where it is none of audio."""
        return os.path.splitext(self.name)[1] if _is_audio(self.name) else ""


class Extent(NamedTuple):
    """Bytes that lie in an archive as they are, and are not read before they are wanted."""

    archive: Path
    place: int
    size: int


# What a member holds, or why that cannot be had; that of a zip file is opened, and not unpacked before it is wanted.
Data: TypeAlias = "bytes | Extent | zipfile.ZipExtFile | AudioError"


def is_archive(path: Path) -> bool:
    """By its suffix; a compressed tar file is one, too."""
    return path.suffix.lower() in ARCHIVES or is_compressed(path)


def is_compressed(path: Path) -> bool:
    """Whether it is a compressed tar file, by its suffix: it is looked into, and not read."""
    return path.name.lower().endswith(tuple(COMPRESSED))


def members(archive: Path) -> tuple[list[Member], str | None]:
    """The audio that an archive holds, in its order, and why that is not all, where it is not.

    A tar or zip file's are by suffix, as `find_audio`'s; a Parquet file's as `parquet.listed` says.
    """
    found: list[Member] = []
    try:
        for member in _listed(archive):
            found.append(member)
    except AudioError as error:
        return found, str(error)
    except _damage() as error:
        return found, f"damaged: {first_line(error)}"
    except OSError as error:
        return found, f"cannot be read: {error.strerror or first_line(error)}"
    return found, None


def named(archive: str, inside: Iterable[Member]) -> dict[str, Member]:
    """The members of an archive by what they are called, "train-00.tar/a.flac", where `archive` is its own name.

    A name that comes again, as a Parquet file may have one for all its rows, goes on with "#2", "#3", ...
    """
    found: dict[str, Member] = {}
    again: Counter[str] = Counter()
    for member in inside:
        name = first = f"{archive}/{storable(member.name.encode('utf-8', 'surrogateescape'))}"
        while name in found:
            again[first] += 1
            name = f"{first}#{again[first] + 1}"
        found[name] = member
    return found


def contents(archive: Path, wanted: Sequence[Member]) -> Generator[Data, None, None]:
    """What members of one archive hold, in its order, one by one."""
    return Reader(archive).contents(wanted)


class Reader:
    """An archive that may be read part by part, and is opened once: in a large one it takes long to find a place."""

    def __init__(self, archive: Path):
        self._archive = archive
        self._read: Callable[[Sequence[Member]], Iterator[Data]] | None = None

    def contents(self, wanted: Sequence[Member]) -> Generator[Data, None, None]:
        """What members hold, in the archive's order, one by one; not while another part is read."""
        done, reason = 0, _CHANGED
        try:
            if self._read is None:
                self._read = _READERS[self._archive.suffix.lower()](self._archive)
            for data in self._read(wanted):
                yield data
                done += 1
        except (*_damage(), OSError) as error:  # what comes after cannot be reached either
            reason = f"in an archive that cannot be read on: {first_line(error)}"
        for _ in wanted[done:]:
            yield AudioError(reason)


@contextlib.contextmanager
def unpacked(data: Data, suffix: str) -> Iterator[Path]:
    """What a member holds as a file of its own for a while, out of which libsndfile and FFmpeg read all they know.

    Raises:
        AudioError: `data` is one, or can no longer be read out of its archive.
        CorpusError: no room for it.
    """
    if isinstance(data, AudioError):
        raise data
    path: Path | None = None
    try:
        try:
            handle, name = tempfile.mkstemp(suffix)
            path = Path(name)
            with open(handle, "wb") as file:
                for block in _blocks(data):
                    file.write(block)
        except OSError as error:
            where = f"{tempfile.tempdir or 'temporary files'}: cannot be written: {error.strerror}"
            raise CorpusError(f"{where}; make room, or set TMPDIR to another folder") from None
        yield path
    finally:
        if path is not None:
            path.unlink(missing_ok=True)


def _blocks(data: bytes | Extent | zipfile.ZipExtFile) -> Iterable[bytes]:
    if isinstance(data, bytes):
        return [data]
    return _copied(data) if isinstance(data, Extent) else _unzipped(data)


def _unzipped(member: zipfile.ZipExtFile) -> Iterator[bytes]:
    """A block at a time, for a small member may unpack to more than all memory; of bzip2 and LZMA Python's own reader
    unpacks at once whatever a block of packed bytes holds."""
    try:
        with member:
            while block := member.read(_BLOCK):
                yield block
    except (*_damage(), OSError) as error:  # OSError: what bz2 says of damage
        raise AudioError(f"cannot be read from its archive: {first_line(error)}") from None


def _copied(extent: Extent) -> Iterator[bytes]:
    try:
        with open(extent.archive, "rb") as file:
            file.seek(extent.place)
            left = extent.size
            while left:
                block = file.read(min(left, _BLOCK))
                if not block:
                    raise AudioError(_CHANGED)
                left -= len(block)
                yield block
    except OSError as error:
        raise AudioError(f"cannot be read from its archive: {first_line(error)}") from None


def _listed(archive: Path) -> Iterator[Member]:
    if not stat.S_ISREG(os.stat(archive).st_mode):  # opening a pipe would wait for whoever writes to it
        raise AudioError("not a regular file")
    if not is_compressed(archive):
        yield from _LISTERS[archive.suffix.lower()](archive)
    elif _may_hold_audio(archive):
        raise AudioError(WHY_COMPRESSED)


def _may_hold_audio(archive: Path) -> bool:
    """Whether there is audio at the beginning of a compressed tar file; in doubt, too, as where it cannot be read."""
    try:
        with tarfile.open(archive, "r|*", encoding="utf-8") as file:
            for info in file:
                if (not info.isdir() and _is_listed(info.name)) or info.offset_data + info.size > _BEGIN:
                    return True
    except (*_damage(), OSError):  # Zstandard is read from Python 3.14 on
        return True
    return False


def _is_audio(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES | NO_DECODER


def _is_listed(name: str) -> bool:
    """Whether it is audio, or an archive that may hold some; a Parquet file beside audio is a table of labels."""
    return _is_audio(name) or (is_archive(Path(name)) and not name.lower().endswith(".parquet"))


def _list_tar(archive: Path) -> Iterator[Member]:
    with open(archive, "rb") as raw:
        begin = raw.read(tarfile.BLOCKSIZE)
        if begin.startswith(_MAGIC) and b"ustar" not in begin:  # a first file may be called BZh.wav
            raise AudioError(WHY_COMPRESSED)
        start: int | None = 0
        while start is not None:  # for tarfile the end of the first is the end, where `cat` has joined several
            raw.seek(start)
            with tarfile.open(fileobj=raw, mode="r:", encoding="utf-8") as file:
                while (info := file.next()) is not None:
                    file.members.clear()  # type: ignore[attr-defined] - where tarfile keeps all that it has met
                    if info.isdir() or not _is_listed(info.name) or _is_apple_double(raw, info):
                        continue
                    reason = _not_there(info) if _is_audio(info.name) else _WHY_NESTED
                    yield Member(archive, info.name, info.offset_data, info.size, reason)
                # tarfile takes a header that is cut off, or is none, for the end; there zeros have to be.
                raw.seek(file.offset)
                if raw.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"after {file.offset} bytes comes neither a file nor the end")
            start = _after_zeros(raw)


def _after_zeros(file: BinaryIO) -> int | None:
    """Where the block begins that holds the next byte which is not zero; None where there is none."""
    while block := file.read(1 << 16):
        if rest := block.lstrip(b"\0"):
            at = file.tell() - len(rest)
            return at - at % tarfile.BLOCKSIZE
    return None


def _is_apple_double(file: BinaryIO, info: tarfile.TarInfo) -> bool:
    if not os.path.basename(info.name).startswith("._"):
        return False
    file.seek(info.offset_data)
    return file.read(len(APPLE_DOUBLE)) == APPLE_DOUBLE


def _not_there(info: tarfile.TarInfo) -> str:
    """Why the bytes of a member do not stand behind its header, if so."""
    if info.islnk() or info.issym():
        return "a link in a tar file: pack that again with GNU tar's --dereference --hard-dereference"
    if info.issparse():
        return "a file with holes in a tar file: pack that again without --sparse"
    return "" if info.isreg() else "not a regular file"


def _read_tar(archive: Path, wanted: Sequence[Member]) -> Iterator[Extent | AudioError]:
    end = os.stat(archive).st_size
    for member in wanted:
        if member.reason:
            yield AudioError(member.reason)
        elif not 0 <= member.size <= end - member.place:
            yield AudioError("truncated: its archive ends before it")
        else:
            yield Extent(archive, member.place, member.size)


def _list_zip(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for i, info in enumerate(file.infolist()):
            if not info.is_dir() and _is_listed(info.filename) and not info.filename.startswith(_MAC):
                reason = "" if _is_audio(info.filename) else _WHY_NESTED
                yield Member(archive, info.filename, i, info.file_size, reason)


def _read_zip(file: zipfile.ZipFile, wanted: Sequence[Member]) -> Iterator[zipfile.ZipExtFile | AudioError]:
    infos = file.infolist()
    for member in wanted:
        if member.reason:
            yield AudioError(member.reason)
            continue
        info = infos[member.place] if member.place < len(infos) else None
        if info is None or info.filename != member.name:
            yield AudioError(_CHANGED)
            continue
        if info.flag_bits & 1:
            yield AudioError("encrypted: unpack its archive with the password")
            continue
        try:
            opened: zipfile.ZipExtFile = file.open(info)  # type: ignore[assignment] - for reading it is one
        except (*_damage(), OSError) as error:
            yield AudioError(f"cannot be read from its archive: {first_line(error)}")
        else:
            yield opened


def _list_parquet(archive: Path) -> Iterator[Member]:
    return (Member(archive, *row) for row in parquet.listed(archive))


def _read_parquet(rows: parquet.Rows, wanted: Sequence[Member]) -> Iterator[bytes | AudioError]:
    return rows.read([member.place for member in wanted])


def _damage() -> tuple[type[Exception], ...]:
    """What the readers of damaged archives raise, but for OSError; of zip files nearly anything."""
    import pyarrow as pa

    of_values = ValueError, LookupError, ArithmeticError, RuntimeError  # UnicodeDecodeError, NotImplementedError, ...
    of_formats = tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError
    return *of_formats, *of_values, pa.ArrowException


_LISTERS: dict[str, Callable[[Path], Iterator[Member]]] = {
    ".tar": _list_tar,
    ".zip": _list_zip,
    ".parquet": _list_parquet,
}
_READERS: dict[str, Callable[[Path], Callable[[Sequence[Member]], Iterator[Data]]]] = {
    ".tar": lambda archive: partial(_read_tar, archive),
    ".zip": lambda archive: partial(_read_zip, zipfile.ZipFile(archive)),
    ".parquet": lambda archive: partial(_read_parquet, parquet.Rows(archive)),
}
