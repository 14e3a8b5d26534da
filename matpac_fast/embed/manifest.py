"""The manifest: which files a collection holds, in which shard each one goes, and with what settings.

settings.json       what the embeddings are: encoder, temporal support and the rest; a folder holds one kind only
manifest.parquet    path and shard of every file, paths relative to the source
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audio.decode import find_audio
from ..errors import AudioError, ConfigError
from ..files import atomic, write_text


@dataclass(frozen=True)
class Manifest:
    """Files by shard, as paths relative to `source`; a shard's files never change once it is listed."""

    source: Path
    shards: list[list[str]]
    unusable: list[tuple[str, str]]  # folders that cannot be read and names that cannot be stored, escaped, and why

    def __len__(self) -> int:
        return sum(map(len, self.shards)) + len(self.unusable)


def make_manifest(source: Path, out: Path, files_per_shard: int, settle: Callable[[], None]) -> Manifest:
    """The manifest of `out`, extended by what is new in `source`, and written back.

    Files that are listed stay where they are, so shards that are done stay done; new ones open new shards. `settle` is
    called once there is something to embed, before anything is written.

    Raises:
        AudioError: no such folder, or no audio in it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = out / "manifest.parquet"
    shards: list[list[str]] = []
    if path.exists():
        for row in pq.read_table(path).to_pylist():
            while len(shards) <= row["shard"]:
                shards.append([])
            shards[row["shard"]].append(row["path"])
    listed = {name for shard in shards for name in shard}
    unusable: list[tuple[str, str]] = []

    def locked(folder: Path, error: OSError) -> None:
        unusable.append((_escaped(os.path.relpath(folder, source)), f"folder cannot be read: {error.strerror}"))

    new = []
    for name in (os.path.relpath(file, source) for file in find_audio(source, locked)):
        if not _is_utf8(name):
            unusable.append((_escaped(name), "the name is not UTF-8: rename the file"))
        elif name not in listed:
            new.append(name)
    if not listed and not new and not unusable:
        raise AudioError(f"{source}: no audio files in this folder or below")
    settle()
    if new:
        shards += [new[i : i + files_per_shard] for i in range(0, len(new), files_per_shard)]
        rows = [(name, i) for i, shard in enumerate(shards) for name in shard]
        table = pa.table({"path": [r[0] for r in rows], "shard": pa.array([r[1] for r in rows], pa.int32())})
        with atomic(path) as beside:
            pq.write_table(table, beside)
    return Manifest(source, shards, unusable)


def _escaped(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def keep_settings(out: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new folder; raise ConfigError where those of an old one differ, saying in what."""
    path = out / "settings.json"
    if not path.exists():
        if (out / "manifest.parquet").exists() or any(out.glob("shard-*.parquet")):
            raise ConfigError(f"{out} holds embeddings without settings.json, so they cannot be gone on with")
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: damaged: {error}") from None
    keys = sorted(stored.keys() | settings.keys())
    different = [
        f"{key} is {stored.get(key)!r} there and {settings.get(key)!r} here"
        for key in keys
        if stored.get(key) != settings.get(key)
    ]
    if different:
        raise ConfigError(f"{out} holds other embeddings: {'; '.join(different)}; give a new folder to --out")
