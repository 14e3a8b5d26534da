"""Reading a corpus: the right samples, nothing opened before it is needed, and clear errors for what is broken."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import pickle
import re
import resource
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from matpac_fast.audio import corpus as corpus_module
from matpac_fast.audio.corpus import Corpus, to_int16
from matpac_fast.audio.prepare import prepare
from matpac_fast.errors import AudioError, ConfigError, CorpusError

RATE = 16_000
LENGTHS = (4000, 16_000, 2500, 9000, 12_345, 8000, 3000)


@pytest.fixture(scope="module")
def waves() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(-20_000, 20_000, n).astype(np.int16) for n in LENGTHS]


def prepared(place: Path, waves: list[np.ndarray], rate: int = RATE) -> Path:
    (place / "source").mkdir(parents=True)
    for i, wave in enumerate(waves):
        soundfile.write(place / "source" / f"{i}.wav", wave, rate)
    prepare(place / "source", place / "corpus", sample_rate=rate, shard_seconds=1.0)
    return place / "corpus"


@pytest.fixture
def folder(tmp_path, waves):
    return prepared(tmp_path, waves)


@pytest.fixture
def folders(tmp_path, waves):
    return [prepared(tmp_path / f"part-{i}", part) for i, part in enumerate((waves[:3], waves[3:4], waves[4:]))]


@pytest.fixture(params=["folder", "folders", "memory"])
def corpus(request, waves):
    if request.param == "memory":
        return Corpus.from_arrays(waves)
    where = request.getfixturevalue(request.param)
    return Corpus(*where) if request.param == "folders" else Corpus(where)


def test_it_holds_the_clips(corpus, waves):
    assert len(corpus) == len(waves)
    assert corpus.sample_rate == RATE
    assert corpus.frames.tolist() == list(LENGTHS)
    assert corpus.frames.dtype == np.int64
    assert corpus.seconds == pytest.approx(sum(LENGTHS) / RATE)
    for i, wave in enumerate(waves):
        np.testing.assert_array_equal(corpus.read(i), wave)
        np.testing.assert_array_equal(corpus.read(i, 100), wave[100:])
        np.testing.assert_array_equal(corpus.read(i, 100, 50), wave[100:150])
    assert len(corpus.read(0, LENGTHS[0])) == 0


def test_names_are_the_source_files(folder):
    corpus = Corpus(folder)
    assert corpus.paths == [f"{i}.wav" for i in range(len(LENGTHS))]
    assert corpus.paths[2] == "2.wav"
    assert Corpus.from_arrays([np.zeros(4, np.int16)], paths=["a"]).paths == ["a"]


def test_folders_are_one_corpus(folders, tmp_path, waves):
    corpus = Corpus(*folders)
    assert (corpus.folders, corpus.sizes) == (tuple(folders), (3, 1, 3))
    assert corpus.paths[2:5] == [f"{folders[0]}/2.wav", f"{folders[1]}/0.wav", f"{folders[2]}/0.wav"]
    others = [Corpus(*folders[:2]), Corpus(*reversed(folders)), Corpus(folders[0])]
    assert len({each.fingerprint for each in (corpus, *others)}) == 4
    shutil.copytree(folders[1], tmp_path / "moved")
    empty = tmp_path / "empty"
    shutil.copytree(folders[1], empty)
    pq.write_table(pq.read_table(empty / "index.parquet")[:0], empty / "index.parquet")
    assert Corpus(empty, *folders).frames.tolist() == corpus.frames.tolist()
    assert Corpus(empty, *folders).fingerprint != Corpus(*folders, empty).fingerprint  # --visits would tell them apart
    assert Corpus(folders[0], tmp_path / "moved", folders[2]).fingerprint == corpus.fingerprint
    assert Corpus(tmp_path / "moved").paths == ["0.wav"]


def test_a_broken_shard_is_named_in_its_own_folder(folders):
    corpus = Corpus(*folders)
    (shard,) = folders[1].glob("shards/*.i16")
    shard.write_bytes(shard.read_bytes()[:-2])
    corpus.gather([0, 4], [0, 0], 2_000)
    with pytest.raises(CorpusError, match=re.escape(f"{shard}: {2 * LENGTHS[3] - 2} bytes, the index needs")):
        corpus.gather([3], [0], 2_000)


def test_folders_that_make_no_corpus_together_are_named(folders, tmp_path, waves):
    (tmp_path / "link").symlink_to(folders[0])
    with pytest.raises(ConfigError, match=r"part-0/corpus and \S*link are one corpus; expected each once"):
        Corpus(*folders, tmp_path / "link")
    other = prepared(tmp_path / "other", waves[:1], rate=8_000)
    with pytest.raises(
        ConfigError, match=r"part-0/corpus at 16000 Hz, \S*other/corpus at 8000 Hz: expected one sample"
    ):
        Corpus(folders[0], other)


def test_gather_cuts_crops_out_of_any_shard(corpus, waves):
    random = np.random.default_rng(1)
    indices = random.integers(0, len(waves), 200)
    starts = random.integers(0, np.array(LENGTHS)[indices] - 2500 + 1)
    crops = corpus.gather(indices, starts, 2500)
    assert crops.dtype == np.int16
    np.testing.assert_array_equal(crops, [waves[i][s : s + 2500] for i, s in zip(indices, starts, strict=True)])
    out = np.full((200, 2500), 7, np.int16)
    assert corpus.gather(indices.tolist(), starts.tolist(), 2500, out=out) is out
    np.testing.assert_array_equal(out, crops)
    assert corpus.gather([], [], 2500).shape == (0, 2500)


@pytest.mark.parametrize(("index", "start", "n"), [(0, 0, 4001), (0, -1, 10), (0, 4000, 1), (1, 16_001, 0), (0, 5, -1)])
def test_samples_beyond_a_clip_are_refused(corpus, index, start, n):
    with pytest.raises(IndexError):
        corpus.read(index, start, n)
    with pytest.raises(IndexError):
        corpus.gather([1, index], [0, start], n)
    with pytest.raises(IndexError):
        corpus.read(len(corpus))


def test_what_is_read_is_the_callers_own(corpus, waves):
    corpus.read(3)[:] = 1
    np.testing.assert_array_equal(corpus.read(3), waves[3])


def test_shards_are_opened_when_needed_and_once(folder, monkeypatch):
    opened, real_open = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *args: (opened.append(Path(path).name), real_open(path, *args))[1])
    corpus = Corpus(folder)
    opened.clear()
    corpus.read(0)
    corpus.read(1)
    assert opened == ["00000.i16"]
    for _ in range(2):
        corpus.gather(np.arange(len(corpus)), np.zeros(len(corpus), int), 10)
    assert opened == ["00000.i16", "00001.i16", "00002.i16"]


def test_it_can_be_sent_to_another_process_and_used_by_threads(corpus, waves):
    corpus.read(0)
    sent = pickle.dumps(corpus)
    again = pickle.loads(sent)
    assert again.fingerprint == corpus.fingerprint
    with ThreadPoolExecutor(4) as pool:
        for i, wave in enumerate(pool.map(again.read, range(len(waves)))):
            np.testing.assert_array_equal(wave, waves[i])
    if corpus.folders:
        assert len(sent) < 2 * sum(LENGTHS) / 10, "the samples were sent along"


def test_the_fingerprint_is_of_what_training_sees(folder, tmp_path, waves):
    before = Corpus(folder).fingerprint
    assert Corpus(folder).fingerprint == before
    prepare(tmp_path / "source", tmp_path / "again", shard_seconds=1.0, workers=1)
    assert Corpus(tmp_path / "again").fingerprint == before
    prepare(tmp_path / "source", tmp_path / "other", shard_seconds=100.0)
    assert Corpus(tmp_path / "other").fingerprint != before
    changed = [*waves[:-1], waves[-1][::-1]]
    assert Corpus.from_arrays(waves).fingerprint == Corpus.from_arrays(waves).fingerprint
    assert Corpus.from_arrays(waves).fingerprint != Corpus.from_arrays(changed).fingerprint
    assert Corpus.from_arrays(waves).fingerprint != Corpus.from_arrays(waves, 8000).fingerprint


def test_an_open_corpus_keeps_its_names_while_it_is_prepared_again(folder, tmp_path, waves):
    fresh, opened, grown = Corpus(folder), Corpus(folder), Corpus(folder)
    names, fingerprint = fresh.paths, fresh.fingerprint
    soundfile.write(tmp_path / "source" / "0a.wav", waves[0], RATE)
    prepare(tmp_path / "source", folder, shard_seconds=1.0)
    assert (grown.paths, grown.fingerprint) == (names, fingerprint)
    soundfile.write(tmp_path / "source" / "0.wav", waves[1], RATE)
    prepare(tmp_path / "source", folder, shard_seconds=1.0)
    assert opened.paths[1:] == names[1:]
    assert opened.paths[0] not in Corpus(folder).paths
    assert opened.fingerprint not in (fingerprint, Corpus(folder).fingerprint)


def test_a_broken_shard_is_named(folder):
    path = folder / "shards" / "00001.i16"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    corpus = Corpus(folder)
    corpus.read(0)
    with pytest.raises(CorpusError, match=rf"00001\.i16: {len(data) - 2} bytes, the index needs {len(data)}"):
        corpus.gather([0, 3], [0, 0], 10)
    path.unlink()
    with pytest.raises(CorpusError, match=r"00001\.i16: No such file"):
        corpus.read(3)
    path.write_bytes(data)
    assert len(corpus.read(3)) == LENGTHS[3]
    os.truncate(path, 10)  # while it is in use
    with pytest.raises(CorpusError, match=r"00001\.i16: cut short to 10 bytes"):
        corpus.read(3)


def test_what_is_no_corpus_is_said(tmp_path, folder):
    with pytest.raises(CorpusError, match="no corpus, it has no index.parquet: make one with"):
        Corpus(tmp_path / "missing")
    index = (folder / "index.parquet").read_bytes()
    (folder / "index.parquet").unlink()
    with pytest.raises(CorpusError, match="interrupted: run the same matpac-fast prepare again"):
        Corpus(folder)
    (folder / "index.parquet").write_bytes(index[:-100])
    with pytest.raises(CorpusError, match="index.parquet: cannot be read"):
        Corpus(folder)
    pq.write_table(pa.table({"x": [1]}), folder / "index.parquet")
    with pytest.raises(CorpusError, match=r"index\.parquet"):
        Corpus(folder)


def test_memory_takes_floats(waves):
    corpus = Corpus.from_arrays([wave / np.float32(32768) for wave in waves])
    np.testing.assert_array_equal(corpus.read(3), waves[3])
    assert len(Corpus.from_arrays([])) == 0


def test_memory_takes_what_an_encoder_takes(waves):
    floats = [torch.from_numpy(waves[1]), waves[1].astype(">i2"), torch.from_numpy(waves[1] / 32768).requires_grad_()]
    corpus = Corpus.from_arrays(floats)
    for i in range(len(floats)):
        np.testing.assert_array_equal(corpus.read(i), waves[1])


@pytest.mark.parametrize(
    ("wave", "says"),
    [
        (np.ones(9, np.int32), "is int32; expected float or int16"),
        (np.ones(9, np.uint8), "is uint8; expected float or int16"),
        (np.array([0.5, np.nan]), "holds NaN or infinite samples"),
        (np.array([0.5, -np.inf], np.float32), "holds NaN or infinite samples"),
        (np.array([0.5, -9e3]), "holds a sample of 9e+03; full scale is 1, the limit 32: divide by the full"),
        (np.zeros((9, 2)), "is (9, 2); expected (S,), mono: mix channels down first"),
        ([0.5, 0.25], "is a list; expected a tensor or array"),
    ],
)
def test_what_would_be_noise_in_memory_is_refused_by_its_name(waves, wave, says):
    with pytest.raises(AudioError, match=f"^from_arrays: clip-1 {re.escape(says)}"):
        Corpus.from_arrays([waves[0], wave])
    with pytest.raises(AudioError, match=f"^from_arrays: b.wav {re.escape(says)}"):
        Corpus.from_arrays([waves[0], wave], paths=["a.wav", "b.wav"])
    with pytest.raises(ConfigError, match="1 paths of 2 waves; expected one of each"):
        Corpus.from_arrays([waves[0], wave], paths=["a.wav"])


def test_int16_is_rounded_and_clipped_and_counted():
    wave = np.array([0, 1 / 32768, 1.4 / 32768, -1.6 / 32768, 32767 / 32768, 1.0, -1.0, 1.5, -1.5], np.float32)
    samples, clipped = to_int16(wave)
    assert samples.tolist() == [0, 1, 1, -2, 32767, 32767, -32768, 32767, -32768]
    assert samples.dtype == np.int16
    assert clipped == 3


def test_a_shard_that_is_cut_short_while_it_is_in_use_is_an_error_with_its_name(folder, waves):
    """Of a map, the pages that are gone would end the process."""
    corpus = Corpus(folder)
    clips = [i for i in range(len(corpus)) if corpus._shard[i] == corpus._shard[1]]
    whole = corpus.gather(clips, [0] * len(clips), 2000)
    last = max(clips, key=lambda i: corpus._offset[i])
    end = 2 * int(corpus._offset[last] + 1999)
    path = folder / "shards" / f"{corpus._shard[1]:05d}.i16"
    with open(path, "rb+") as file:
        file.truncate(end)
    with pytest.raises(CorpusError, match=rf"{path.name}: cut short to {end} bytes"):
        corpus.gather([last], [0], 2000)
    np.testing.assert_array_equal(corpus.gather([last], [0], 1999)[0], waves[last][:1999])
    others = [i for i in clips if i != last]
    np.testing.assert_array_equal(
        corpus.gather(others, [0] * len(others), 2000), whole[[clips.index(i) for i in others]]
    )
    assert corpus.gather([last], [0], 0).shape == (1, 0)


def test_crops_go_into_arrays_of_any_layout(folder):
    corpus = Corpus(folder)
    out = np.zeros((2, 200), np.int16)[:, ::2]
    np.testing.assert_array_equal(corpus.gather([1, 2], [5, 6], 100, out=out), corpus.gather([1, 2], [5, 6], 100))
    assert out.any()


def open_shards() -> list[str]:
    paths = []
    for handle in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # listing has opened one itself
            paths.append(os.readlink(handle))
    return [path for path in paths if path.endswith(".i16")]


def test_more_shards_than_may_be_open_are_read_all_the_same(folder, waves, monkeypatch):
    monkeypatch.setattr(corpus_module, "_may_open", lambda n: 2)
    corpus = Corpus(folder)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(waves)), 5))
    for i in order:
        np.testing.assert_array_equal(corpus.gather([i], [10], 2000)[0], waves[i][10:2010])
        np.testing.assert_array_equal(corpus.read(i), waves[i])
        assert len(open_shards()) <= 2
    with ThreadPoolExecutor(8) as pool:
        for i, row in zip(order, pool.map(lambda i: corpus.gather([i], [10], 2000)[0], order), strict=True):
            np.testing.assert_array_equal(row, waves[i][10:2010])


@pytest.mark.parametrize(
    ("n", "limits", "kept", "raised"),
    [
        (100, (1024, 4096), 100, None),
        (1000, (1024, 4096), 1000, 1256),
        (5000, (1024, 4096), 3840, 4096),
        (5000, (1024, 1024), 768, 1024),
        (5000, (1024, -1), 5000, 5256),
        (5000, (-1, -1), 5000, None),
    ],
)
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(monkeypatch, n, limits, kept, raised):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: asked.append(pair))
    assert corpus_module._may_open(n) == kept
    assert asked == ([] if raised is None else [(raised, limits[1])])


def test_a_process_without_handles_does_not_blame_the_shard(folder, monkeypatch):
    def out_of_handles(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", out_of_handles)
    with pytest.raises(OSError, match="Too many open files"):
        Corpus(folder).gather([0], [0], 100)


def test_a_corpus_that_outlives_its_modules_is_closed_in_silence(folder, monkeypatch):
    """As a script's own may, which Python collects once it has emptied the modules."""
    corpus, complaints = Corpus(folder), []
    corpus.gather([0], [0], 100)
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    monkeypatch.setattr(corpus_module, "os", None)
    del corpus
    gc.collect()
    assert complaints == []
