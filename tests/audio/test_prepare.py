"""Preparing a corpus: right clips, reasons for the rest, the same result however often it was interrupted."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from matpac_fast.audio import ahead, container, store
from matpac_fast.audio import prepare as module
from matpac_fast.audio.corpus import Corpus, to_int16
from matpac_fast.audio.decode import read_audio
from matpac_fast.audio.prepare import prepare
from matpac_fast.errors import AudioError, CorpusError

RATE = 16_000
GOOD = ("a.wav", "b/c.flac", "b/d.WAV", "b/e.ogg", "z.wav")
REASONS = {
    "bad/empty.wav": "empty: a file of 0 bytes",
    "bad/flat.wav": "silent: within -70 dBFS of its mid-line throughout",
    "bad/half.wav": "truncated: its header says",
    "bad/link.wav": "cannot be opened: No such file",
    "bad/nan.wav": "not finite: NaN or infinite samples",
    "bad/page.mp3": "unreadable",
    "bad/quiet.wav": "silent: within -70 dBFS of its mid-line throughout",
    "bad/short.wav": "too short: 0.003 s, less than 0.1 s",
    "bad/song.m4a": "unreadable" if container.is_available() else "no decoder for .m4a files",
}


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    """Good files of several kinds, 4.6 s together, and one of each bad kind."""
    folder = tmp_path_factory.mktemp("audio")
    (folder / "b").mkdir()
    (folder / "bad").mkdir()
    random = np.random.default_rng(0)

    def noise(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
        return random.normal(0, 0.1, (round(seconds * rate), channels)).clip(-0.9, 0.9)

    soundfile.write(folder / "a.wav", noise(1.0, RATE), RATE)
    soundfile.write(folder / "b/c.flac", noise(1.2, 96_000, 2), 96_000)
    soundfile.write(folder / "b/d.WAV", noise(0.4, 8_000), 8_000, format="WAV")
    soundfile.write(folder / "b/e.ogg", noise(1.0, 44_100), 44_100)
    soundfile.write(folder / "z.wav", noise(1.0, RATE) * 12, RATE, subtype="FLOAT")
    bad = folder / "bad"
    soundfile.write(bad / "short.wav", noise(0.003, RATE), RATE)
    soundfile.write(bad / "quiet.wav", noise(1.0, RATE) * 1e-4, RATE, subtype="FLOAT")
    soundfile.write(bad / "flat.wav", np.full(RATE, 0.25), RATE)
    soundfile.write(bad / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (bad / "half.wav").write_bytes((folder / "a.wav").read_bytes()[:9000])
    (bad / "empty.wav").touch()
    (bad / "page.mp3").write_text("<html>not found</html>")
    (bad / "song.m4a").write_bytes(bytes(100))
    (bad / "link.wav").symlink_to("nowhere.wav")
    (folder / "notes.txt").write_text("no audio")
    return folder


@pytest.fixture
def source(audio, tmp_path) -> Path:
    return Path(shutil.copytree(audio, tmp_path / "source", symlinks=True))


def rows(path: Path) -> dict[str, dict]:
    return {row["path"]: row for row in pq.read_table(path).to_pylist()}


def snapshot(out: Path, times: bool = True) -> dict[str, tuple]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(p.relative_to(out)): (p.read_bytes(), p.stat().st_mtime_ns if times else 0) for p in files}


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


@pytest.mark.parametrize("harm", ["all", "one", "cut"])
def test_what_went_with_a_shard_is_made_again_in_a_new_one(source, tmp_path, harm):
    out, shards = tmp_path / "corpus", tmp_path / "corpus" / "shards"
    prepare(source, out, shard_seconds=2.0)  # a, c; d, e, z
    if harm == "all":
        shutil.rmtree(shards)
    elif harm == "one":
        (shards / "00000.i16").unlink()
    else:
        os.truncate(shards / "00000.i16", 2 * RATE + 100)  # a is whole
    again = {"all": list(GOOD), "one": list(GOOD[:2]), "cut": [GOOD[1]]}[harm]
    report = prepare(source, out, shard_seconds=2.0)
    assert (report.clips, report.added, report.replaced, report.remade, report.lost) == (5, 0, 0, len(again), 0)
    index = rows(out / "index.parquet")
    assert [path for path, row in index.items() if row["shard"] > 1] == again
    corpus = Corpus(out)
    for i, name in enumerate(corpus.paths):
        np.testing.assert_array_equal(corpus.read(i), to_int16(read_audio(source / name))[0])
    after = snapshot(out)
    assert prepare(source, out, shard_seconds=2.0).remade == 0
    assert snapshot(out) == after


def test_what_went_with_a_shard_and_its_file_leaves_the_index_once_a_run_ends_well(source, tmp_path):
    out = tmp_path / "corpus"
    prepare(source, out)
    shutil.rmtree(out / "shards")
    before = (out / "index.parquet").read_bytes()

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, out, progress=interrupt)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(source / "a.wav", tmp_path / "elsewhere" / "other.wav")
    with pytest.raises(CorpusError, match="a corpus of other audio"):
        prepare(tmp_path / "elsewhere", out)
    assert (out / "index.parquet").read_bytes() == before
    (source / "a.wav").unlink()
    (source / "z.wav").write_bytes(b"RIFF")
    report = prepare(source, out)
    assert (report.clips, report.remade, report.lost, report.vanished) == (3, 3, 2, 0)
    assert Corpus(out).paths == list(GOOD[1:4])


def test_a_damaged_index_is_said_alike_by_those_who_read_it_and_those_who_write(source, tmp_path):
    out = tmp_path / "corpus"
    prepare(source, out)
    os.truncate(out / "index.parquet", 100)
    said = r"index.parquet: cannot be read \(.*\): copy it again, or prepare the corpus in a new folder"
    with pytest.raises(CorpusError, match=said):
        prepare(source, out)
    with pytest.raises(CorpusError, match=said):
        Corpus(out)


# Runs `prepare` in forked children, each killed at its k-th step towards the disk, one step later every time, in a
# folder of its own; ends when a child gets through.
KILLER = """
import os, signal, sys
import pyarrow.compute, pyarrow.parquet, soundfile, soxr  # once, not in every child
from matpac_fast.audio.prepare import prepare
source, out = sys.argv[1:]
for k in range(1000):
    child = os.fork()
    if child == 0:
        steps = 0
        def counted(call):
            def step(*args, **kwargs):
                global steps
                steps += 1
                if steps > k:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return step
        for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        prepare(source, f"{out}/{k}", shard_seconds=0.5)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(k)
"""


def test_killed_at_any_step_it_is_never_torn_and_goes_on_to_the_same_bytes(audio, tmp_path):
    source, names = tmp_path / "source", ["a.wav", "d.WAV", "z.wav"]
    source.mkdir()
    for name in ("a.wav", "b/d.WAV", "z.wav", "bad/short.wav"):
        shutil.copy(audio / name, source)
    prepare(source, tmp_path / "whole", shard_seconds=0.5)
    whole = snapshot(tmp_path / "whole", times=False)
    assert "shards/00001.i16" in whole
    ran = subprocess.run(
        [sys.executable, "-c", KILLER, str(source), str(tmp_path / "killed")], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    steps = int(ran.stdout)
    assert steps > 20
    waves = [to_int16(read_audio(source / name))[0] for name in names]
    for k in range(steps + 1):
        out = tmp_path / "killed" / str(k)
        if (out / "index.parquet").exists():
            corpus = Corpus(out)
            for i, wave in enumerate(waves):
                np.testing.assert_array_equal(corpus.read(i), wave)
        elif out.exists():
            with pytest.raises(CorpusError):
                Corpus(out)
        prepare(source, out, shard_seconds=0.5)
        assert snapshot(out, times=False) == whole, f"killed at step {k}"


class FullDisk:
    """Opens files that take `room` bytes, all together."""

    def __init__(self, room: int):
        self.room = room

    def __call__(self, path, mode="r"):
        file = open(path, mode)  # noqa: SIM115
        if "w" not in mode:
            return file
        write = file.write

        class Limited:
            def __enter__(inner):
                return inner

            def __exit__(inner, *_):
                file.close()

            def write(inner, data):
                self.room -= len(data) * data.itemsize
                if self.room < 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return write(data)

        return Limited()


def test_a_full_disk_leaves_what_is_finished_and_one_clear_error(source, tmp_path, monkeypatch):
    prepare(source, tmp_path / "whole", shard_seconds=1.1)
    out = tmp_path / "corpus"
    monkeypatch.setattr(module, "open", FullDisk(100_000), raising=False)
    with pytest.raises(CorpusError) as caught:
        prepare(source, out, shard_seconds=1.1)
    assert str(caught.value) == (
        f"{out}: cannot be written: No space left on device; 2 clips are safe; make room and run the same again"
    )
    assert Corpus(out).paths == list(GOOD[:2])
    assert not list(out.rglob("*.tmp"))
    monkeypatch.undo()
    assert prepare(source, out, shard_seconds=1.1).added == 3
    assert snapshot(out, times=False) == snapshot(tmp_path / "whole", times=False)


def test_a_disk_too_full_for_the_index_keeps_the_shards(source, tmp_path, monkeypatch):
    out = tmp_path / "corpus"
    write = store.Store._write

    def full(self, table, path):
        if path.name == "index.parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, table, path)

    monkeypatch.setattr(store.Store, "_write", full)
    with pytest.raises(CorpusError, match="No space left on device; 5 clips are safe; make room"):
        prepare(source, out)
    with pytest.raises(CorpusError, match="run the same matpac-fast prepare again"):
        Corpus(out)
    monkeypatch.undo()
    assert prepare(source, out).added == 0
    assert Corpus(out).paths == list(GOOD)


def test_ctrl_c_keeps_the_shards_that_are_finished(source, tmp_path):
    def interrupt(done, total):
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "corpus", shard_seconds=2.0, progress=interrupt)
    assert Corpus(tmp_path / "corpus").paths == list(GOOD[:2])
    assert prepare(source, tmp_path / "corpus", shard_seconds=2.0).clips == 5


@pytest.mark.parametrize("name", ["00000.parquet", "00001.parquet", "index.parquet"])
@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_while_rows_are_written_loses_none(source, tmp_path, monkeypatch, name, after):
    write, out = store.Store._write, tmp_path / "corpus"

    def interrupted(self, table, path):
        if path.name != name:
            return write(self, table, path)
        monkeypatch.setattr(store.Store, "_write", write)
        if after:
            write(self, table, path)
        else:  # between making the temporary file and knowing its name
            path.parent.mkdir(exist_ok=True)
            (path.parent / f".{path.name}.x.tmp").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(store.Store, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, out, shard_seconds=1.1)
    if name != "index.parquet":
        assert len(Corpus(out)) == (2 if name == "00000.parquet" else 4)
    prepare(source, out, shard_seconds=1.1)
    assert Corpus(out).paths == list(GOOD)
    assert not (out / "parts").exists()
    assert not list(out.rglob("*.tmp"))


def test_two_at_once_are_refused(source, tmp_path):
    prepare(source, tmp_path / "corpus")
    handle = os.open(tmp_path / "corpus", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(CorpusError, match="another process is preparing it"):
        prepare(source, tmp_path / "corpus")
    os.close(handle)
    prepare(source, tmp_path / "corpus")


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


@pytest.mark.parametrize("option", [{"workers": 0}, {"shard_seconds": 0.0}, {"sample_rate": -1}])
def test_numbers_that_cannot_be_are_refused(audio, tmp_path, option):
    with pytest.raises(CorpusError, match=f"{next(iter(option))} is .*; expected more than 0"):
        prepare(audio, tmp_path / "corpus", **option)


@pytest.mark.parametrize("option", [{"min_seconds": -1}, {"min_seconds": np.nan}, {"silence_db": np.nan}])
def test_limits_that_are_none_are_refused(audio, tmp_path, option):
    ((name, value),) = option.items()
    with pytest.raises(CorpusError, match=f"{name} is {value}; expected"):
        prepare(audio, tmp_path / "corpus", **option)
    assert not (tmp_path / "corpus").exists()
