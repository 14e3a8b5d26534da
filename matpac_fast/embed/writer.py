"""One atomic Parquet file a shard: the embeddings, what each one saw, and the files that failed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic

_KEY = b"matpac_fast"


def shard_path(out: Path, shard: int) -> Path:
    return out / f"shard-{shard:05d}.parquet"


def write_shard(
    path: Path,
    names: list[str],
    start: np.ndarray,
    end: np.ndarray,
    values: np.ndarray,
    settings: Mapping[str, Any],
    errors: list[tuple[str, str]],
) -> None:
    """Write a shard, all of it or none.

    Columns: path, start and end in seconds, temporal_support in seconds (null: the whole clip), encoder (its id), and
    embedding, a list of fixed size float32, or a list of L of them with every layer. The settings and the failures
    stand in the file's metadata, so that a shard is complete in itself.

    Args:
        names, start, end: of each row, (N,).
        values: (N, E) or (N, L, E) float32.
        errors: path and reason of each file that gave no rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array(values.reshape(-1), pa.float32())
    for size in reversed(values.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    columns = {
        "path": pa.array(names, pa.string()).dictionary_encode(),
        "start": pa.array(start, pa.float64()),
        "end": pa.array(end, pa.float64()),
        "temporal_support": pa.array([settings["temporal_support"]] * len(names), pa.float64()),
        "encoder": pa.array([settings["encoder"]] * len(names), pa.string()).dictionary_encode(),
        "embedding": column,
    }
    table = pa.table(columns).replace_schema_metadata({_KEY: json.dumps({"settings": settings, "errors": errors})})
    with atomic(path) as beside:
        # Embeddings are noise to a compressor: dictionaries for the names, plain floats for the rest.
        pq.write_table(table, beside, use_dictionary=["path", "encoder"], compression="none")  # pyright: ignore


def read_errors(path: Path) -> list[tuple[str, str]]:
    """The failures that a shard's metadata lists."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(path).metadata or {}
    return [(name, reason) for name, reason in json.loads(metadata[_KEY])["errors"]]


def write_errors(out: Path, errors: list[tuple[str, str]]) -> None:
    """errors.parquet: path and reason of every file that failed, none where none did."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"path": [name for name, _ in errors], "reason": [reason for _, reason in errors]}
    table = pa.table({name: pa.array(column, pa.string()) for name, column in columns.items()})
    with atomic(out / "errors.parquet") as beside:
        pq.write_table(table, beside)
