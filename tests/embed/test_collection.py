"""Embedding a collection: right rows, resumable, atomic, failures named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from matpac_fast import cli
from matpac_fast.embed import worker, writer
from matpac_fast.embed.extract import embed_collection
from matpac_fast.errors import AudioError, ConfigError
from matpac_fast.vit_encoder import Encoder

RATE = 16_000
SMALL = dict(n_frames=64, width=32, depth=2, num_heads=2)


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory) -> Path:
    import torch

    encoder = Encoder(**SMALL)
    generator = torch.Generator().manual_seed(0)
    for p in encoder.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    path = tmp_path_factory.mktemp("encoder") / "small.safetensors"
    encoder.save(path)
    return path


@pytest.fixture
def encoder(encoder_file) -> Encoder:
    from matpac_fast import load_encoder

    return load_encoder(encoder_file, "cpu")


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    """Five good files of different lengths, rates and depths in the tree, and three that cannot be used."""
    folder = tmp_path_factory.mktemp("audio")
    random = np.random.default_rng(0)
    for i, (seconds, rate, channels) in enumerate(
        [(2.3, RATE, 1), (0.01, RATE, 1), (1.0, 44_100, 2), (3.1, 8_000, 1), (2.3, RATE, 1)]
    ):
        path = folder / ("sub" if i % 2 else ".") / f"good {i}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, random.normal(0, 0.1, (round(seconds * rate), channels)), rate)
    (folder / "empty.wav").touch()
    (folder / "page.mp3").write_text("<html>not found</html>")
    soundfile.write(folder / "nan.wav", np.full(800, np.nan), RATE, subtype="FLOAT")
    return folder


def rows(out: Path) -> list[dict]:
    return [row for shard in sorted(out.glob("shard-*.parquet")) for row in pq.read_table(shard).to_pylist()]


def test_seconds_may_be_numbers_of_numpys(collection, encoder, tmp_path):
    embed_collection(collection, tmp_path, encoder, np.int64(1), np.float32(0.5))
    assert embed_collection(collection, tmp_path, encoder, 1.0, 0.5).before == 8
    assert {row["temporal_support"] for row in rows(tmp_path)} == {1.0}


@pytest.mark.parametrize(("pool", "layers"), [("mean", "last"), ("none", "last"), ("mean", "all")])
def test_rows_are_what_the_encoder_gives(collection, encoder, tmp_path, pool, layers):
    from matpac_fast.audio.decode import read_audio

    report = embed_collection(collection, tmp_path, encoder, 1.0, pool=pool, layers=layers, files_per_shard=3)
    got = rows(tmp_path)
    assert (report.total, report.failed, report.rows) == (8, 3, len(got))
    for name in {row["path"] for row in got}:
        mine = [row for row in got if row["path"] == name]
        want = encoder.embed(read_audio(collection / name), RATE, 1.0, pool=pool, layers=layers)
        np.testing.assert_allclose([r["embedding"] for r in mine], want.values.numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose([[r["start"], r["end"]] for r in mine], np.stack([want.start, want.end], 1))
        assert {(r["temporal_support"], r["encoder"]) for r in mine} == {(1.0, encoder.id)}
    errors = {row["path"]: row["reason"] for row in pq.read_table(tmp_path / "errors.parquet").to_pylist()}
    assert set(errors) == {"empty.wav", "page.mp3", "nan.wav"}
    assert "0 bytes" in errors["empty.wav"]
    assert "not finite" in errors["nan.wav"]
    column = pq.read_schema(tmp_path / "shard-00000.parquet").field("embedding").type
    assert column.list_size == (2 if layers == "all" else 160)


def test_the_metadata_says_how_they_were_made(collection, encoder, tmp_path):
    embed_collection(collection, tmp_path, encoder)
    shard = json.loads(pq.read_schema(tmp_path / "shard-00000.parquet").metadata[b"matpac_fast"])
    versions = shard["settings"].pop("made_by")
    assert {"matpac_fast", "torch", "numpy"} <= set(versions)
    assert shard["settings"] == json.loads((tmp_path / "settings.json").read_text())
    assert shard["settings"]["channels"] == "mean"
    assert shard["settings"]["encoder"] == encoder.id
    assert {"soundfile", "libsndfile", "soxr", "quality"} <= set(shard["settings"]["decoder"])


def snapshot(out: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(out.glob("shard-*"))}


def test_again_changes_nothing_and_new_files_open_new_shards(collection, encoder, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(collection, source)
    embed_collection(source, out, encoder, files_per_shard=3)
    before = snapshot(out)
    report = embed_collection(source, out, encoder, files_per_shard=3)
    assert (report.before, report.files, report.rows, report.failed) == (8, 0, 0, 3)
    assert snapshot(out) == before
    shutil.copy(source / "good 0.wav", source / "A new one.wav")
    report = embed_collection(source, out, encoder, files_per_shard=3)
    assert report.rows == 1
    assert {name: value for name, value in snapshot(out).items() if name in before} == before


def test_a_lost_shard_is_made_again_alike(collection, encoder, tmp_path):
    embed_collection(collection, tmp_path, encoder, 0.5, files_per_shard=2)
    before = {name: data for name, (data, _) in snapshot(tmp_path).items()}
    (tmp_path / "shard-00001.parquet").unlink()
    embed_collection(collection, tmp_path, encoder, 0.5, files_per_shard=2)
    assert {name: data for name, (data, _) in snapshot(tmp_path).items()} == before


def test_other_settings_are_refused(collection, encoder, tmp_path):
    embed_collection(collection, tmp_path, encoder, 1.0)
    with pytest.raises(
        ConfigError, match=r"holds other embeddings: temporal_support is 1.0 there and 0.5 here; give a new"
    ):
        embed_collection(collection, tmp_path, encoder, 0.5)


def test_nothing_is_written_for_what_cannot_be(collection, encoder, tmp_path):
    for options, message in (
        ({"temporal_support": -1.0}, "temporal_support is -1"),
        ({"pool": "max"}, "pool is 'max'"),
        ({"files_per_shard": 0}, "files_per_shard is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"max_errors": -1}, "max_errors is -1; expected 0 or more"),
        ({"hop": 1.0}, "hop is 1.0 s without a temporal_support"),
    ):
        with pytest.raises(ConfigError, match=message):
            embed_collection(collection, tmp_path / "out", encoder, **options)
    (tmp_path / "none").mkdir()
    with pytest.raises(AudioError, match="no audio files in this folder"):
        embed_collection(tmp_path / "none", tmp_path / "out", encoder)
    with pytest.raises(AudioError, match="no such folder"):
        embed_collection(tmp_path / "nowhere", tmp_path / "out", encoder)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_half_shard(collection, encoder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "atomic", full)
    with pytest.raises(OSError, match="No space left"):
        embed_collection(collection, tmp_path, encoder)
    assert not list(tmp_path.glob("shard-*"))
    monkeypatch.undo()
    assert embed_collection(collection, tmp_path, encoder).rows == 5


def test_a_name_that_is_no_utf8_is_a_row_in_the_errors(encoder, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    soundfile.write(source / "a.wav", np.zeros(800), RATE)
    os.rename(source / "a.wav", os.fsencode(source) + b"/\xff.wav")
    soundfile.write(source / "b.wav", np.zeros(800), RATE)
    report = embed_collection(source, tmp_path / "out", encoder)
    assert (report.total, report.failed, report.rows) == (2, 1, 1)
    (error,) = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert error == {"path": "\\xff.wav", "reason": "the name is not UTF-8: rename the file"}


def test_what_cannot_be_a_file_comes_and_goes_with_a_source_that_is_otherwise_the_same(collection, encoder, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(collection / "sub", source)
    before = embed_collection(source, out, encoder)
    assert (before.total, before.failed) == (2, 0)
    (source / "more.tar.gz").write_bytes(b"\x1f\x8b")
    report = embed_collection(source, out, encoder)
    assert (report.total, report.failed, report.rows) == (3, 1, 0)
    assert pq.read_table(out / "errors.parquet")["path"].to_pylist() == ["more.tar.gz"]
    (source / "more.tar.gz").unlink()
    assert embed_collection(source, out, encoder).failed == 0
    assert pq.read_table(out / "errors.parquet").num_rows == 0


def test_files_that_failed_before_count_among_the_errors_allowed(collection, encoder, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(collection, source)
    assert embed_collection(source, out, encoder).failed == 3
    (source / "one more.wav").touch()
    report = embed_collection(source, out, encoder, max_errors=3)
    assert (report.stopped, report.files) == (True, 1)
    assert len(list(out.glob("shard-*"))) == 1
    assert not embed_collection(source, out, encoder, max_errors=4).stopped


def test_a_file_that_a_list_names_twice_is_embedded_once(collection, encoder, tmp_path):
    (collection / "list.txt").write_text("good 0.wav\nsub/good 3.wav\n./good 0.wav\nsub//good 3.wav\ngood 0.wav\n")
    report = embed_collection(collection / "list.txt", tmp_path, encoder, 1.0)
    assert (report.total, report.files, report.rows) == (2, 2, 7)
    assert [row["path"] for row in rows(tmp_path)] == ["sub/good 3.wav"] * 4 + ["good 0.wav"] * 3


def test_a_folder_that_cannot_be_read_is_a_row_in_the_errors(collection, encoder, tmp_path, monkeypatch):
    scandir = os.scandir

    def guarded(path):
        if os.path.basename(path) == "sub":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)  # file modes do not stop root
    report = embed_collection(collection, tmp_path, encoder)
    assert (report.total, report.failed) == (7, 4)
    errors = {row["path"]: row["reason"] for row in pq.read_table(tmp_path / "errors.parquet").to_pylist()}
    assert errors["sub"] == "folder cannot be read: Permission denied"


def test_files_share_batches(encoder, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(10):
        soundfile.write(source / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, RATE), RATE)
    batches = []
    forward = encoder.forward_groups
    monkeypatch.setattr(
        encoder, "forward_groups", lambda g, *rest: (batches.append(sum(map(len, g))), forward(g, *rest))[1]
    )
    report = embed_collection(source, tmp_path / "out", encoder, 0.5, batch_size=16)
    assert batches == [1, 16, 4]  # the first asks what an embedding looks like
    assert (report.rows, report.audio_seconds) == (20, 10.0)
    assert report.model_seconds > 0
    assert [row["path"] for row in rows(tmp_path / "out")] == [f"{i // 2}.wav" for i in range(20)]


def test_a_system_that_pins_no_process_to_cores_embeds_too(collection, encoder, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    assert embed_collection(collection, tmp_path, encoder).rows == 5


def test_what_was_the_limit_is_said():
    assert worker.Report(model_seconds=2.0, waited_seconds=1.0).limit == "the model"
    assert worker.Report(model_seconds=1.0, waited_seconds=2.0).limit == "decoding"


@pytest.mark.parametrize(("keep", "code"), [("*.wav", 0), ("good*", 0), ("page.mp3", 3)])
def test_exit_codes_and_what_is_said(collection, encoder_file, tmp_path, capsys, keep, code):
    source = tmp_path / "source"
    source.mkdir()
    for path in collection.glob(keep):
        shutil.copy(path, source)
    command = ["embed", str(source), "--encoder", str(encoder_file), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(command) == code
    said = capsys.readouterr().out
    assert ("could not be used" in said) == (keep != "good*")
    assert ("times real time" in said) == (code == 0)
