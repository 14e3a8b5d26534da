"""Cached embeddings are the encoder's, and are found again by what they depend on and by nothing else."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from matpac_fast import load_encoder
from matpac_fast.audio.decode import read_audio
from matpac_fast.errors import ConfigError
from matpac_fast.study.cache import Cache, View, fill, hash_audio, shared_audio
from matpac_fast.study.results import add_cost, read_costs
from matpac_fast.tasks import Fold, load_task
from tests.study.conftest import made_cost, save_encoder


@pytest.fixture(scope="module")
def encoder(encoder_file):
    return load_encoder(encoder_file, "cpu")


@pytest.fixture
def some(clips):
    paths = load_task(f"folder:{clips}").paths[:7]
    return paths, hash_audio(paths, 2)


def none_done(count: int) -> None:
    pass


@pytest.mark.parametrize("aggregate", ["mean", "score", "attend", "one"])
def test_rows_are_the_encoders(tmp_path, encoder, some, aggregate):
    paths, audio = some
    cache = Cache(tmp_path, encoder, View(0.3, aggregate=aggregate))
    fill([cache], audio, paths, 1, none_done)
    order = [3, 0, 6, 3]
    rows = cache.read([audio[i] for i in order])
    for number, i in enumerate(order):
        wave = read_audio(paths[i])
        if aggregate == "one":
            expected, seconds = encoder.embed(wave[5600:10400], 16_000).values, torch.tensor([0.3])
        else:
            found = encoder.embed(wave, 16_000, 0.3)
            expected, seconds = found.values, torch.tensor([0.3, 0.3, 0.3, 0.1])
            if aggregate == "mean":  # the last window counts a third of another
                expected, seconds = (expected * seconds[:, None]).sum(0, keepdim=True), torch.tensor([1.0])
        assert torch.allclose(rows.values[rows.clip == number], expected, atol=1e-5)
        assert np.allclose(rows.seconds[rows.clip == number], seconds)


@pytest.mark.parametrize("hop", [None, 0.2])
def test_of_a_clip_of_any_length_the_mean_counts_windows_by_their_seconds(tmp_path, encoder, hop):
    wave = np.random.default_rng(0).normal(0, 0.1, 12_000).astype(np.float32)  # 0.75 s
    found = encoder.embed(wave, 16_000, 0.5, hop)
    assert len(found) == (2 if hop is None else 3)
    seen = found.end - found.start
    ((values, seconds),) = Cache(tmp_path, encoder, View(0.5, hop, aggregate="mean")).embed([wave])
    torch.testing.assert_close(values, (seen[:, None] * found.values).sum(0, keepdim=True).float() / seen.sum().float())
    assert seconds.tolist() == pytest.approx([seen.sum().item()])
    ((values, _),) = Cache(tmp_path, encoder, View(0.5, hop, aggregate="score")).embed([wave])
    torch.testing.assert_close(values, found.values)
    ((values, seconds),) = Cache(tmp_path, encoder, View(0.5, hop, aggregate="one")).embed([wave])
    torch.testing.assert_close(values, encoder.embed(wave[2_000:10_000], 16_000).values)
    assert seconds.tolist() == [0.5]


@pytest.mark.parametrize("remainder", ["keep", "pad", "merge", "drop"])
def test_the_end_of_a_clip_is_treated_as_the_view_says(tmp_path, encoder, remainder):
    wave = np.random.default_rng(0).normal(0, 0.1, 12_000).astype(np.float32)
    cache = Cache(tmp_path, encoder, View(0.5, remainder=remainder, aggregate="score"))
    [(values, seconds)] = cache.embed([wave])
    want = encoder.embed(wave, encoder.sample_rate, 0.5, remainder=remainder)
    torch.testing.assert_close(values, want.values)
    assert seconds.tolist() == (want.end - want.start).tolist()


def test_what_is_there_is_not_embedded_again_under_whatever_name(tmp_path, encoder, some, monkeypatch):
    paths, audio = some
    views = [View(0.3), View(0.5)]
    told: list[int] = []
    fill([Cache(tmp_path / "e", encoder, view) for view in views], audio, paths, 1, told.append)
    assert sum(told) == 14
    moved = [shutil.copy(path, tmp_path / f"{i}.bin") for i, path in enumerate(paths)]
    assert hash_audio(moved, 2) == audio
    told.clear()
    monkeypatch.setattr(type(encoder), "embed_many", lambda *_, **__: pytest.fail("embedded again"))
    fill([Cache(tmp_path / "e", encoder, view) for view in views], hash_audio(moved, 2), moved, 1, told.append)
    assert sum(told) == 14


def test_an_encoder_whose_code_changes_is_another(tmp_path, encoder, monkeypatch):
    text = """
import matpac_fast as mf

class Peak(mf.AudioEncoder):
    embedding_dim, settings = 1, {"kind": "peak"}

    def forward_pieces(self, pieces, pool, layers):
        return pieces.amax(1)[:, None, None]
"""
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for name, source in (("one", text), ("same", text), ("other", text.replace("amax", "amin"))):
        (tmp_path / f"peak_{name}.py").write_text(source)
        module = importlib.import_module(f"peak_{name}")
        keys.append({**Cache(tmp_path, module.Peak(), View(0.3)).settings, "encoder_class": ""})
    assert keys[0] == keys[1] != keys[2]
    assert "code" not in Cache(tmp_path, encoder, View(0.3)).settings  # its version tells


def test_a_clip_that_nobody_has_embedded_is_an_error(tmp_path, encoder, some):
    paths, audio = some
    cache = Cache(tmp_path, encoder, View(0.3))
    with pytest.raises(ConfigError, match=r"1 of 1 clips, such as that of SHA-256 .* have no embedding"):
        cache.read(audio[:1])
    fill([cache], audio[:5], paths[:5], 1, none_done)
    with pytest.raises(ConfigError, match=f"2 of 7 clips, such as that of SHA-256 {min(audio[5:])}, have no embedding"):
        cache.read(audio)


def test_other_tasks_embeddings_are_not_read(tmp_path, encoder, some):
    paths, audio = some
    cache = Cache(tmp_path, encoder, View(0.3))
    for part in (slice(4), slice(4, 7)):
        fill([cache], audio[part], paths[part], 1, none_done)
    wanted = cache.read(audio[:4])
    for path in cache.folder.glob("part-*.parquet"):
        with pq.ParquetFile(path) as file:
            table = file.read()
        if not set(table["audio"].to_pylist()) & set(audio[:4]):
            pq.write_table(table.drop_columns(["embedding"]), path)  # to be known it needs no embeddings
    assert torch.equal(cache.read(audio[:4]).values, wanted.values)
    assert cache.known() == set(audio)


@pytest.mark.parametrize("aggregate", ["mean", "score"])
def test_a_clip_that_two_processes_embedded_is_read_once(tmp_path, encoder, some, aggregate):
    paths, audio = some
    once, twice = (Cache(tmp_path / name, encoder, View(0.3, aggregate=aggregate)) for name in ("once", "twice"))
    for cache in (once, twice):
        fill([cache], audio, paths, 1, none_done)
    for part in (slice(2, 5), slice(4, 5)):
        twice.write(audio[part], twice.embed([read_audio(path) for path in paths[part]]))
    assert len(list(twice.folder.glob("part-*.parquet"))) == 3
    wanted, rows = once.read(audio[1:]), twice.read(audio[1:])
    assert rows.clip.tolist() == wanted.clip.tolist()
    assert torch.allclose(rows.values, wanted.values, atol=1e-5)


def test_the_key_is_all_that_embeddings_depend_on(tmp_path, encoder, encoder_file, monkeypatch):
    base = Cache(tmp_path, encoder, View(0.5)).key
    others = [
        Cache(tmp_path, encoder, view).key
        for view in (View(0.6), View(0.5, 0.25), View(0.5, remainder="drop"), View(0.5, aggregate="score"))
    ]
    other = load_encoder(save_encoder(tmp_path / encoder_file.name, seed=1), "cpu")  # the same name
    assert other.name == encoder.name
    others.append(Cache(tmp_path, other, View(0.5)).key)
    others.append(Cache(tmp_path, load_encoder(encoder_file, "cpu", dtype="bfloat16"), View(0.5)).key)
    assert len({base, *others}) == 1 + len(others)
    copy = load_encoder(shutil.copy(encoder_file, tmp_path / "copy.safetensors"), "cpu")
    assert Cache(tmp_path, copy, View(0.5)).key == base
    copy.dtype = torch.bfloat16  # of the products, where weights are as they were
    assert Cache(tmp_path, copy, View(0.5)).key != base
    monkeypatch.setattr("matpac_fast.study.cache.decoder_versions", lambda: {"libsndfile": "0"})
    assert Cache(tmp_path, encoder, View(0.5)).key != base


def test_shares_of_several_processes_are_apart_and_whole(tmp_path, encoder, some, monkeypatch):
    paths, audio = some
    monkeypatch.setattr("matpac_fast.study.cache._CLIPS", 2)
    known = []
    for rank in range(2):
        cache = Cache(tmp_path / str(rank), encoder, View(0.5))
        fill([cache], audio, paths, 1, none_done, (rank, 2))
        known.append(cache.known())
    assert not known[0] & known[1]
    assert known[0] | known[1] == set(audio)
    assert min(map(len, known)) > 0


def test_a_process_that_looks_late_leaves_nothing_to_nobody(tmp_path, encoder, some, monkeypatch):
    paths, audio = some
    monkeypatch.setattr("matpac_fast.study.cache._CLIPS", 2)
    for rank in (2, 0, 1):  # each sees what those before it have embedded
        fill([Cache(tmp_path, encoder, View(0.5))], audio, paths, 1, none_done, (rank, 3))
    assert Cache(tmp_path, encoder, View(0.5)).known() == set(audio)


def test_copies_across_a_split_are_counted():
    audio = ["a", "b", "c", "a", "d"]
    import numpy as np

    fold = Fold(np.array([0, 1]), np.array([3, 4]), np.array([2]))
    assert shared_audio(audio, [fold]) == 1


@pytest.mark.parametrize("name", ["file:", "s3:x", os.fsdecode(b"\xff")])
def test_any_name_does_for_a_folder(tmp_path, encoder, some, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    paths, audio = some
    cache = Cache(Path(name), encoder, View(0.3))
    fill([cache], audio, paths, 1, none_done)
    assert cache.known() == set(audio)
    assert len(cache.read(audio).values) == len(paths)
    add_cost(Path(name, "cost.parquet"), made_cost(1.0))
    assert read_costs(Path(name, "cost.parquet")) == [made_cost(1.0)]
    assert [path.name for path in tmp_path.iterdir()] == [name]
