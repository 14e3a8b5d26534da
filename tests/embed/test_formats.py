"""Formats and number types: the same rows in each, resumed in each, and what does not fit is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from torch import Tensor

from matpac_fast.embed.extract import embed_collection
from matpac_fast.embed.writer import FORMATS, Rows, read_errors, shard_path
from matpac_fast.errors import ConfigError
from tests.embed import crew


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    for i, n in enumerate((3_000, 800, 2_100)):
        soundfile.write(folder / f"é {i}.wav", crew.noise(n, seed=i), 8_000)
    (folder / "empty.wav").touch()
    return folder


def read(out: Path, kind: str) -> dict[str, np.ndarray]:
    """What is in a folder, as its documentation says to read it."""
    found: list[dict[str, np.ndarray]] = []
    for i in range(2):
        stem = out / f"shard-{i:05d}"
        if kind == "npz":
            with np.load(f"{stem}.npz", allow_pickle=False) as arrays:
                found.append({name: arrays[name] for name in ("path", "start", "end", "embedding")})
            continue
        table = pq.read_table(f"{stem}.parquet" if kind == "parquet" else f"{stem}.index.parquet")
        rows = {name: np.array(table[name].to_pylist()) for name in ("path", "start", "end")}
        if kind == "npy":
            rows["embedding"] = np.load(f"{stem}.npy", mmap_mode="r")
        else:
            rows["embedding"] = np.array(table["embedding"].to_pylist()).reshape(len(table), *shape_of(table))
        found.append(rows)
    return {name: np.concatenate([rows[name] for rows in found]) for name in found[0]}


def shape_of(table: pa.Table) -> list[int]:
    kind, shape = table.schema.field("embedding").type, []
    while isinstance(kind, pa.FixedSizeListType):
        shape.append(kind.list_size)
        kind = kind.value_type
    return shape


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("kind", ["parquet", "npz", "npy"])
def test_all_formats_hold_the_same_rows(source, tmp_path, kind, layers, dtype):
    options = dict(files_per_shard=2, format=kind, dtype=dtype, layers=layers)
    report = embed_collection(source, tmp_path, crew.Tiny(), 0.1, **options)
    got = read(tmp_path, kind)
    clips = [
        (name, crew.Tiny().embed(source / name, None, 0.1, layers=layers)) for name in ("é 0.wav", "é 2.wav", "é 1.wav")
    ]
    assert got["path"].tolist() == [name for name, found in clips for _ in range(len(found))]
    np.testing.assert_allclose(got["start"], torch.cat([found.start for _, found in clips]))
    np.testing.assert_allclose(got["end"], torch.cat([found.end for _, found in clips]))
    want = torch.cat([found.values for _, found in clips]).numpy()
    assert got["embedding"].shape == want.shape
    np.testing.assert_allclose(got["embedding"], want, rtol=1e-6 if dtype == "float32" else 1e-3)
    assert report.rows == len(want)

    # Done is done, in every format, and the failures are known from the shards alone.
    before = crew.result(tmp_path)
    (tmp_path / "errors.parquet").unlink()
    again = embed_collection(source, tmp_path, crew.Tiny(), 0.1, **options)
    assert (again.files, again.before, again.failed) == (0, 4, 1)
    assert crew.result(tmp_path) == before


@pytest.mark.parametrize(("kind", "lost"), [("npz", "shard-00000.npz"), ("npy", "shard-00000.index.parquet")])
def test_a_lost_shard_is_made_again_alike(source, tmp_path, kind, lost):
    options = dict(files_per_shard=2, format=kind)
    embed_collection(source, tmp_path, crew.Tiny(), 0.1, **options)
    before = crew.result(tmp_path)
    (tmp_path / lost).unlink()
    embed_collection(source, tmp_path, crew.Tiny(), 0.1, **options)
    assert crew.result(tmp_path) == before


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("size", [0, 300])
def test_a_shard_that_was_cut_short_is_named_with_what_to_do(source, tmp_path, kind, size):
    out = tmp_path / "out"
    embed_collection(source, out, crew.Tiny(), 0.1, format=kind)
    before, shard = crew.result(out), shard_path(out, 0, kind)
    os.truncate(shard, size)
    with pytest.raises(ConfigError, match=r"shard-00000.*: damaged \(.*\): remove it and run the same again"):
        embed_collection(source, out, crew.Tiny(), 0.1, format=kind)
    shard.unlink()
    embed_collection(source, out, crew.Tiny(), 0.1, format=kind)
    assert crew.result(out) == before


def test_damage_of_which_its_reader_says_nothing_is_named_too(tmp_path, monkeypatch):
    def load(*_: object, **options: object) -> None:
        raise EOFError  # without words, as zipfile where an archive says more bytes than there are

    monkeypatch.setattr(np, "load", load)
    with pytest.raises(ConfigError, match=r"shard-00000.npz: damaged \(EOFError\): remove it"):
        read_errors(shard_path(tmp_path, 0, "npz"))


def test_the_types_in_the_files_are_the_ones_asked_for(source, tmp_path):
    for kind in ("parquet", "npz", "npy"):
        embed_collection(source, tmp_path / kind, crew.Tiny(), 0.1, format=kind, dtype="float16")
    field = pq.read_schema(tmp_path / "parquet" / "shard-00000.parquet").field("embedding").type
    assert field.value_type == pa.float16()
    assert np.load(tmp_path / "npz" / "shard-00000.npz")["embedding"].dtype == np.float16
    assert np.load(tmp_path / "npy" / "shard-00000.npy").dtype == np.float16
    settings = json.loads(str(np.load(tmp_path / "npz" / "shard-00000.npz")["settings"]))
    assert (settings["dtype"], settings["format"], settings["temporal_support"]) == ("float16", "npz", 0.1)


class Loud(crew.Tiny):
    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        found = super().forward_pieces(pieces, pool, layers)
        return found * 1e7 if pieces.shape[-1] == 800 else found


@pytest.mark.parametrize(("dtype", "failed"), [("float32", 1), ("float16", 4)])
def test_numbers_that_cannot_be_stored_are_a_failed_file(source, tmp_path, dtype, failed):
    report = embed_collection(source, tmp_path, Loud(), 0.1, dtype=dtype)
    errors = {row["path"]: row["reason"] for row in pq.read_table(tmp_path / "errors.parquet").to_pylist()}
    assert report.failed == len(errors) == failed
    if dtype == "float16":
        assert errors["é 1.wav"] == "its embeddings are not finite in float16"
        assert report.rows == 0


def test_what_is_not_offered_is_refused(source, tmp_path):
    for options, message in (
        (dict(dtype="int8"), "dtype is 'int8'; expected one of float32, float16"),
        (dict(format="csv"), "format is 'csv'; expected one of parquet, npz, npy"),
        (dict(shard_seconds=0), "shard_seconds is 0"),
        (dict(lease_seconds=0), "lease_seconds is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            embed_collection(source, tmp_path / "out", crew.Tiny(), **options)
    assert not (tmp_path / "out").exists()
    embed_collection(source, tmp_path / "out", crew.Tiny())
    with pytest.raises(ConfigError, match="format is 'parquet' there and 'npz' here; give a new folder to --out"):
        embed_collection(source, tmp_path / "out", crew.Tiny(), format="npz")


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_written_of_a_file_that_failed(tmp_path, kind):
    written = []
    for failing in (False, True):
        rows = Rows(tmp_path, (2,))
        rows.add(np.zeros(1), np.ones(1), np.ones((1, 2)))
        rows.keep("good.wav")
        if failing:
            rows.add(np.zeros(9), np.ones(9), np.full((9, 2), 5.0))
        rows.drop("bad.wav", "damaged")
        rows.write(tmp_path / str(failing), 0, kind, {"temporal_support": None, "encoder": "e"})
        rows.close()
        written.append(crew.result(tmp_path / str(failing)))
    assert written[0] == written[1]


def test_after_a_file_that_is_not_finite_others_are_kept(tmp_path):
    rows = Rows(tmp_path, (1,))
    reasons = []
    for value in (np.inf, 1.0):
        rows.add(np.zeros(1), np.ones(1), np.full((1, 1), value))
        reasons.append(rows.keep(f"{value}.wav"))
    assert reasons == ["its embeddings are not finite in float32", None]
    assert len(rows) == 1
    rows.close()
