"""The rows of one shard, spooled as they come, written as one atomic file: Parquet, .npz or .npy.

parquet  shard-00000.parquet: path, start, end, temporal_support, encoder, embedding; metadata: settings and failures
npz      shard-00000.npz: arrays path, start, end, embedding; failed and reason; settings, JSON
npy      shard-00000.npy: the embeddings, to be memory-mapped; shard-00000.index.parquet: the rest, a row a row
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..files import arrow_file, atomic, damage_named, write_parquet

FORMATS = ("parquet", "npz", "npy")
DTYPES = ("float32", "float16")
_KEY = b"matpac_fast"
_IN_MEMORY = 64 << 20  # bytes of embeddings; more of them wait on the disk
_GROUP = 32 << 20  # bytes of embeddings in a row group, at most
Failure: TypeAlias = "tuple[str, str]"  # path, reason


def shard_path(out: Path, shard: int, kind: str = "parquet") -> Path:
    """The file whose presence says that a shard is done."""
    return out / f"shard-{shard:05d}{'.index.parquet' if kind == 'npy' else '.' + kind}"


class Rows:
    """The rows of a shard on their way to its file, in memory that does not grow with their number.

    Args:
        out: the folder, on whose disk what does not fit into memory waits, in a file that vanishes with the process.
        shape: of one embedding, (E,) or (L, E).
        dtype: one of `DTYPES`.
    """

    def __init__(self, out: Path, shape: tuple[int, ...], dtype: str = "float32"):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.failed: list[Failure] = []
        self._values = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=os.fspath(out))  # noqa: SIM115 - closed by `close`
        self._clips: list[tuple[str, int]] = []  # path and number of rows
        self._times: list[np.ndarray] = []  # (n, 2): start and end
        self._kept = self._added = 0  # rows of files that are whole; and of the one that is coming
        self._finite = True  # the numbers of the one that is coming

    def __len__(self) -> int:
        return self._kept

    def add(self, start: np.ndarray, end: np.ndarray, values: np.ndarray) -> None:
        """Rows of a file that may have more: start (n,) and end (n,) in seconds, values (n, *shape)."""
        with np.errstate(over="ignore"):  # said in `keep`
            stored = np.ascontiguousarray(values, self.dtype)
        self._finite &= bool(np.isfinite(stored).all())
        self._values.write(stored.tobytes())
        self._times.append(np.stack([start, end], axis=1).astype(np.float64))
        self._added += len(stored)

    def keep(self, name: str) -> str | None:
        """The file whose rows were added is whole. Numbers that cannot be stored make it a failed one: the reason."""
        if not self._finite:
            return self.drop(name, f"its embeddings are not finite in {self.dtype}")
        self._clips.append((name, self._added))
        self._kept, self._added = self._kept + self._added, 0
        return None

    def drop(self, name: str, reason: str) -> str:
        """The file failed: what was added of it goes. Returns the reason."""
        self.failed.append((name, reason))
        self._values.seek(self._kept * self._row_bytes)
        self._values.truncate()
        times = np.concatenate([*self._times, np.empty((0, 2))])[: self._kept]
        self._times, self._added, self._finite = [times], 0, True
        return reason

    def close(self) -> None:
        self._values.close()

    def write(self, out: Path, shard: int, kind: str, settings: Mapping[str, Any]) -> None:
        """Write the shard, all of it or none."""
        path = shard_path(out, shard, kind)
        if kind == "npy":
            with atomic(out / f"shard-{shard:05d}.npy") as beside, open(beside, "wb") as file:
                self._write_array(file)
        with atomic(path) as beside:
            if kind == "npz":
                self._write_npz(beside, settings)
            else:
                self._write_parquet(beside, settings, embeddings=kind == "parquet")

    @property
    def _row_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def _columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Which clip each row is of (R,), and its start and end (R, 2)."""
        clip = np.repeat(np.arange(len(self._clips), dtype=np.int32), [n for _, n in self._clips])
        return clip, np.concatenate([*self._times, np.empty((0, 2))])

    def _blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """The embeddings, (n, *shape) of at most `rows` at a time, each with the number of its first row."""
        self._values.seek(0)
        for first in range(0, len(self), rows):
            n = min(rows, len(self) - first)
            yield first, np.frombuffer(self._values.read(n * self._row_bytes), self.dtype).reshape(n, *self.shape)

    def _write_parquet(self, path: Path, settings: Mapping[str, Any], embeddings: bool) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        kind = pa.from_numpy_dtype(self.dtype)
        for size in reversed(self.shape):
            kind = pa.list_(kind, size)
        names = pa.dictionary(pa.int32(), pa.string())
        fields = [("path", names), ("start", pa.float64()), ("end", pa.float64())]
        fields += [("temporal_support", pa.float64()), ("encoder", names)]
        fields += [("embedding", kind)] if embeddings else []
        metadata = {_KEY: json.dumps({"settings": settings, "errors": self.failed})}
        schema = pa.schema([pa.field(*field) for field in fields], metadata)
        clip, times = self._columns()
        paths = pa.array([name for name, _ in self._clips], pa.string())
        # Embeddings are noise to a compressor: dictionaries for the names, plain numbers for the rest.
        dictionaries: Any = ["path", "encoder"]
        with (
            arrow_file(path, "wb") as file,
            pq.ParquetWriter(file, schema, use_dictionary=dictionaries, compression="none") as writer,
        ):
            for first, block in self._blocks(max(1, _GROUP // self._row_bytes)):
                n = len(block)
                part = slice(first, first + n)
                columns = {
                    "path": pa.DictionaryArray.from_arrays(pa.array(clip[part]), paths),
                    "start": pa.array(times[part, 0]),
                    "end": pa.array(times[part, 1]),
                    "temporal_support": pa.array([settings["temporal_support"]] * n, pa.float64()),
                    "encoder": pa.array([settings["encoder"]] * n, pa.string()).dictionary_encode(),
                }
                if embeddings:
                    columns["embedding"] = _lists(block, kind)
                writer.write_table(pa.table(columns, schema=schema))

    def _write_array(self, file: Any) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (len(self), *self.shape)})
        self._values.seek(0)
        shutil.copyfileobj(self._values, file, 1 << 20)

    def _write_npz(self, path: Path, settings: Mapping[str, Any]) -> None:
        clip, times = self._columns()
        arrays = {
            "path": np.array([name for name, _ in self._clips], np.str_)[clip],
            "start": times[:, 0],
            "end": times[:, 1],
            "failed": np.array([name for name, _ in self.failed], np.str_),
            "reason": np.array([reason for _, reason in self.failed], np.str_),
            "settings": np.array(json.dumps(settings)),
        }
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
            with archive.open(zipfile.ZipInfo("embedding.npy"), "w", force_zip64=True) as file:
                self._write_array(file)


def _lists(values: np.ndarray, kind: Any) -> Any:
    """(n, ...) as an Arrow array of n lists of fixed size, or of lists of lists."""
    import pyarrow as pa

    array = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array.cast(kind)


def read_errors(path: Path) -> list[Failure]:
    """The failures that a shard lists; ConfigError where it is damaged, as by a copy that was cut short."""
    import pyarrow.parquet as pq

    with damage_named(path):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return list(zip(arrays["failed"].tolist(), arrays["reason"].tolist(), strict=True))
        with arrow_file(path) as file:
            metadata = pq.read_schema(file).metadata or {}
        return [(name, reason) for name, reason in json.loads(metadata[_KEY])["errors"]]


def write_errors(out: Path, errors: list[Failure]) -> None:
    """errors.parquet: path and reason of every file that failed, none where none did."""
    import pyarrow as pa

    columns = {"path": [name for name, _ in errors], "reason": [reason for _, reason in errors]}
    table = pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})
    write_parquet(out / "errors.parquet", table)
