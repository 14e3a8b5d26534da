"""From a folder of audio to a corpus: decode in threads, write shard after shard, leave out what cannot be used.

A shard is finished once its samples and then its rows are on disk, each renamed into place; what a killed run had not
finished is done again, so the result is the same however often it was killed.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._cores import n_cores
from ..errors import AudioError, CorpusError, DiskError
from ..files import atomic, sha256, storable
from . import archives
from .ahead import in_order
from .corpus import REJECTED, shard_path, to_int16
from .decode import AUDIO_SUFFIXES, AudioFile
from .find import find_audio, folder_reason
from .store import Row, Settings, Store


@dataclass(frozen=True)
class PrepareReport:
    """What is in a corpus now, and what this run did to it."""

    out: Path
    clips: int
    seconds: float
    shards: int
    added: int  # clips of files that are new
    replaced: int  # clips of files that changed
    vanished: int  # clips that are kept though their file is no longer there
    clipped: int  # clips of this run with samples beyond full scale
    rejected: dict[str, int]  # reason without its details -> files; all that are left out now
    remade: int = 0  # clips made again, because their shard was gone or cut short
    lost: int = 0  # clips that went with their shard and could not be made again
    sample_rate: int = 16_000


class _Loaded(NamedTuple):
    row: Row
    wave: NDArray[np.int16] | None = None  # None: rejected, and the row says why


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sample_rate: int = 16_000,
    workers: int | None = None,
    shard_seconds: float = 3600.0,
    min_seconds: float = 0.1,
    silence_db: float = -70.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    listing: Callable[[int, int], None] = lambda done, total: None,
) -> PrepareReport:
    """Make a corpus of the audio in a folder or an archive, or bring one up to date.

    Run again, it goes on where it was interrupted; where nothing has changed, it writes nothing. Files that are new go
    into new shards. A file whose content changed is decoded again and takes the place of its old clip, whose samples
    stay in their shard, unused. The clip of a file that vanished is kept: a corpus does not need its source. (So a
    file that was renamed is there twice; make a new corpus then.) Clips whose shard is gone, or was cut short before
    their end, are made again in new shards; where their file is gone too, they are dropped from the index.

    Args:
        source: a folder; audio in it and below is found by suffix (see `find_audio`), also in archives, see
            `archives.members`. A clip's path goes on in its archive: "train-00.tar/a.flac". Or one archive.
        out: the corpus: a new or empty folder, or an earlier one.
        sample_rate: of the corpus, in Hz.
        workers: decoding threads; by default one a core. The result does not depend on it.
        shard_seconds: a shard is closed once it holds so much.
        min_seconds: what is shorter is left out.
        silence_db: so is what never leaves this distance from its mid-line, in dB of full scale.
        progress: called in this thread, after every file, with how many files are done and how many there are to do.
        listing: called before that, after every archive, with how many are listed, of how many.

    Raises:
        AudioError: `source` is no folder or archive, or a folder that cannot be read.
        CorpusError: no audio in it, or none that can be used; another corpus in `out`, or it cannot be written.
    """
    source, out = Path(source), Path(out)
    workers = n_cores() if workers is None else workers
    for name, value in (("sample_rate", sample_rate), ("workers", workers), ("shard_seconds", shard_seconds)):
        if not value > 0:
            raise CorpusError(f"prepare: {name} is {value}; expected more than 0")
    if not 0 <= min_seconds < math.inf:
        raise CorpusError(f"prepare: min_seconds is {min_seconds}; expected seconds, 0 or more")
    if not silence_db < 0:  # -inf leaves out nothing
        raise CorpusError(
            f"prepare: silence_db is {silence_db}; expected a level below 0 dB of full scale, such as -70"
        )
    settings = Settings(sample_rate, float(min_seconds), float(silence_db))
    unreadable: list[_Loaded] = []
    also = archives.ARCHIVES | archives.COMPRESSED
    if source.is_file() and archives.is_archive(source):
        paths, root = [source], source.parent
    else:
        paths, root = find_audio(source, lambda *told: unreadable.append(_unreadable(source, *told)), also), source
    status = functools.cache(_status)  # of an archive once
    found = _found(root, paths, unreadable, status, listing)
    if not found and not unreadable:
        looked_for = " ".join(sorted(AUDIO_SUFFIXES | archives.ARCHIVES))
        raise CorpusError(f"{source}: no audio in it; looked for {looked_for}")

    added, replaced, remade, clipped = 0, 0, 0, 0
    with Store(out, settings) as store:
        beyond = tuple(f"{item.row['path']}/" for item in unreadable)  # clips of which are not known to be gone
        known = any(map(store.is_clip, found)) or any(
            path.startswith(beyond) for path in store.clips["path"].to_pylist()
        )
        if len(store.clips) and not known:
            raise CorpusError(f"{out}: a corpus of other audio: none of its {len(store.clips)} files is in {source}")
        store.present = {*found, *(item.row["path"] for item in unreadable)}
        now = {key: status(_file(item)) for key, item in found.items()}
        todo = {key: then for key, then in now.items() if then is None or not store.is_current(key, then)}
        loaded = in_order(_jobs(found, todo, settings, store), workers)

        def changes() -> Iterator[_Loaded]:
            nonlocal added, replaced, remade, clipped
            yield from unreadable
            for done, item in enumerate(loaded, 1):
                if item is not None:
                    if item.wave is not None:
                        path = item.row["path"]
                        remade += path in store.lost
                        replaced += path not in store.lost and store.is_clip(path)
                        added += not store.is_clip(path)
                        clipped += item.row["clipped"] > 0
                    yield item
                progress(done, len(todo))

        try:
            _write_shards(store, changes(), shard_seconds * sample_rate)
        finally:
            loaded.close()

    rejected = store.rejected["reason"].to_pylist()
    if not len(store.clips):
        example = f"{store.rejected['path'][0].as_py()}: {rejected[0]}"
        if len(rejected) == 1:
            raise CorpusError(f"{source}: its one audio file cannot be used ({example}); {out / REJECTED} has it too")
        raise CorpusError(
            f"{source}: none of its {len(rejected)} audio files can be used ({example}); "
            f"{out / REJECTED} has the reason of each"
        )
    return PrepareReport(
        out=out,
        clips=len(store.clips),
        seconds=int(store.clips["frames"].to_numpy().sum()) / sample_rate,
        shards=len(store.clips["shard"].unique()),
        added=added,
        replaced=replaced,
        vanished=sum(path not in found for path in store.clips["path"].to_pylist()),
        clipped=clipped,
        rejected=dict(Counter(reason.partition(":")[0] for reason in rejected).most_common()),
        remade=remade,
        lost=len(store.lost) - remade,
        sample_rate=sample_rate,
    )


def _found(
    source: Path,
    paths: list[Path],
    unreadable: list[_Loaded],
    status: Callable[[Path], os.stat_result | None],
    listing: Callable[[int, int], None],
) -> dict[str, Path | archives.Member]:
    """The audio by what it is called in the corpus, that of an archive where the archive is; archives that cannot be
    read to their end go to `unreadable`."""
    found: dict[str, Path | archives.Member] = {}
    done, total = 0, sum(map(archives.is_archive, paths))
    for path in paths:
        if not archives.is_archive(path):
            found[_key(source, path)] = path
            continue
        status(path)  # as it was before it is listed: one that changes from here on shall be new to the next run
        inside, reason = archives.members(path)
        if reason is not None:
            unreadable.append(_Loaded({"path": _key(source, path), "reason": reason}))
        found |= archives.named(_key(source, path), inside)
        done += 1
        listing(done, total)
    return found


def _file(item: Path | archives.Member) -> Path:
    return item if isinstance(item, Path) else item.archive


def _jobs(
    found: dict[str, Path | archives.Member],
    todo: dict[str, os.stat_result | None],
    settings: Settings,
    store: Store,
) -> Iterator[tuple[int, Callable[[], _Loaded | None]]]:
    """What decodes each file, with its size; an archive is read here, in its order, a member when its turn comes."""
    for file, keys in itertools.groupby(todo, lambda key: _file(found[key])):
        if isinstance(found[(keys := list(keys))[0]], Path):
            for key in keys:
                status = todo[key]
                yield status.st_size if status else 0, partial(_load, key, file, settings, store.sha256(key))
            continue
        wanted: list[archives.Member] = [found[key] for key in keys]  # type: ignore[misc]
        for key, member, data in zip(keys, wanted, archives.contents(file, wanted), strict=True):
            job = partial(_load_member, key, data, member.suffix, settings, store.sha256(key), todo[key])
            yield member.size, job


def _write_shards(store: Store, loaded: Iterator[_Loaded], limit: float) -> None:
    """Write clips into shards of at least `limit` samples, but for the last."""
    rows: list[Row] = []
    for first in loaded:
        if first.wave is None:
            rows.append(first.row)
            continue
        end = 0
        with atomic(shard_path(store.out, store.next_shard)) as beside, open(beside, "wb") as file:
            for row, wave in itertools.chain([first], loaded):
                rows.append(row)
                if wave is not None:
                    row["shard"], row["offset"] = store.next_shard, end
                    file.write(wave.data)
                    end += len(wave)
                    if end >= limit:
                        break
        store.commit(rows)
        rows = []
    store.reject(rows)


def _load_member(
    key: str,
    data: archives.Data,
    suffix: str,
    settings: Settings,
    known: str | None,
    archive: os.stat_result | None,
) -> _Loaded | None:
    """`_load` of what an archive holds, from a file of its own for as long as it takes."""
    try:
        with archives.unpacked(data, suffix) as path:
            return _load(key, path, settings, known, archive)
    except AudioError as error:
        return _Loaded({"path": key, "reason": str(error)})


def _load(
    key: str, path: Path, settings: Settings, known: str | None, archive: os.stat_result | None = None
) -> _Loaded | None:
    """Decode a file; None where its hash is the `known` one, so that nothing about it is new. What came out of an
    archive has the size and time of that, by which it is known again."""
    row: Row = {"path": key}
    try:
        with AudioFile(path) as file:
            status = archive or os.stat(path)
            row |= {"sha256": sha256(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
            if row["sha256"] == known:
                return None
            blocks: list[NDArray[np.int16]] = []
            low, high, clipped = np.inf, -np.inf, 0
            for block in file.blocks(settings.sample_rate):
                low, high = min(low, float(block.min())), max(high, float(block.max()))
                samples, beyond = to_int16(block)
                blocks.append(samples)
                clipped += beyond
            wave = np.concatenate(blocks)
            row |= {"source_rate": file.sample_rate, "source_channels": file.channels}
    except DiskError as error:  # told without the file's size, so that the next run tries again
        return _Loaded({"path": key, "reason": str(error).removeprefix(f"{path}: ")})
    except AudioError as error:
        return _Loaded(row | {"reason": str(error).removeprefix(f"{path}: ")})
    except OSError as error:
        return _Loaded({"path": key, "reason": f"cannot be read: {error.strerror}"})
    except MemoryError:  # so is this
        return _Loaded({"path": key, "reason": "too long for the memory there is: cut it, or give fewer --workers"})
    seconds = len(wave) / settings.sample_rate
    if seconds < settings.min_seconds:
        return _Loaded(row | {"reason": f"too short: {seconds:.3g} s, less than {settings.min_seconds:g} s"})
    level = 10 ** (settings.silence_db / 20)
    if (high - low) / 2 < level:
        if row["source_channels"] > 1 and _channels_reach(path, level):
            return _Loaded(row | {"reason": "out of phase: its channels cancel each other when they are mixed to mono"})
        return _Loaded(row | {"reason": f"silent: within {settings.silence_db:g} dBFS of its mid-line throughout"})
    row |= {"frames": len(wave), "duration": seconds, "peak": max(high, -low), "clipped": clipped}
    return _Loaded(row, wave)


def _channels_reach(path: Path, level: float) -> bool:
    """Whether some channel of a file, by itself, is not silent; False where libsndfile alone cannot tell."""
    import soundfile

    low, high = np.inf, -np.inf
    try:
        for block in soundfile.blocks(path, 65_536, dtype="float32", always_2d=True):
            low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
    except (soundfile.SoundFileError, OSError):
        return False
    return bool(np.max(high - low) / 2 >= level)


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None  # a broken link, say: decoding will find the words


def _key(source: Path, path: Path) -> str:
    """The path in the source folder."""
    return storable(path.relative_to(source))


def _unreadable(source: Path, folder: Path, error: OSError) -> _Loaded:
    return _Loaded({"path": _key(source, folder), "reason": folder_reason(error)})
