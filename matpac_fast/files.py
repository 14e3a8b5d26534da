"""Writing files so that nobody ever sees half of one: write beside, sync, rename, sync the folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError, MatpacFastError, first_line


def check_no_file(
    path: str | os.PathLike[str],
    what: str,
    error: type[MatpacFastError] = ConfigError,
    mend: str = "give another path",
) -> None:
    """Raise `error` where `path`, the folder for `what`, is there and is no folder; `mend` says what to do."""
    if os.path.lexists(path) and not os.path.isdir(path):
        kind = "a file" if os.path.exists(path) else "a link to nothing"
        raise error(f"{os.fspath(path)}: {kind}, where a folder for {what} was expected; {mend}")


def entries_of(folder: str | os.PathLike[str]) -> set[str]:
    """The names in a folder but for hidden ones; none where there is no folder."""
    with contextlib.suppress(FileNotFoundError):
        return {name for name in os.listdir(folder) if not name.startswith(".")}
    return set()


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on any error it vanishes.

    The name of the temporary ends in ".tmp", so a process killed half-way leaves something that is easily told. The
    file gets the permissions that the umask gives to any new one. Where `path` is a link, its target is replaced.

    Raises:
        ConfigError: a pipe, a device or the like is there, which a file should not replace.
    """
    place = Path(os.path.realpath(path))
    if os.path.lexists(place) and not (place.is_file() or place.is_dir()):  # of a folder the system says what it is
        raise ConfigError(f"{os.fspath(path)}: not a regular file; expected a new path, or that of a file to replace")
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.parent / f".{place.name}.{secrets.token_hex(4)}.tmp"
    try:
        handle = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        yield beside
        if stat.S_IMODE(os.stat(beside).st_mode) != mode:  # safetensors leaves a file that its owner alone can read
            with contextlib.suppress(PermissionError):  # of a disk that keeps no permissions
                os.chmod(beside, mode)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, place)
        sync_folder(place.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the error that is told is the first one
            beside.unlink()
        told = (None, beside, os.fspath(beside))  # a write that fails, as on a full disk, does not say where
        if isinstance(error, OSError) and error.errno is not None and error.filename in told:
            error.filename = os.fspath(path)
            del error.filename2  # of a rename
        raise


def clear_torn(folder: Path, pattern: str = ".*.tmp", older: float | None = None) -> None:
    """Remove what `atomic` of processes that were killed has left; where others may be at work, only such as nobody has
    written to for `older` seconds."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):  # removed by another, or another's own: it harms nobody
            if older is None or time.time() - left.stat().st_mtime > older:
                left.unlink()


def arrow_file(path: str | os.PathLike[str], mode: str = "rb") -> Any:
    """A file opened for pyarrow, which takes some names for addresses and fails at what is not UTF-8.

    It is none of Python's, which pyarrow's threads may still hold when the interpreter ends: that aborts the process.
    """
    import pyarrow as pa

    return pa.OSFile(os.fsencode(path), mode)


def write_parquet(path: str | os.PathLike[str], table: Any, **options: Any) -> None:
    """A pyarrow table as Parquet, all of it or none; `options` are pyarrow's."""
    import pyarrow.parquet as pq

    with atomic(path) as beside, arrow_file(beside, "wb") as file:
        pq.write_table(table, file, **options)


def read_parquet(path: str | os.PathLike[str], columns: list[str] | None = None) -> Any:
    """The pyarrow table of a Parquet file, or some of its columns; of a damaged one ArrowException or OSError."""
    import pyarrow.parquet as pq

    with arrow_file(path) as file:
        return pq.read_table(file, columns=columns)


@contextlib.contextmanager
def damage_named(path: Path, mend: str = "remove it and run the same again, which makes it anew") -> Iterator[None]:
    """Around reading `path`: ConfigError with what mends it where it is damaged, which is not where the disk fails."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, zipfile.BadZipFile, OSError, EOFError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk; pyarrow's own has no number
        raise ConfigError(f"{path}: damaged ({first_line(error)}): {mend}") from None


def storable(name: str | bytes | os.PathLike[str]) -> str:
    """A file's name in characters that Parquet can hold; of one that is not UTF-8, its odd bytes as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def local(name: str) -> str:
    """A file's name, which is UTF-8 where it is stored, as Python calls that file in whatever locale."""
    return os.fsdecode(name.encode("utf-8"))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8, all of it or none; of a name that is not UTF-8, its odd bytes as \\udcNN."""
    with atomic(path) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def number_for_json(value: Any) -> Any:
    """A scalar of NumPy or torch as Python's number: json.dumps's `default`. Anything else is a ConfigError."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    raise ConfigError(f"{value!r} is a {type(value).__name__}; expected numbers and texts, which JSON can hold")


def crc32(path: str | os.PathLike[str]) -> int:
    """CRC-32 of a file's bytes, which tells damage, if no intent, at the rate of a disk."""
    sum_ = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sum_ = zlib.crc32(block, sum_)
    return sum_


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
