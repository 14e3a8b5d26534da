"""Preparing a corpus on disks that fill, lose and tear, however often interrupted: the same result in the end."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from matpac_fast.audio import prepare as module
from matpac_fast.audio import store
from matpac_fast.audio.corpus import Corpus, to_int16
from matpac_fast.audio.decode import read_audio
from matpac_fast.audio.prepare import prepare
from matpac_fast.errors import CorpusError
from tests.audio.mixed import GOOD, RATE, rows, snapshot


@pytest.mark.parametrize("harm", ["all", "one", "cut", "a sample"])
def test_what_went_with_a_shard_is_made_again_in_a_new_one(source, tmp_path, harm):
    out, shards = tmp_path / "corpus", tmp_path / "corpus" / "shards"
    prepare(source, out, shard_seconds=2.0)  # a, c; d, e, z
    if harm == "all":
        shutil.rmtree(shards)
    elif harm == "one":
        (shards / "00000.i16").unlink()
    elif harm == "a sample":
        os.truncate(shards / "00000.i16", (shards / "00000.i16").stat().st_size - 2)
    else:
        os.truncate(shards / "00000.i16", 2 * RATE + 100)  # a is whole
    again = {"all": list(GOOD), "one": list(GOOD[:2]), "cut": [GOOD[1]], "a sample": [GOOD[1]]}[harm]
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
    assert steps > 15
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
    shutil.rmtree(out / "shards")  # and with them the clips, which the index still has
    monkeypatch.setattr(module, "open", FullDisk(0), raising=False)
    with pytest.raises(CorpusError, match="No space left on device; 0 clips are safe"):
        prepare(source, out, shard_seconds=1.1)


def test_a_file_without_memory_for_it_is_left_out_and_tried_again(source, tmp_path, monkeypatch):
    def blocks(file, rate):
        if file.path.name == os.path.basename(GOOD[0]):
            raise MemoryError
        return read(file, rate)

    read = module.AudioFile.blocks
    monkeypatch.setattr(module.AudioFile, "blocks", blocks)
    report = prepare(source, tmp_path / "corpus")
    assert report.clips == len(GOOD) - 1
    assert rows(tmp_path / "corpus" / "rejected.parquet")[GOOD[0]]["reason"].startswith("too long for the memory")
    monkeypatch.undo()
    assert prepare(source, tmp_path / "corpus").added == 1


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
