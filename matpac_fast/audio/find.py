"""The audio files of a folder, by their suffixes."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import AudioError
from .decode import AUDIO_SUFFIXES, NO_DECODER

APPLE_DOUBLE = b"\0\5\x16\7"  # begins what macOS keeps about a file, beside it, on other disks and in archives


def find_audio(
    folder: str | os.PathLike[str],
    on_error: Callable[[Path, OSError], None] = lambda path, error: None,
    also: frozenset[str] = frozenset(),
) -> list[Path]:
    """The audio files in `folder` and below, sorted, by suffix in any case.

    Links are followed, each folder is visited once, by its real place where it has one below `folder`. What macOS keeps
    about files beside them, "._a.wav" beside "a.wav", is passed over.

    Args:
        folder: where to look.
        on_error: told of each folder below that cannot be read, is named like an audio file, or is a link to a folder
            that holds it; the search goes on.
        also: suffixes of other files to find, in lower case, such as ".tar" or ".tar.gz".

    Raises:
        AudioError: `folder` itself is none, or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AudioError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    found: list[str] = []
    suffixes = AUDIO_SUFFIXES | NO_DECODER
    seen: set[tuple[int, int]] = set()
    links: list[str] = []  # to folders; visited last
    waiting = [os.fspath(folder)]
    while waiting or links:
        here = waiting.pop() if waiting else links.pop(0)
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                inside = os.path.join(os.path.realpath(os.path.dirname(here)), "")
                if inside.startswith(os.path.join(os.path.realpath(here), "")):
                    on_error(Path(here), OSError(errno.ELOOP, "a link to a folder that holds it"))
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if here == os.fspath(folder):
                raise AudioError(f"{folder}: cannot be read: {error.strerror}") from None
            on_error(Path(here), error)
            continue
        for entry in listed:
            stem, suffix = os.path.splitext(entry.name.lower())
            named = suffix in suffixes
            if _is_folder(entry):
                if named:
                    on_error(Path(entry.path), OSError(errno.EISDIR, "a folder by the name of an audio file"))
                (links if entry.is_symlink() else waiting).append(entry.path)
            elif (named or {suffix, os.path.splitext(stem)[1] + suffix} & also) and not _is_apple_double(entry):
                found.append(entry.path)
    return [Path(path) for path in sorted(found)]


def folder_reason(error: OSError) -> str:
    """What `find_audio` tells of a folder, for a list of what was left out."""
    told = error.strerror or "unknown"
    return told if error.errno in (errno.EISDIR, errno.ELOOP) else f"folder cannot be read: {told}"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link into itself: listed as a file, it is rejected with its reason
        return False


def _is_apple_double(entry: os.DirEntry[str]) -> bool:
    if not entry.name.startswith("._"):
        return False
    with contextlib.suppress(OSError), open(entry.path, "rb") as file:
        return file.read(len(APPLE_DOUBLE)) == APPLE_DOUBLE
    return False
