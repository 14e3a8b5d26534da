"""The Parquet side of preparing a corpus: what became of every file, kept so that a kill at any moment loses little.

`Store` holds one row a file, of a clip or of a rejected one. The rows of a finished shard are written at once, as a
part; on leaving, all rows become index.parquet and rejected.parquet, each replaced as a whole and only if it changes,
and the parts go. Clips whose samples are gone, with their shard or cut off its end, count as files still to be read.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import CorpusError
from ..files import check_no_file, clear_torn, read_parquet, sync_folder, write_parquet
from .corpus import FORMAT, INDEX, METADATA, PARTS, REJECTED, SHARDS, damaged, read_metadata, shard_path
from .decode import decoder_versions

Row = dict[str, Any]
_OF_REJECTED = ["path", "reason", "sha256", "size", "mtime_ns"]


@dataclass(frozen=True)
class Settings:
    """What decides whether and how a file becomes a clip: the same for all of a corpus."""

    sample_rate: int
    min_seconds: float
    silence_db: float


class Store:
    """The rows of the corpus in `out`, locked against other processes (on NFS, of this machine); a context manager.

    Attributes:
        next_shard: number of the next shard to be written.
        present: set by the caller, the files that the source holds now: rejections of others are forgotten.
        lost: files of clips whose samples were not there when this run began; they leave the index when it ends well.
        clips, rejected: after leaving, the rows of index.parquet and rejected.parquet, as pyarrow Tables.

    Raises:
        CorpusError: a folder that cannot be written, is in use, or holds something else; a disk that is full.
    """

    clips: Any
    rejected: Any

    def __init__(self, out: Path, settings: Settings):
        self.out, self._settings = out, settings
        self.present: set[str] | None = None

    def __enter__(self) -> Store:
        check_no_file(self.out, "the corpus", CorpusError)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.out, os.O_RDONLY)
        except OSError as error:
            raise CorpusError(f"{self.out}: cannot be written: {error.strerror}") from None
        try:
            self._claim()
            self._load()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._finish(done=kind is None)
        except OSError as failed:
            error = error if isinstance(error, OSError) else failed
        finally:
            os.close(self._lock)
        if isinstance(error, OSError):
            mend = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
            raise CorpusError(
                f"{self.out}: cannot be written: {error.strerror}; {self._safe} clips are safe; "
                f"{mend} and run the same again"
            ) from error

    def is_clip(self, path: str) -> bool:
        """Whether a file was a clip when this run began."""
        return path in self._row and bool(self._accepted[self._row[path]])

    def is_current(self, path: str, status: os.stat_result) -> bool:
        """Whether a file is known and still has the size and time of then; what could not be opened has neither."""
        row = None if path in self.lost else self._row.get(path)
        return row is not None and (self._size[row], self._time[row]) == (status.st_size, status.st_mtime_ns)

    def sha256(self, path: str) -> str | None:
        """The hash that a file had, where it is known and its samples are there."""
        if path not in self._row or path in self.lost:
            return None
        return self._rows["sha256"][self._row[path]].as_py()

    def commit(self, rows: list[Row]) -> None:
        """Keep the rows of shard `next_shard`, whose samples are on disk, and of files rejected on the way to it."""
        table, part = self._table(rows), self.out / PARTS / f"{self.next_shard:05d}.parquet"
        # First, so that an interruption from here on leaves no part that the index, written on leaving, does not hold.
        self._new.append(table)
        self.next_shard += 1
        self._write(table, part)

    def reject(self, rows: list[Row]) -> None:
        """Add the rows of rejected files that no shard comes after."""
        self._new.append(self._table(rows))

    def _claim(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(f"{self.out}: another process is preparing it") from None
        except OSError:
            pass  # a file system without locks
        entries = set(os.listdir(self.out))
        if entries and not entries & {INDEX, REJECTED, SHARDS, PARTS}:
            raise CorpusError(f"{self.out}: holds other files; give a new or empty folder for the corpus")

    def _load(self) -> None:
        import pyarrow as pa

        for pattern in (f".{INDEX}.*.tmp", f".{REJECTED}.*.tmp", f"{SHARDS}/.*.tmp", f"{PARTS}/.*.tmp"):
            clear_torn(self.out, pattern)
        self._decoders = [decoder_versions()]
        self.next_shard = 0
        self.clips = self._read(self.out / INDEX)
        self.rejected = self._read(self.out / REJECTED)
        parts = [self._read(path) for path in sorted((self.out / PARTS).glob("*.parquet"))]
        self._rows = pa.concat_tables([self.clips, self.rejected, *parts])
        self._new: list[Any] = []
        self._row = {path: row for row, path in enumerate(self._rows["path"].to_pylist())}  # the last one counts
        self._accepted = self._rows["reason"].is_null().to_numpy()
        self._size = self._rows["size"].fill_null(-1).to_numpy()
        self._time = self._rows["mtime_ns"].fill_null(-1).to_numpy()
        used = self._rows["shard"].drop_null().unique().to_pylist()
        self.next_shard = max([self.next_shard, *(shard + 1 for shard in used)])
        self.lost = self._find_lost()

    def _find_lost(self) -> set[str]:
        """The clips that reach beyond the end of their shard as it is on disk, or have none."""
        rows = np.array([row for row in self._row.values() if self._accepted[row]], np.int64)
        place, offset, frames = (
            self._rows[name].fill_null(0).to_numpy()[rows] for name in ("shard", "offset", "frames")
        )
        shards, of = np.unique(place, return_inverse=True)
        sizes = np.array([_bytes(shard_path(self.out, int(shard))) for shard in shards], np.int64)
        return set(self._rows["path"].take(rows[2 * (offset + frames) > sizes[of]]).to_pylist())

    def _finish(self, done: bool) -> None:
        """Bring index and rejections up to date on disk; then the parts are needed no longer.

        Of a run that is not `done` the lost clips stay in the index: the next one shall know of them, and make them.
        """
        import pyarrow as pa

        rows = pa.concat_tables([self._rows, *self._new])
        last = {path: row for row, path in enumerate(rows["path"].to_pylist())}
        still_lost = [path for path in self.lost if last[path] < len(self._rows)]
        if done:
            for path in still_lost:
                del last[path]
        rows = rows.take(pa.array(sorted(last.values()), pa.int64()))
        clips = rows.filter(rows["reason"].is_null())
        rejected = rows.filter(rows["reason"].is_valid()).sort_by("path")
        if self.present is not None:
            rejected = rejected.filter(
                pa.array([path in self.present for path in rejected["path"].to_pylist()], pa.bool_())
            )
        written, self.clips, self.rejected = (self.clips, self.rejected), clips, rejected
        self._safe = len(clips) - (0 if done else len(still_lost))
        if not clips.equals(written[0]):
            self._write(clips.drop_columns("reason"), self.out / INDEX)
        if not rejected.equals(written[1]):
            self._write(rejected.select(_OF_REJECTED), self.out / REJECTED)
        if (self.out / PARTS).exists():
            for part in (self.out / PARTS).iterdir():  # also what an interruption left half-written
                part.unlink()
            (self.out / PARTS).rmdir()
            sync_folder(self.out)

    def _table(self, rows: list[Row]) -> Any:
        import pyarrow as pa

        return pa.Table.from_pylist(rows, schema=_schema())

    def _write(self, table: Any, path: Path) -> None:
        metadata = {"format": FORMAT, **asdict(self._settings), "decoders": self._decoders}
        if path.name == INDEX:
            # No number is given twice, though no clip may be left in the last shard: whoever opened the corpus before
            # would read other audio there.
            metadata["next_shard"] = self.next_shard
        write_parquet(path, table.replace_schema_metadata({METADATA: json.dumps(metadata)}), compression="zstd")

    def _read(self, path: Path) -> Any:
        """A table with all columns, empty where there is no file; checks that it was made as this run would."""
        import pyarrow as pa

        schema = _schema()
        if not path.exists():
            return schema.empty_table()
        try:
            table = read_parquet(path)
        except (pa.ArrowException, OSError) as error:
            raise damaged(path, error) from None
        metadata = read_metadata(table.schema, path)
        wanted = asdict(self._settings)
        differ = [
            f"{name} {metadata[name]:g}, not {wanted[name]:g}" for name in wanted if metadata[name] != wanted[name]
        ]
        if differ:
            raise CorpusError(f"{self.out}: was prepared with {', '.join(differ)}; give the same, or a new folder")
        self.next_shard = max(self.next_shard, metadata.get("next_shard", 0))
        self._decoders = metadata["decoders"] + [now for now in self._decoders if now not in metadata["decoders"]]
        columns = [
            table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
            for field in schema
        ]
        return pa.table(columns, schema=schema)


def _bytes(shard: Path) -> int:
    """Of a shard; fewer than none where it is missing."""
    try:
        return os.stat(shard).st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1
    except OSError as error:  # it may be there: nothing is made again for a disk that does not answer
        raise CorpusError(f"{shard}: cannot be read: {error.strerror}; mend that and run the same again") from None


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("path", pa.string()),  # in the source folder; bytes that are no UTF-8 as \xNN
            ("sha256", pa.string()),  # of the file
            ("frames", pa.int64()),  # samples of the clip
            ("duration", pa.float64()),  # seconds
            ("shard", pa.int64()),
            ("offset", pa.int64()),  # first sample in the shard
            ("source_rate", pa.int64()),  # Hz
            ("source_channels", pa.int64()),
            ("peak", pa.float32()),  # of the clip before clipping, full scale 1
            ("clipped", pa.int64()),  # samples beyond full scale
            ("size", pa.int64()),  # bytes of the file
            ("mtime_ns", pa.int64()),
            ("reason", pa.string()),  # why it was rejected; null for a clip, and not in the index
        ]
    )
