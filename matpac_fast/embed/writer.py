"""One atomic Parquet file a shard: the embeddings, what each one saw, and the files that failed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..files import atomic

_KEY = b"matpac_fast"
Clip: TypeAlias = "tuple[str, np.ndarray, np.ndarray, np.ndarray]"  # path, start, end, values
Failure: TypeAlias = "tuple[str, str]"  # path, reason


def shard_path(out: Path, shard: int) -> Path:
    return out / f"shard-{shard:05d}.parquet"


def write_shard(
    path: Path, clips: list[Clip], failed: list[Failure], shape: tuple[int, ...], settings: Mapping[str, Any]
) -> int:
    """Write a shard, all of it or none, and return its number of rows.

    Columns: path, start and end in seconds, temporal_support in seconds (null: the whole clip), encoder (its id), and
    embedding, a list of fixed size float32, or a list of L of them with every layer. The settings and the failures
    stand in the file's metadata, so that a shard is complete in itself.

    Args:
        clips: of each, its path, start (W,) and end (W,) of its rows, and their embeddings (W, *shape) float32.
        failed: path and reason of each file that gave no rows.
        shape: of one embedding, (E,) or (L, E).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind, n_rows = pa.float32(), sum(len(values) for _, _, _, values in clips)
    for size in reversed(shape):
        kind = pa.list_(kind, size)
    columns = {
        "path": pa.array([name for name, start, _, _ in clips for _ in start], pa.string()).dictionary_encode(),
        "start": pa.chunked_array([start for _, start, _, _ in clips], pa.float64()),
        "end": pa.chunked_array([end for _, _, end, _ in clips], pa.float64()),
        "temporal_support": pa.array([settings["temporal_support"]] * n_rows, pa.float64()),
        "encoder": pa.array([settings["encoder"]] * n_rows, pa.string()).dictionary_encode(),
        # A chunk a clip: gigabytes of frames of all layers are not copied to be joined.
        "embedding": pa.chunked_array([_lists(values) for _, _, _, values in clips], kind),
    }
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps({"settings": settings, "errors": failed})})
    with atomic(path) as beside:
        # Embeddings are noise to a compressor: dictionaries for the names, plain floats for the rest.
        pq.write_table(table, beside, use_dictionary=["path", "encoder"], compression="none")  # pyright: ignore
    return n_rows


def _lists(values: np.ndarray) -> Any:
    """(W, ...) float32 as an Arrow array of W lists of fixed size, or of lists of lists."""
    import pyarrow as pa

    array = pa.array(values.reshape(-1), pa.float32())
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def read_errors(path: Path) -> list[Failure]:
    """The failures that a shard's metadata lists."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata or {}
    return [(name, reason) for name, reason in json.loads(metadata[_KEY])["errors"]]


def write_errors(out: Path, errors: list[Failure]) -> None:
    """errors.parquet: path and reason of every file that failed, none where none did."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"path": [name for name, _ in errors], "reason": [reason for _, reason in errors]}
    table = pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})
    with atomic(out / "errors.parquet") as beside:
        pq.write_table(table, beside)
