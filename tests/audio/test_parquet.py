"""Which column of a Parquet file is its audio, where several could be."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from matpac_fast.audio import archives

SOUND = b"RIFF\x24\0\0\0WAVEfmt and so on"
CELL = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def cells(data: bytes) -> pa.Array:
    return pa.array([{"bytes": data, "path": "a"}], CELL)


def bare(data: bytes) -> pa.Array:
    return pa.array([data], pa.binary())


def found(tmp_path, columns, declared=()) -> list[bytes]:
    features = {"info": {"features": {name: {"_type": "Audio"} for name in declared}}}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "x.parquet")
    inside, reason = archives.members(tmp_path / "x.parquet")
    assert reason is None
    return list(archives.contents(tmp_path / "x.parquet", inside))


def test_the_one_that_is_described_as_audio_comes_before_all_others(tmp_path):
    columns = {"other": cells(b"no"), "audio": cells(b"nor"), "speech": cells(SOUND)}
    assert found(tmp_path, columns, ["speech"]) == [SOUND]


def test_a_struct_without_bytes_is_none(tmp_path):
    kind = pa.struct({"path": pa.string(), "embedding": pa.binary()})
    assert found(tmp_path, {"other": pa.array([{"path": "a", "embedding": b"e"}], kind)}) == []


@pytest.mark.parametrize(
    "picture",
    [
        b"RIFF\x24\0\0\0WEBPVP8 ",
        b"\0\0\0\x20ftypavif\0\0\0\0",
        b"\0\0\0\x18ftypheic\0\0\0\0",
        b"\0\0\0\x18ftypmif1\0\0",
    ],
)
def test_pictures_that_begin_as_audio_does_are_told_from_it(tmp_path, picture):
    assert found(tmp_path, {"image": bare(picture)}) == []
    assert found(tmp_path, {"image": bare(picture), "sound": bare(SOUND)}) == [SOUND]


@pytest.mark.parametrize(
    "sound", [SOUND, b"\0\0\0\x1cftypM4A \0\0\0\0", b"\0\0\0\x20ftypisom\0\0\2\0", b"fLaC", b"ID3"]
)
def test_bytes_alone_are_audio_where_the_first_begin_so(tmp_path, sound):
    assert found(tmp_path, {"label": bare(b"dog"), "clip": bare(sound)}) == [sound]
