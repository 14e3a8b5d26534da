"""Audio in the rows of a Parquet file, as data sets on Hugging Face are."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import AudioError, first_line
from ..files import arrow_file

_BUFFER = 1 << 20  # bytes; without it, or with pre_buffer, pyarrow reads the column of a whole row group at once
# What a column of audio may be made of, in Arrow's words.
_BYTES = ("binary", "large_binary", "binary_view")
_TEXT = ("string", "large_string", "string_view")
_OTHERS = ("Image", "Video", "Pdf")  # features that have bytes, too
# How files of audio begin; those of MPEG-4 after four bytes of length.
_BEGINNINGS = (
    b"RIFF",
    b"RF64",
    b"fLaC",
    b"OggS",
    b"ID3",
    b"FORM",
    b".snd",
    b"caff",
    b"\xff\xfb",
    b"\xff\xf3",
    b"\xff\xf2",
)
_PICTURES = (b"WEBP", b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # which share RIFF and MPEG-4 with audio


class Row(NamedTuple):
    """A row's audio: what it is called, by its path or else its number; the row; and its size in bytes, which is the
    mean of its row group, for no list says what one by itself has."""

    name: str
    number: int
    size: int


class _Column(NamedTuple):
    """A column of audio: its name, where in the file its bytes are, and its type."""

    name: str
    place: str
    type: Any


def listed(path: Path) -> Iterator[Row]:
    """The rows of the column that Hugging Face's description in the file calls Audio; else of "audio"; else of the
    first that holds `bytes` (and `path`), as that feature does. A column "audio" may also be of bytes alone, as may one
    of another name whose first row begins as a file of audio does. Without such a column there are none.

    Raises:
        AudioError: there is a column "audio", and it is none of those, nor one of names.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with arrow_file(path) as opened, pq.ParquetFile(opened) as file:
        if (column := _audio_column(file)) is None:
            return
        sizes, number = _mean_sizes(file.metadata, column.place), 0
        i = column.type.get_field_index("path") if pa.types.is_struct(column.type) else -1
        if i < 0 or not _holds(column.type.field(i).type, _TEXT):
            yield from (Row(f"{number:08d}", number, size) for number, size in enumerate(sizes))
            return
        for batch in file.iter_batches(columns=[f"{column.name}.path"]):
            # As bytes, since nothing has checked that they are UTF-8.
            for cell in batch.column(0).field("path").cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
                name = os.path.basename(cell.decode("utf-8", "surrogateescape")) if cell else ""
                yield Row(name or f"{number:08d}", number, next(sizes))
                number += 1


class Rows:
    """The audio of a Parquet file, row by row. A row is reached through those before it in its row group, so whoever
    reads the rows part by part goes on where the last part ended."""

    def __init__(self, path: Path):
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(arrow_file(path), buffer_size=_BUFFER, pre_buffer=False)
        self._column = _audio_column(self._file)
        self._batches: Iterator[Any] = iter(())
        self._group, self._next = -1, 0  # of the row that comes next

    def read(self, numbers: Sequence[int]) -> Iterator[bytes | AudioError]:
        """The bytes of rows, in their order, or why there are none."""
        import pyarrow as pa

        if self._column is None:
            return
        waiting, end = list(reversed(numbers)), 0
        for group in range(self._file.num_row_groups):
            start, end = end, end + self._file.metadata.row_group(group).num_rows
            if not waiting or waiting[-1] >= end:
                continue
            try:
                if group != self._group or waiting[-1] < self._next:
                    # A row at a time, for it may be an hour of audio; of short ones it costs 80 us each.
                    self._batches = self._file.iter_batches(1, row_groups=[group], columns=[self._column.place])
                    self._group, self._next = group, start
                for batch in self._batches:
                    number, self._next = self._next, self._next + 1
                    if waiting[-1] != number:
                        continue
                    cell = batch.column(0)[0].as_py()
                    data = cell["bytes"] if isinstance(cell, dict) else cell
                    waiting.pop()
                    yield AudioError("no audio in its row, a name alone") if data is None else data
                    if not waiting or waiting[-1] >= end:
                        break
            except (pa.ArrowException, OSError, ValueError) as error:  # the other groups do not depend on it
                self._group = -1
                while waiting and waiting[-1] < end:
                    waiting.pop()
                    yield AudioError(f"in a part of its archive that cannot be read: {first_line(error)}")


def _audio_column(file: Any) -> _Column | None:
    schema = file.schema_arrow
    declared = _declared(schema.metadata)
    for field in sorted(schema, key=lambda field: (declared.get(field.name) != "Audio", field.name != "audio")):
        if declared.get(field.name) in _OTHERS:
            continue
        if (place := _place(field)) is not None:
            return _Column(field.name, place, field.type)
        if field.name == "audio" and not _holds(field.type, _TEXT):  # names are of files that lie elsewhere
            raise AudioError(
                f"no bytes in its column audio: it is of {field.type}; expected bytes, alone or in a struct as `bytes`"
            )
    for field in schema:
        bare = _holds(field.type, _BYTES) and declared.get(field.name) not in _OTHERS
        if bare and _begins_as_audio(file, field.name):
            return _Column(field.name, field.name, field.type)
    return None


def _begins_as_audio(file: Any, name: str) -> bool:
    """Whether the first row of a column of bytes does."""
    for batch in file.iter_batches(1, columns=[name]):
        start = (batch.column(0)[0].as_py() or b"")[:12]
        return (start.startswith(_BEGINNINGS) or start[4:8] == b"ftyp") and not start.endswith(_PICTURES)
    return False


def _declared(metadata: dict[bytes, bytes] | None) -> dict[str, str]:
    """The columns whose features Hugging Face's description in a file has, such as Audio or Image."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature["_type"] for name, feature in features.items() if "_type" in feature}
    except (LookupError, TypeError, ValueError, AttributeError):  # there is none
        return {}


def _place(field: Any) -> str | None:
    """Where in a file the bytes of a column are; None where it has none that could be files."""
    import pyarrow as pa

    if pa.types.is_struct(field.type):
        i = field.type.get_field_index("bytes")
        return f"{field.name}.bytes" if i >= 0 and _holds(field.type.field(i).type, _BYTES) else None
    return field.name if field.name == "audio" and _holds(field.type, _BYTES) else None


def _holds(kind: Any, kinds: tuple[str, ...]) -> bool:
    """Whether a type is one of these, as they are or by numbers in a dictionary."""
    import pyarrow as pa

    return str(kind.value_type if pa.types.is_dictionary(kind) else kind) in kinds


def _mean_sizes(metadata: Any, place: str) -> Iterator[int]:
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunks = map(group.column, range(group.num_columns))
        total = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == place)
        yield from itertools.repeat(total // max(1, group.num_rows), group.num_rows)
