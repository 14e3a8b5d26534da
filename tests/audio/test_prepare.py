"""Preparing a corpus: right clips, reasons for the rest, what becomes of changes, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from matpac_fast.audio import ahead, store
from matpac_fast.audio import prepare as module
from matpac_fast.audio.corpus import INDEX, Corpus, read_metadata, to_int16
from matpac_fast.audio.decode import read_audio
from matpac_fast.audio.prepare import prepare
from matpac_fast.errors import AudioError, CorpusError
from tests.audio.mixed import GOOD, RATE, REASONS, rows, snapshot


def test_every_good_file_is_a_clip_and_every_other_has_a_reason(audio, tmp_path):
    told = []
    report = prepare(audio, tmp_path, shard_seconds=2.0, progress=lambda done, total: told.append((done, total)))
    index = rows(tmp_path / "index.parquet")
    assert tuple(index) == GOOD
    corpus = Corpus(tmp_path)
    assert corpus.paths == list(GOOD)
    for i, (name, row) in enumerate(index.items()):
        wave = read_audio(audio / name)
        samples, clipped = to_int16(wave)
        np.testing.assert_array_equal(corpus.read(i), samples)
        assert row["frames"] == len(wave)
        assert row["duration"] == len(wave) / RATE
        assert row["sha256"] == hashlib.sha256((audio / name).read_bytes()).hexdigest()
        assert row["peak"] == pytest.approx(np.abs(wave).max())
        assert row["clipped"] == clipped
        info = soundfile.info(audio / name)
        assert (row["source_rate"], row["source_channels"]) == (info.samplerate, info.channels)
    assert [row["shard"] for row in index.values()] == [0, 0, 1, 1, 1]
    assert sorted(os.listdir(tmp_path)) == ["index.parquet", "rejected.parquet", "shards"]

    rejected = {path: row["reason"] for path, row in rows(tmp_path / "rejected.parquet").items()}
    assert list(rejected) == list(REASONS)
    assert all(rejected[path].startswith(reason) for path, reason in REASONS.items())
    assert (report.clips, report.added, report.shards, report.replaced, report.vanished) == (5, 5, 2, 0, 0)
    assert report.seconds == pytest.approx(corpus.seconds)
    assert report.clipped == 1  # z.wav
    assert sum(report.rejected.values()) == len(REASONS)
    assert report.rejected["silent"] == 2
    assert told == [(i, 14) for i in range(1, 15)]


def test_what_is_silent_is_measured_from_the_mid_line(tmp_path):
    tone = np.sin(np.arange(RATE) / 10)
    (tmp_path / "audio").mkdir()
    for name, db in (("below", -70.5), ("above", -69.5)):
        soundfile.write(tmp_path / "audio" / f"{name}.wav", 0.25 + 10 ** (db / 20) * tone, RATE, subtype="FLOAT")
    prepare(tmp_path / "audio", tmp_path / "corpus")
    assert Corpus(tmp_path / "corpus").paths == ["above.wav"]


def test_channels_that_cancel_are_not_called_silent(tmp_path):
    (tmp_path / "audio").mkdir()
    tone = np.sin(np.arange(RATE) / 9).astype(np.float32) / 2
    for name, left, right in (("phase", tone, -tone), ("silent", 0 * tone, 0 * tone), ("good", tone, tone)):
        soundfile.write(tmp_path / "audio" / f"{name}.wav", np.stack([left, right], 1), RATE)
    assert prepare(tmp_path / "audio", tmp_path / "corpus").rejected == {"out of phase": 1, "silent": 1}
    reasons = {path: row["reason"] for path, row in rows(tmp_path / "corpus" / "rejected.parquet").items()}
    assert reasons["phase.wav"] == "out of phase: its channels cancel each other when they are mixed to mono"
    assert reasons["silent.wav"].startswith("silent: within -70 dBFS")


@pytest.mark.parametrize("workers", [1, 3, 16])
def test_the_result_does_not_depend_on_the_threads(audio, tmp_path, workers, monkeypatch):
    prepare(audio, tmp_path / "one", shard_seconds=2.0)
    monkeypatch.setattr(ahead, "_BYTES", 1000)
    prepare(audio, tmp_path / "two", shard_seconds=2.0, workers=workers)
    assert snapshot(tmp_path / "one", times=False) == snapshot(tmp_path / "two", times=False)


def test_again_it_decodes_nothing_and_writes_nothing(source, tmp_path, monkeypatch):
    out = tmp_path / "corpus"
    prepare(source, out, shard_seconds=2.0)
    before, folder = snapshot(out), out.stat().st_mtime_ns
    decoded = []
    load = module._load
    monkeypatch.setattr(module, "_load", lambda key, *rest: (decoded.append(key), load(key, *rest))[1])
    report = prepare(source, out, shard_seconds=2.0)
    assert (report.clips, report.added) == (5, 0)
    assert snapshot(out) == before
    assert out.stat().st_mtime_ns == folder
    # What could not even be opened may have been mended without a trace, by other permissions for one.
    assert sorted(decoded) == ["bad/empty.wav", "bad/link.wav", "bad/page.mp3", "bad/song.m4a"]


def test_new_files_go_into_new_shards(source, tmp_path):
    out = tmp_path / "corpus"
    prepare(source, out)
    before = snapshot(out)
    soundfile.write(source / "0.wav", np.sin(np.arange(RATE) / 9), RATE)
    report = prepare(source, out)
    assert (report.clips, report.added, report.shards) == (6, 1, 2)
    assert snapshot(out)["shards/00000.i16"] == before["shards/00000.i16"]
    corpus = Corpus(out)
    assert corpus.paths == [*GOOD, "0.wav"]
    np.testing.assert_array_equal(corpus.read(5), to_int16(read_audio(source / "0.wav"))[0])


def test_a_changed_file_takes_the_place_of_its_old_clip(source, tmp_path):
    out = tmp_path / "corpus"
    prepare(source, out)
    before = Corpus(out)
    soundfile.write(source / "a.wav", np.sin(np.arange(RATE) / 9), RATE)
    report = prepare(source, out)
    assert (report.clips, report.added, report.replaced) == (5, 0, 1)
    corpus = Corpus(out)
    assert corpus.paths == [*GOOD[1:], "a.wav"]
    np.testing.assert_array_equal(corpus.read(4), to_int16(read_audio(source / "a.wav"))[0])
    np.testing.assert_array_equal(corpus.read(0), before.read(1))
    assert corpus.fingerprint != before.fingerprint
    after = snapshot(out)
    assert prepare(source, out).replaced == 0
    assert snapshot(out) == after


def test_a_touched_file_changes_nothing(source, tmp_path):
    out = tmp_path / "corpus"
    prepare(source, out)
    before = snapshot(out)
    os.utime(source / "a.wav", (1, 1))
    os.utime(source / "bad/nan.wav", (1, 1))
    report = prepare(source, out)
    assert (report.added, report.replaced) == (0, 0)
    assert snapshot(out) == before


def test_a_file_that_kept_its_time_and_not_its_size_is_decoded_again(source, tmp_path):
    """As a copy that was cut short and is whole now, with the time of its original."""
    out = tmp_path / "corpus"
    prepare(source, out)
    then = (source / "a.wav").stat().st_mtime_ns
    soundfile.write(source / "a.wav", np.sin(np.arange(2 * RATE) / 9), RATE)
    os.utime(source / "a.wav", ns=(then, then))
    assert prepare(source, out).replaced == 1
    assert Corpus(out).frames[-1] == 2 * RATE


def test_the_index_names_each_decoder_that_clips_came_out_of(source, tmp_path, monkeypatch):
    out, told = tmp_path / "corpus", []
    for i, version in enumerate(("1", "2", "2")):
        monkeypatch.setattr(store, "decoder_versions", lambda version=version: {"libsndfile": version})
        soundfile.write(source / f"new {i}.wav", np.sin(np.arange(RATE) / 9), RATE)
        assert prepare(source, out).clips == len(GOOD) + i + 1
        told.append([each["libsndfile"] for each in read_metadata(pq.read_schema(out / INDEX), out)["decoders"]])
    assert told == [["1"], ["1", "2"], ["1", "2"]]


def test_a_vanished_file_keeps_its_clip_and_loses_its_rejection(source, tmp_path):
    out = tmp_path / "corpus"
    prepare(source, out)
    (source / "a.wav").unlink()
    (source / "bad/nan.wav").unlink()
    report = prepare(source, out)
    assert (report.clips, report.vanished) == (5, 1)
    assert Corpus(out).paths == list(GOOD)
    assert "bad/nan.wav" not in rows(out / "rejected.parquet")


def test_a_mended_file_becomes_a_clip_and_a_spoilt_one_is_rejected(source, tmp_path):
    out = tmp_path / "corpus"
    prepare(source, out)
    shutil.copy(source / "a.wav", source / "bad/nan.wav")
    (source / "a.wav").write_bytes(b"RIFF")
    report = prepare(source, out)
    assert (report.clips, report.added) == (5, 1)
    assert Corpus(out).paths == [*GOOD[1:], "bad/nan.wav"]
    rejected = rows(out / "rejected.parquet")
    assert "bad/nan.wav" not in rejected
    assert rejected["a.wav"]["reason"].startswith("unreadable")


def test_a_file_that_the_disk_could_not_read_is_tried_again(source, tmp_path, monkeypatch):
    out, read = tmp_path / "corpus", soundfile.SoundFile.read

    def fails(self, *args, **kwargs):
        if os.fsdecode(self.name).endswith("a.wav"):
            raise soundfile.LibsndfileError(2)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "read", fails)
    prepare(source, out)
    assert rows(out / "rejected.parquet")["a.wav"]["reason"].startswith("cannot be read: ")
    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    assert prepare(source, out).added == 1
    assert "a.wav" in Corpus(out).paths


def test_a_corpus_in_use_keeps_its_audio_though_the_last_shard_lost_its_only_clip(source, tmp_path):
    out = tmp_path / "corpus"
    prepare(source, out)
    soundfile.write(source / "new.wav", np.sin(np.arange(RATE) / 9), RATE)
    prepare(source, out)
    opened = Corpus(out)  # and reads a shard when it is first needed
    want = to_int16(read_audio(source / "new.wav"))[0]
    soundfile.write(source / "new.wav", np.zeros(RATE), RATE)
    assert prepare(source, out).clips == 5
    soundfile.write(source / "other.wav", np.cos(np.arange(RATE) / 5), RATE)
    assert prepare(source, out).clips == 6
    np.testing.assert_array_equal(opened.read(5), want)
    assert [row["shard"] for row in rows(out / "index.parquet").values()] == [0] * 5 + [2]


def test_a_folder_that_cannot_be_read_is_a_rejection(source, tmp_path, monkeypatch):
    scandir = os.scandir

    def guarded(path):
        if os.path.basename(path) == "bad":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)  # file modes do not stop root
    prepare(source, tmp_path / "corpus")
    rejected = rows(tmp_path / "corpus" / "rejected.parquet")
    assert {path: row["reason"] for path, row in rejected.items()} == {
        "bad": "folder cannot be read: Permission denied"
    }
    monkeypatch.undo()
    prepare(source, tmp_path / "corpus")
    assert list(rows(tmp_path / "corpus" / "rejected.parquet")) == list(REASONS)


def test_a_name_that_is_no_utf8_is_a_clip(tmp_path):
    (tmp_path / "source").mkdir()
    soundfile.write(os.fsencode(tmp_path / "source") + b"/caf\xe9.wav", np.sin(np.arange(RATE)), RATE)
    prepare(tmp_path / "source", tmp_path / "corpus")
    assert Corpus(tmp_path / "corpus").paths == [r"caf\xe9.wav"]
    assert prepare(tmp_path / "source", tmp_path / "corpus").added == 0


def test_other_settings_and_other_folders_are_refused(source, tmp_path):
    out = tmp_path / "corpus"
    prepare(source, out)
    before = snapshot(out)
    with pytest.raises(CorpusError, match="was prepared with sample_rate 16000, not 8000; give the same, or a new"):
        prepare(source, out, sample_rate=8000)
    with pytest.raises(CorpusError, match="min_seconds 0.1, not 1"):
        prepare(source, out, min_seconds=1)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(source / "a.wav", tmp_path / "elsewhere" / "other.wav")
    with pytest.raises(CorpusError, match="a corpus of other audio: none of its 5 files is in"):
        prepare(tmp_path / "elsewhere", out)
    assert snapshot(out) == before
    moved = source.rename(tmp_path / "moved")
    assert prepare(moved, out).added == 0


def test_a_place_that_cannot_be_written_is_said(source, tmp_path, monkeypatch):
    with pytest.raises(CorpusError, match="a file, where a folder for the corpus was expected"):
        prepare(source, source / "a.wav")
    with pytest.raises(CorpusError, match="holds other files; give a new or empty folder"):
        prepare(source, source)
    assert not (source / "shards").exists()

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CorpusError, match="cannot be written: Permission denied"):
        prepare(source, tmp_path / "corpus")


def test_a_source_without_anything_to_use_is_said(audio, tmp_path):
    out = tmp_path / "corpus"
    with pytest.raises(AudioError, match="no such folder"):
        prepare(tmp_path / "missing", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"no audio in it; looked for .*\.flac"):
        prepare(tmp_path / "empty", out)
    assert not out.exists()
    with pytest.raises(CorpusError, match=r"none of its 9 audio files can be used \(empty.wav: empty: a file of 0"):
        prepare(audio / "bad", out)
    assert len(rows(out / "rejected.parquet")) == 9
    with pytest.raises(CorpusError):
        Corpus(out)


def test_a_system_that_pins_no_process_to_cores_prepares_too(audio, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    assert prepare(audio, tmp_path).clips == 5


@pytest.mark.parametrize("option", [{"workers": 0}, {"shard_seconds": 0.0}, {"sample_rate": -1}])
def test_numbers_that_cannot_be_are_refused(audio, tmp_path, option):
    with pytest.raises(CorpusError, match=f"{next(iter(option))} is .*; expected more than 0"):
        prepare(audio, tmp_path / "corpus", **option)


def test_one_shard_may_hold_all(audio, tmp_path):
    assert prepare(audio, tmp_path, shard_seconds=float("inf")).shards == 1


@pytest.mark.parametrize(
    "option", [{"min_seconds": -1}, {"min_seconds": np.nan}, {"silence_db": np.nan}, {"silence_db": 0.0}]
)
def test_limits_that_are_none_are_refused(audio, tmp_path, option):
    ((name, value),) = option.items()
    with pytest.raises(CorpusError, match=f"{name} is {value}; expected"):
        prepare(audio, tmp_path / "corpus", **option)
    assert not (tmp_path / "corpus").exists()
