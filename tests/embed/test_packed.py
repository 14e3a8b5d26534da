"""Embedding what is in tar, zip and Parquet files: the rows of the files themselves, and reasons for what is not."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from matpac_fast import cli
from matpac_fast.audio import archives
from matpac_fast.audio.decode import read_blocks
from matpac_fast.audio.prepare import prepare
from matpac_fast.embed.extract import embed_collection
from matpac_fast.embed.packed import Packed
from matpac_fast.embed.source import Files
from matpac_fast.errors import AudioError, CorpusError
from tests.audio.packed import NAMES, PACKERS, cut_tar, flipped_parquet, half_parquet, headless_tar, tar, tar_gz
from tests.embed import crew

RATE = 8_000  # of crew.Tiny
FOUND = {name: [f"in/{name}/{os.path.basename(n) if 'parquet' in name else n}" for n in NAMES] for name in PACKERS}


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        soundfile.write(folder / name, crew.noise(RATE + 1000 * i, seed=i), RATE, format=Path(name).suffix[1:])
    (folder / "notes.txt").write_text("no audio")
    (tmp_path / "in").mkdir()
    return folder


def rows(out: Path) -> dict[str, list[list[float]]]:
    """Start, end and embedding of each row, by its file."""
    found: dict[str, list[list[float]]] = {}
    for path in sorted(out.glob("shard-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            found.setdefault(row["path"], []).append([row["start"], row["end"], *row["embedding"]])
    return found


def errors(out: Path) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in pq.read_table(out / "errors.parquet").to_pylist()}


def embed(source: Path, out: Path, **options):
    return embed_collection(source, out, crew.Tiny(), 0.1, **options)


@pytest.mark.parametrize("files_per_shard", [2, 256])
@pytest.mark.parametrize("name", PACKERS)
def test_an_archive_gives_the_rows_of_its_files(files, tmp_path, name, files_per_shard, monkeypatch):
    embed(files, tmp_path / "plain")
    PACKERS[name](files, tmp_path / "in" / name)
    shutil.copy(files / "a.wav", tmp_path / "in" / "beside.wav")
    report = embed(tmp_path / "in", tmp_path / "out", files_per_shard=files_per_shard, workers=3)
    assert (report.total, report.files, report.failed) == (4, 4, 0)
    inside = [n.removeprefix("in/") for n in FOUND[name]]
    plain, got = rows(tmp_path / "plain"), rows(tmp_path / "out")
    assert got == {"beside.wav": plain["a.wav"], **{n: plain[o] for n, o in zip(inside, NAMES, strict=True)}}
    listed = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert [row["path"] for row in listed] == ["beside.wav", *inside]  # and the archive as it is read

    before = crew.result(tmp_path / "out")
    monkeypatch.setattr(archives.Reader, "contents", lambda *_: pytest.fail("read"))
    again = embed(tmp_path / "in", tmp_path / "out", files_per_shard=files_per_shard)
    assert (again.before, again.files, again.changed, again.gone) == (4, 0, [], [])
    assert crew.result(tmp_path / "out") == before


@pytest.mark.parametrize("name", PACKERS)
def test_an_archive_is_opened_once_for_all_shards(files, tmp_path, name, monkeypatch):
    """It takes long to find a place in a large one: in zip files their whole list is read, in Parquet a row group."""
    PACKERS[name](files, tmp_path / "in" / name)
    opened, suffix = [], Path(name).suffix.lower()
    real = archives._READERS[suffix]
    monkeypatch.setitem(archives._READERS, suffix, lambda archive: opened.append(archive) or real(archive))
    embed(tmp_path / "in", tmp_path / "out", files_per_shard=1)
    assert len(list((tmp_path / "out").glob("shard-*"))) == 3
    assert len(opened) == 2  # once to learn how many seconds a byte is


@pytest.mark.parametrize("name", PACKERS)
def test_parts_of_an_archive_may_be_read_in_any_order(files, tmp_path, name):
    PACKERS[name](files, tmp_path / "in" / name)
    inside, _ = archives.members(tmp_path / "in" / name)
    reader = archives.Reader(tmp_path / "in" / name)
    for i in (0, 1, 2, 0, 1, 2, 2, 0):
        (data,) = reader.contents([inside[i]])
        with archives.unpacked(data, "") as path:
            assert path.read_bytes() == (files / NAMES[i]).read_bytes()
    broken = reader.contents(inside)
    next(broken)
    broken.close()  # as where a worker stops
    (data,) = reader.contents(inside[1:2])
    with archives.unpacked(data, "") as path:
        assert path.read_bytes() == (files / NAMES[1]).read_bytes()


@pytest.mark.parametrize("name", PACKERS)
def test_names_are_those_of_a_corpus(files, tmp_path, name):
    PACKERS[name](files, tmp_path / "in" / name)
    tar(files, tmp_path / "in" / "twice.tar", ("a.wav", "b.flac", "a.wav"))
    prepare(tmp_path / "in", tmp_path / "corpus")
    embed(tmp_path / "in", tmp_path / "out")
    embed(tmp_path / "corpus", tmp_path / "of corpus")
    assert set(rows(tmp_path / "out")) == set(rows(tmp_path / "of corpus")) > {"twice.tar/a.wav#2"}


@pytest.mark.parametrize("name", PACKERS)
def test_it_may_be_the_source_or_in_a_list_and_so_may_what_it_holds(files, tmp_path, name):
    PACKERS[name](files, tmp_path / "in" / name)
    embed(tmp_path / "in" / name, tmp_path / "alone")
    (tmp_path / "list").write_text(f"files/a.wav\nin/{name}\n{FOUND[name][1]}\n")  # what it holds a second time
    embed(tmp_path / "list", tmp_path / "listed")
    some = FOUND[name][::-1]  # against its order
    (tmp_path / "some").write_text("\n".join([*some, f"in/{name}/not there.wav"]))
    embed(tmp_path / "some", tmp_path / "named")
    alone, listed, named = (rows(tmp_path / n) for n in ("alone", "listed", "named"))
    assert len(alone) == 3
    assert named == {f"in/{n}": values for n, values in alone.items()} == {n: listed[n] for n in some}
    assert set(listed) == {"files/a.wav", *some}
    assert errors(tmp_path / "named") == {f"in/{name}/not there.wav": "no longer in its archive"}


@pytest.mark.parametrize("name", ["x.tar", "x.zip", "x.parquet", "x.tar.gz"])
def test_a_folder_may_be_called_as_one(files, tmp_path, name):
    """As one is that was unpacked, or of the parts that Spark writes."""
    embed(files, tmp_path / "plain")
    files.rename(tmp_path / "in" / name)
    report = embed(tmp_path / "in", tmp_path / "out")
    assert (report.total, report.failed) == (3, 0)
    assert rows(tmp_path / "out") == {f"{name}/{n}": values for n, values in rows(tmp_path / "plain").items()}
    again = embed(tmp_path / "in", tmp_path / "out")
    assert (again.before, again.changed, again.gone) == (3, [], [])


def test_what_is_in_no_archive_is_said(tmp_path):
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"path": ["a.wav"], "label": [3]}), tmp_path / "in" / "labels.parquet")
    with pytest.raises(AudioError, match=r"in: no audio files in this folder or below$"):
        embed(tmp_path / "in", tmp_path / "out")
    with pytest.raises(AudioError, match=r"labels\.parquet: no audio files in this archive$"):
        embed(tmp_path / "in" / "labels.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compressed_one_is_listed_with_what_to_do(files, tmp_path, capsys, monkeypatch):
    tar_gz(files, tmp_path / "in" / "x.Tar.GZ")
    tar_gz(files, tmp_path / "in" / "y.tar")
    (tmp_path / "in" / "notes.gz").touch()
    why = "a compressed tar file: unpack it, or pack it again without compression"
    report = embed(tmp_path / "in", tmp_path / "out")
    assert (report.total, report.failed, errors(tmp_path / "out")) == (2, 2, {"x.Tar.GZ": why, "y.tar": why})
    shutil.copy(files / "a.wav", tmp_path / "in")
    report = embed(tmp_path / "in", tmp_path / "out")
    assert (report.total, report.before, report.files, report.failed) == (3, 2, 1, 2)
    assert cli.main(["embed", str(tmp_path / "in" / "y.tar"), "--out", str(tmp_path / "alone")]) == 3
    assert "1 file could not be used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pack", "name", "found", "reason"),
    [
        (cut_tar, "x.tar", ["b.flac"], "after .* bytes comes neither a file nor the end|damaged|truncated"),
        (headless_tar, "x.tar", ["b.flac"], "damaged: "),
        (half_parquet, "x.parquet", [], "damaged: "),
        (flipped_parquet, "x.parquet", ["c.OGG"], "in a part of its archive that cannot be read: "),
    ],
)
def test_of_a_damaged_one_comes_what_can_be_read_and_once_it_is_mended_the_rest(
    files, tmp_path, pack, name, found, reason
):
    pack(files, tmp_path / "in" / name)
    report = embed(tmp_path / "in", tmp_path / "out")
    assert set(rows(tmp_path / "out")) == {f"{name}/{n}" for n in found}
    told = errors(tmp_path / "out")
    assert report.failed == len(told) > 0
    for why in told.values():
        assert re.search(reason, why), told
    PACKERS[name](files, tmp_path / "in" / name)
    report = embed(tmp_path / "in", tmp_path / "out", retry_errors=True)
    assert (report.total, report.failed, len(rows(tmp_path / "out"))) == (3, 0, 3)


def test_it_goes_on_with_what_is_new_and_tells_what_changed_or_is_gone(files, tmp_path):
    tar(files, tmp_path / "in" / "x.tar", ("a.wav",))
    embed(tmp_path / "in", tmp_path / "out")
    before = crew.result(tmp_path / "out")
    with tarfile.open(tmp_path / "in" / "x.tar", "a") as file:
        file.add(files / "b.flac", "b.flac")
    report = embed(tmp_path / "in", tmp_path / "out")
    assert (report.total, report.before, report.files, report.changed, report.gone) == (2, 1, 1, [], [])
    assert crew.result(tmp_path / "out")["shard-00000.parquet"] == before["shard-00000.parquet"]
    soundfile.write(files / "a.wav", crew.noise(500), RATE)
    tar(files, tmp_path / "in" / "x.tar", ("a.wav",))
    report = embed(tmp_path / "in", tmp_path / "out")
    assert (report.files, report.changed, report.gone) == (0, ["x.tar/a.wav"], ["x.tar/b.flac"])
    shutil.copy(files / "a.wav", tmp_path / "in")
    (tmp_path / "in" / "x.tar").unlink()
    report = embed(tmp_path / "in", tmp_path / "out")
    assert (report.changed, report.gone) == ([], ["x.tar/a.wav", "x.tar/b.flac"])


@pytest.mark.parametrize("name", PACKERS)
def test_an_archive_that_is_replaced_meanwhile_gives_no_wrong_rows(files, tmp_path, name):
    pack = PACKERS[name]
    pack(files, tmp_path / "in" / name, ("a.wav", "b.flac"))
    source = Files(tmp_path / "in")
    names = [f"{name}/a.wav", f"{name}/b.flac"]
    readers = source.readers(names)

    def read(reader) -> np.ndarray:
        return np.concatenate(list(reader(RATE, 1.0)))

    def want(name: str) -> np.ndarray:
        return np.concatenate(list(read_blocks(files / name, RATE, 1.0)))

    (_, first), (_, second) = readers
    np.testing.assert_array_equal(read(first), want("a.wav"))
    pack(files, tmp_path / "in" / name, ("b.flac", "a.wav"))  # while it is read
    with pytest.raises(AudioError, match=f"{name}/b.flac: its archive changed while it was read; try again with"):
        read(second)
    ((_, first), (_, second)) = source.readers(names)  # and what was listed before is listed anew
    np.testing.assert_array_equal(read(first), want("a.wav"))
    np.testing.assert_array_equal(read(second), want("b.flac"))
    pack(files, tmp_path / "in" / name, ("b.flac",))
    ((_, first), (_, second)) = source.readers(names)
    with pytest.raises(AudioError, match=f"{name}/a.wav: no longer in its archive"):
        read(first)
    np.testing.assert_array_equal(read(second), want("b.flac"))
    (tmp_path / "in" / name).unlink()
    with pytest.raises(AudioError, match=f"{name}/a.wav: its archive: cannot be read: No such file"):
        read(next(source.readers(names))[1])


def test_a_tar_file_that_shrinks_while_it_is_read_is_a_reason(files, tmp_path):
    tar(files, tmp_path / "x.tar", ("a.wav",))
    inside, _ = archives.members(tmp_path / "x.tar")
    (extent,) = archives.contents(tmp_path / "x.tar", inside)
    assert isinstance(extent, archives.Extent)
    os.truncate(tmp_path / "x.tar", 1000)
    unpacked = archives.unpacked(extent, ".wav")
    with pytest.raises(AudioError, match="no longer in its archive"), unpacked:
        pass
    (tmp_path / "x.tar").unlink()
    unpacked = archives.unpacked(extent, ".wav")
    with pytest.raises(AudioError, match="cannot be read from its archive: .*No such file"), unpacked:
        pass


def test_each_archive_is_listed_once_by_however_many_threads(files, tmp_path, monkeypatch):
    for i in range(3):
        tar(files, tmp_path / "in" / f"{i}.tar")
    real, listed = archives.members, []
    monkeypatch.setattr(archives, "members", lambda path: listed.append(path.name) or real(path))
    told: list[tuple[int, int]] = []
    embed(tmp_path / "in", tmp_path / "out", workers=4, listing=lambda done, total, note: told.append((done, total)))
    assert sorted(listed) == ["0.tar", "1.tar", "2.tar"]
    assert told[:3] == [(1, 3), (2, 3), (3, 3)]
    packed = Packed(lambda name: tmp_path / "in" / name)
    with ThreadPoolExecutor(8) as pool:
        assert len({id(listing) for listing in pool.map(packed.listing, ["0.tar"] * 64)}) == 1


def test_seconds_are_estimated_by_bytes(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(8):
        soundfile.write(tmp_path / f"{i}.wav", crew.noise(RATE * (i + 1)), RATE, subtype="PCM_16")
    tar(tmp_path, tmp_path / "in" / "x.tar", [f"{i}.wav" for i in range(8)])
    embed(tmp_path / "in", tmp_path / "out", shard_seconds=10)
    listed = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    np.testing.assert_allclose([row["seconds"] for row in listed], range(1, 9), rtol=0.01)
    assert [row["shard"] for row in listed] == [0, 0, 0, 0, 1, 2, 3, 4]  # 1 + 2 + 3 + 4 s, 5 s, 6 s, ...
    assert [row["bytes"] for row in listed] == [(tmp_path / f"{i}.wav").stat().st_size for i in range(8)]


def test_archives_in_an_archive_are_no_seconds_of_audio(files, tmp_path):
    (tmp_path / "inner.zip").write_bytes(bytes(1 << 20))
    with tarfile.open(tmp_path / "in" / "x.tar", "w") as file:
        for i in range(4):
            file.add(tmp_path / "inner.zip", f"{i}.zip")
        file.add(files / "a.wav", "a.wav")
    embed(tmp_path / "in", tmp_path / "out")
    listed = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert {row["path"]: round(row["seconds"], 2) for row in listed} == {
        **{f"x.tar/{i}.zip": 0.0 for i in range(4)},
        "x.tar/a.wav": round(soundfile.info(files / "a.wav").duration, 2),
    }
    assert set(errors(tmp_path / "out")) == {f"x.tar/{i}.zip" for i in range(4)}
    (tmp_path / "in" / "list.txt").write_text("x.tar/a.wav\nx.tar/0.zip\n")
    embed(tmp_path / "in" / "list.txt", tmp_path / "listed")
    assert errors(tmp_path / "listed") == {"x.tar/0.zip": errors(tmp_path / "out")["x.tar/0.zip"]}


def test_a_long_member_streams(files, tmp_path, monkeypatch):
    tar(files, tmp_path / "in" / "x.tar")
    whole = (files / "a.wav").read_bytes()
    (files / "cut.wav").write_bytes(whole[: 3 * len(whole) // 4])
    with tarfile.open(tmp_path / "in" / "x.tar", "a") as file:
        file.add(files / "cut.wav", "cut.wav")
    embed(tmp_path / "in", tmp_path / "want")
    monkeypatch.setattr("matpac_fast.embed.shard.LONG_SECONDS", 0.5)
    monkeypatch.setattr("matpac_fast.embed.shard._BLOCK_SECONDS", (0.2, 0.2))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    there = set(os.listdir(tmp_path))
    embed(tmp_path / "in", tmp_path / "got")
    want, got = rows(tmp_path / "want"), rows(tmp_path / "got")
    assert set(want) == set(got) == {f"x.tar/{name}" for name in NAMES}
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, atol=1e-6)
    assert errors(tmp_path / "want") == errors(tmp_path / "got")
    assert errors(tmp_path / "got")["x.tar/cut.wav"].startswith("truncated: its header says")
    assert set(os.listdir(tmp_path)) == {*there, "got"}  # no file of its own is left


def test_without_room_for_files_of_its_own_it_stops_and_says_so(files, tmp_path, monkeypatch):
    tar(files, tmp_path / "in" / "x.tar")
    shutil.copy(files / "a.wav", tmp_path / "in")
    report = embed(tmp_path / "in", tmp_path / "out", files_per_shard=1)
    assert report.failed == 0
    shutil.copy(tmp_path / "in" / "x.tar", tmp_path / "in" / "y.tar")
    before = crew.result(tmp_path / "out")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(CorpusError, match=r"nowhere: cannot be written: .*; make room, or set TMPDIR"):
        embed(tmp_path / "in", tmp_path / "out", files_per_shard=1)
    assert {name: data for name, data in crew.result(tmp_path / "out").items() if name in before} == before


def test_workers_share_an_archive(files, tmp_path):
    for i in range(4):
        tar(files, tmp_path / "in" / f"{i}.tar")
    workers = [crew.start(tmp_path / "in", tmp_path / "out", 0.02, files_per_shard=2) for _ in range(2)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    embed(tmp_path / "in", tmp_path / "alone", files_per_shard=2)
    assert rows(tmp_path / "out") == rows(tmp_path / "alone")
    assert len(rows(tmp_path / "out")) == 12


def test_names_that_are_no_utf8_are_a_reason_outside_and_escaped_inside(files, tmp_path):
    name = os.fsdecode(b"\xff.tar")
    try:
        tar(files, tmp_path / "in" / name)
    except OSError:
        pytest.skip("this disk takes UTF-8 alone")
    os.rename(files / "a.wav", files / os.fsdecode(b"\xfe.wav"))
    with tarfile.open(tmp_path / "in" / "x.tar", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.add(files / os.fsdecode(b"\xfe.wav"), os.fsdecode(b"\xfe.wav"))
        file.add(files / "b.flac", "é.flac")
    report = embed(tmp_path / "in", tmp_path / "out")
    assert set(rows(tmp_path / "out")) == {"x.tar/\\xfe.wav", "x.tar/é.flac"}
    assert errors(tmp_path / "out") == {"\\xff.tar": "the name is not UTF-8: rename the file"}
    assert embed(tmp_path / "in", tmp_path / "out").before == report.total == 3
