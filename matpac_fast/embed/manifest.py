"""The manifest: which files a collection holds, in which shard each one goes, and with what settings.

settings.json       what the embeddings are: encoder, temporal support and the rest; a folder holds one kind only
manifest.parquet    of every file its path, relative to the source, its seconds and bytes, and its shard; of what cannot
                    be a file of the collection its escaped name and the reason
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..audio.ahead import in_order
from ..audio.archives import is_archive
from ..errors import AudioError, ConfigError
from ..files import check_no_file, damage_named, entries_of, read_parquet, write_parquet, write_text
from .source import Entry, Source, Tell
from .writer import Failure, read_errors, shard_path

SETTINGS = "settings.json"
LEASES = "leases"  # the folder of those who are at work
_COLUMNS = ("path", "seconds", "bytes", "shard", "reason")
_TELL_EVERY = 100  # files
T = TypeVar("T")


@dataclass
class Manifest:
    """Files by shard, paths relative to the source; a shard's files never change once it is listed."""

    shards: list[list[Entry]] = field(default_factory=list)
    unusable: list[Failure] = field(default_factory=list)

    def __len__(self) -> int:
        """Files in all. One that is tried again stands in two shards, and counts in the later one."""
        return len(self.homes()) + len(self.unusable)

    def homes(self) -> dict[str, int]:
        """The shard of each file."""
        return {entry.path: i for i, shard in enumerate(self.shards) for entry in shard}

    def errors(self, out: Path, kind: str) -> list[Failure]:
        """The failures of all shards that are done, and what cannot be used at all."""
        homes, errors = self.homes(), list(self.unusable)
        for i in range(len(self.shards)):
            if (path := shard_path(out, i, kind)).exists():
                errors += [failure for failure in read_errors(path) if homes[failure[0]] == i]
        return errors


def check_folder(out: Path) -> None:
    """Raise ConfigError where `out` is no folder, or holds things and no embeddings: nothing is mixed in there."""
    check_no_file(out, "the embeddings")
    entries = entries_of(out)
    ours = entries & {"manifest.parquet", SETTINGS, LEASES} or any(out.glob("shard-*"))
    if entries and not ours:
        raise ConfigError(f"{out} is not empty and holds no embeddings; give a new folder to --out")


@contextlib.contextmanager
def taken_back(out: Path) -> Iterator[None]:
    """`out`, if it is new, goes again where nothing came into it, as from a source without audio."""
    new = not out.exists()
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # something is in it
                out.rmdir()


def read_manifest(out: Path) -> Manifest | None:
    path = out / "manifest.parquet"
    # Without it nobody knows what the shards' numbers stand for, so a new one could not be made to fit them.
    mend = "copy it again, or give a new folder to --out"
    if not path.exists():
        if any(out.glob("shard-*")):
            raise ConfigError(f"{path}: missing, and there are shards: {mend}")
        return None
    manifest = Manifest()
    with damage_named(path, mend):
        table = read_parquet(path)
        columns = [table[name].to_pylist() for name in _COLUMNS]
    for name, seconds, size, shard, reason in zip(*columns, strict=True):
        if shard is None:
            manifest.unusable.append((name, reason))
            continue
        while len(manifest.shards) <= shard:
            manifest.shards.append([])
        manifest.shards[shard].append(Entry(name, seconds, size))
    return manifest


def write_manifest(out: Path, manifest: Manifest) -> None:
    import pyarrow as pa

    rows = [(e.path, e.seconds, e.bytes, i, None) for i, shard in enumerate(manifest.shards) for e in shard]
    rows += [(name, None, None, None, reason) for name, reason in manifest.unusable]
    kinds = [pa.string(), pa.float64(), pa.int64(), pa.int32(), pa.string()]
    columns = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), kinds, strict=True)]
    write_parquet(out / "manifest.parquet", pa.table(dict(zip(_COLUMNS, columns, strict=True))))


def extend(
    known: Manifest | None, source: Source, files_per_shard: int, shard_seconds: float, workers: int, tell: Tell
) -> tuple[Manifest, bool]:
    """The manifest with what is new in `source`, and whether that changed it.

    Files that are listed stay where they are, so shards that are done stay done; new ones open new shards, the longest
    first, so that alike lengths share batches, memory is tried at the beginning, and the last shards are the smallest;
    and after them what archives hold, in the order in which it is read.

    Raises:
        AudioError: no such folder, or no audio in it.
    """
    before = known or Manifest()
    listed = before.homes()
    found = source.find(listed, workers, tell)
    if not listed and not any(found):
        where = "folder or below"
        if source.path.is_file():
            where = "archive" if is_archive(source.path) else "list"
        raise AudioError(f"{source.path}: no audio files in this {where}")
    jobs = ((1, partial(source.entry, name)) for name in found.files)
    looked_at = _counted(in_order(jobs, workers), len(found.files), tell)
    entries = sorted(looked_at, key=lambda entry: (-entry.seconds, entry.path)) + found.members
    changed = bool(entries) or found.unusable != before.unusable or known is None
    return Manifest(before.shards + _cut(entries, files_per_shard, shard_seconds), found.unusable), changed


def look_over(
    known: Manifest, source: Source, out: Path, kind: str, workers: int, tell: Tell
) -> tuple[list[str], list[str], bool]:
    """Files with embeddings that have another size in bytes now; those that are gone; and whether `known` changed.

    Sizes are all that is looked at, since a list has no times. `known` changes, in its shards, with files that are
    still to be embedded: their embeddings will be of what they hold now.
    """
    homes, changed, gone, renewed = known.homes(), [], [], False
    done = [shard_path(out, i, kind).exists() for i in range(len(known.shards))]
    places = [(i, j) for i, shard in enumerate(known.shards) for j, e in enumerate(shard) if homes[e.path] == i]
    jobs = ((1, partial(source.size, known.shards[i][j].path)) for i, j in places)
    for (i, j), size in zip(places, _counted(in_order(jobs, workers), len(places), tell), strict=True):
        entry = known.shards[i][j]
        if (size or 0) == entry.bytes:  # or it could not be read then, and cannot now
            continue
        if done[i]:
            (gone if size is None else changed).append(entry.path)
        else:
            known.shards[i][j], renewed = replace(entry, bytes=size or 0), True
    if changed or gone:
        failed = {name for name, _ in known.errors(out, kind)}  # these have none, and can be tried again
        changed, gone = ([name for name in names if name not in failed] for names in (changed, gone))
    return changed, gone, renewed


def _counted(found: Iterable[T], total: int, tell: Tell) -> Iterator[T]:
    for done, item in enumerate(found, 1):
        if done % _TELL_EVERY == 0:
            tell(done, total)
        yield item


def _cut(entries: list[Entry], files_per_shard: int, shard_seconds: float) -> list[list[Entry]]:
    """Shards of at most so many files and so many seconds, or of one file that is longer."""
    shards: list[list[Entry]] = []
    seconds = 0.0
    for entry in entries:
        seconds += entry.seconds
        if not shards or len(shards[-1]) >= files_per_shard or seconds > shard_seconds:
            shards.append([])
            seconds = entry.seconds
        shards[-1].append(entry)
    return shards


def retried(
    manifest: Manifest, source: Source, out: Path, kind: str, files_per_shard: int, shard_seconds: float
) -> Manifest:
    """The manifest with the files that failed in finished shards in new shards, as they are now, to be tried again."""
    names = {name for name, _ in manifest.errors(out, kind)}
    homes = manifest.homes()
    listed = [e.path for i, shard in enumerate(manifest.shards) for e in shard if homes[e.path] == i]
    failed = [source.entry(name) for name in listed if name in names]
    return Manifest(manifest.shards + _cut(failed, files_per_shard, shard_seconds), manifest.unusable)


def keep_settings(out: Path, settings: Mapping[str, Any], any_decoder: bool = False) -> None:
    """Write the settings of a new folder; raise ConfigError where those of an old one differ, saying what to do."""
    path = out / SETTINGS
    if not path.exists():
        if (out / "manifest.parquet").exists() or any(out.glob("shard-*")):
            raise ConfigError(f"{out} holds embeddings without settings.json, so they cannot be gone on with")
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: damaged: {error}") from None
    if not isinstance(stored, dict) or not stored.keys() >= {"encoder", "encoder_name", "source", "decoder"}:
        raise ConfigError(f"{path}: of something else than embeddings; give a new folder to --out")
    without = ["decoder", "source"]
    if stored["encoder"] == settings["encoder"]:  # which is the id: its file may have been renamed since
        without.append("encoder_name")
    different = _differences(stored, settings, without)
    if "encoder_name" not in without and stored["encoder_name"] == settings["encoder_name"]:
        different.append(f"both are {settings['encoder_name']!r}: its weights, its options or --precision changed")
    if different:
        raise ConfigError(f"{out} holds other embeddings: {'; '.join(different)}; give a new folder to --out")
    decoders = _differences(stored["decoder"], settings["decoder"])
    if decoders and not any_decoder:
        packages = [f"{name}=={stored['decoder'][name]}" for name in ("soundfile", "soxr") if name in stored["decoder"]]
        raise ConfigError(
            f"{out} was begun with another decoder, which changes embeddings a little: {'; '.join(decoders)}; go on "
            f"with the old one (pip install {' '.join(packages)}), with both (--any-decoder), or in another --out"
        )


def stored_names(out: Path) -> dict[str, str]:
    """Source and encoder as the first call named them, which may have moved since."""
    stored = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    return {name: stored[name] for name in ("source", "encoder_name")}


def check_source(out: Path, source: Source, manifest: Manifest, workers: int, tell: Tell) -> None:
    """Raise ConfigError where `source` is another folder than that of the manifest, and not the same one moved.

    It is the same where each file listed is there and as long, in bytes.
    """
    stored = stored_names(out)["source"]
    if stored == str(source.path.resolve()):
        return
    entries = {entry.path: entry for shard in manifest.shards for entry in shard}
    jobs = ((1, partial(source.size, name)) for name in entries)
    sizes = _counted(in_order(jobs, workers), len(entries), tell)
    others = [name for (name, entry), size in zip(entries.items(), sizes, strict=True) if (size or 0) != entry.bytes]
    if others:
        raise ConfigError(
            f"{out} holds embeddings of {stored}, and {len(others)} of its {len(entries)} files are not the same in "
            f"{source.path} (such as {others[0]}): give the folder that holds these files, or a new folder to --out; "
            f"where it is that one, moved and changed since, write it into {out / SETTINGS} as the source"
        )


def _differences(stored: Mapping[str, Any], here: Mapping[str, Any], without: Sequence[str] = ()) -> list[str]:
    keys = sorted((stored.keys() | here.keys()) - set(without))
    return [
        f"{key} is {stored.get(key)!r} there and {here.get(key)!r} here"
        for key in keys
        if stored.get(key) != here.get(key)
    ]
