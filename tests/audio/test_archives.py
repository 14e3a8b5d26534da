"""Audio in tar, zip and Parquet files: the same clips as from the files themselves, and reasons for what is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from matpac_fast import cli
from matpac_fast.audio import archives
from matpac_fast.audio import prepare as module
from matpac_fast.audio.corpus import Corpus
from matpac_fast.audio.find import APPLE_DOUBLE, find_audio
from matpac_fast.audio.prepare import prepare
from matpac_fast.errors import AudioError, CorpusError
from matpac_fast.files import sha256
from tests.audio.mixed import RATE, rows, snapshot
from tests.audio.packed import (
    NAMES,
    PACKERS,
    cut_tar,
    flipped,
    flipped_parquet,
    flipped_zip,
    half_parquet,
    headless_tar,
    huge_tar,
    locked_zip,
    names_alone,
    numbered_parquet,
    parquet,
    parquet_of_no_utf8,
    tar,
    tar_gz,
    tar_of_archives,
    tar_of_links,
    tar_with_holes,
    zip_of_archives,
    zip_of_no_utf8,
    zip_of_tomorrow,
)


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "files"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        wave = np.random.default_rng(i).normal(size=RATE + 1000 * i).astype(np.float32) / 10
        soundfile.write(folder / name, wave, RATE, format=Path(name).suffix[1:])
    (folder / "notes.txt").write_text("no audio")
    return folder


@pytest.mark.parametrize("name", PACKERS)
def test_an_archive_gives_the_clips_of_its_files(files, tmp_path, name, monkeypatch):
    plain = prepare(files, tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    PACKERS[name](files, tmp_path / "packed" / name)
    report = prepare(tmp_path / "packed", tmp_path / "out")
    inside = [os.path.basename(n) if "parquet" in name else n for n in NAMES]
    assert (report.clips, report.added, report.rejected) == (3, 3, {})
    index, direct = rows(tmp_path / "out" / "index.parquet"), rows(tmp_path / "plain" / "index.parquet")
    assert sorted(index) == sorted(f"{name}/{n}" for n in inside)
    corpora = Corpus(tmp_path / "out"), Corpus(plain.out)
    for there, n in zip(inside, NAMES, strict=True):
        row, other = index[f"{name}/{there}"], direct[n]
        same = ("sha256", "frames", "peak", "source_rate", "source_channels")
        assert [row[key] for key in same] == [other[key] for key in same]
        mine, theirs = (c.read(c.paths.index(p)) for c, p in zip(corpora, (f"{name}/{there}", n), strict=True))
        np.testing.assert_array_equal(mine, theirs)

    alone = prepare(tmp_path / "packed" / name, tmp_path / "alone")  # the archive itself: the same corpus
    assert alone.clips == 3
    assert snapshot(tmp_path / "alone", times=False) == snapshot(tmp_path / "out", times=False)

    # Again it reads nothing and writes nothing; once the archive is touched it reads, and decodes nothing.
    before = snapshot(tmp_path / "out")
    monkeypatch.setattr(archives, "contents", lambda *_: pytest.fail("read"))
    again = prepare(tmp_path / "packed", tmp_path / "out")
    assert (again.clips, again.added, snapshot(tmp_path / "out")) == (3, 0, before)
    monkeypatch.undo()
    os.utime(tmp_path / "packed" / name)
    touched = prepare(tmp_path / "packed", tmp_path / "out")
    assert (touched.clips, touched.added, touched.replaced) == (3, 0, 0)


def test_archives_lie_beside_files_and_may_call_two_members_the_same(files, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    shutil.copy(files / "a.wav", tmp_path / "in")
    shutil.copy(files / "b.flac", tmp_path / "in" / "z.flac")
    tar(files, tmp_path / "in" / "sub" / "x.tar", ("a.wav", "b.flac", "a.wav"))
    pq.write_table(pa.table({"path": ["a.wav"]}), tmp_path / "in" / "labels.parquet")  # of no audio
    (tmp_path / "in" / "spark.parquet").mkdir()
    told = []
    report = prepare(tmp_path / "in", tmp_path / "out", workers=3, listing=lambda *each: told.append(each))
    assert told == [(1, 2), (2, 2)]
    want = ["a.wav", "sub/x.tar/a.wav", "sub/x.tar/a.wav#2", "sub/x.tar/b.flac", "z.flac"]
    assert (sorted(rows(tmp_path / "out" / "index.parquet")), report.rejected) == (want, {})


@pytest.mark.parametrize("between", [0, 10_240 * 200])
def test_tar_files_that_cat_has_joined_are_read_to_the_last(files, tmp_path, between):
    (tmp_path / "in").mkdir()
    tar(files, tmp_path / "one.tar")
    tar(files, tmp_path / "two.tar", ("b.flac", "notes.txt"))
    one, two = ((tmp_path / name).read_bytes() for name in ("one.tar", "two.tar"))
    (tmp_path / "in" / "x.tar").write_bytes(one + bytes(between) + two)
    report = prepare(tmp_path / "in", tmp_path / "out")
    want = ["x.tar/a.wav", "x.tar/b.flac", "x.tar/b.flac#2", "x.tar/deep/c.OGG"]
    index = rows(tmp_path / "out" / "index.parquet")
    assert (sorted(index), report.rejected) == (want, {})
    assert index["x.tar/b.flac#2"]["sha256"] == index["x.tar/b.flac"]["sha256"]
    (tmp_path / "in" / "x.tar").write_bytes(one + two[:2_000])
    assert list(prepare(tmp_path / "in", tmp_path / "cut").rejected) == ["damaged", "truncated"]
    (tmp_path / "in" / "x.tar").write_bytes(one + b"something else")
    assert prepare(tmp_path / "in", tmp_path / "odd").rejected == {"damaged": 1}


@pytest.mark.parametrize(
    ("of_bytes", "of_path"),
    [
        (pa.large_binary(), pa.large_string()),
        (pa.binary_view(), pa.string_view()),
        (pa.dictionary(pa.int32(), pa.binary()), pa.dictionary(pa.int32(), pa.string())),
    ],
)
def test_columns_of_all_types_that_arrow_has_for_bytes_are_read(files, tmp_path, of_bytes, of_path):
    columns = [pa.array([(files / "a.wav").read_bytes()], of_bytes), pa.array(["a.wav"], of_path)]
    table = pa.table({"audio": pa.StructArray.from_arrays(columns, ["bytes", "path"])})
    try:
        pq.write_table(table, tmp_path / "x.parquet")
    except pa.ArrowNotImplementedError:
        if of_bytes != pa.binary_view():
            raise
        pytest.skip(f"waits for a pyarrow that writes views to Parquet; this is {pa.__version__}")
    inside, reason = archives.members(tmp_path / "x.parquet")
    assert ([member.name for member in inside], reason) == (["a.wav"], None)
    assert list(archives.contents(tmp_path / "x.parquet", inside)) == [(files / "a.wav").read_bytes()]


def test_the_column_called_audio_comes_before_others_that_hold_bytes(files, tmp_path):
    cell = {"bytes": (files / "b.flac").read_bytes(), "path": "b.flac"}
    table = pa.table({"image": pa.array([{"bytes": b"a picture", "path": "b.png"}]), "audio": pa.array([cell])})
    pq.write_table(table, tmp_path / "x.parquet")
    inside, reason = archives.members(tmp_path / "x.parquet")
    assert ([member.name for member in inside], reason) == (["b.flac"], None)
    assert list(archives.contents(tmp_path / "x.parquet", inside)) == [cell["bytes"]]


def test_rows_that_are_all_called_the_same_are_numbered(tmp_path):
    """So many that a search for each one's number, from the first on, would take half a minute."""
    table = pa.table(
        {"audio": pa.array(20_000 * [{"bytes": b"", "path": "audio.wav"}] + [{"path": "audio.wav#20001"}])}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    found = module._found(tmp_path, [tmp_path / "x.parquet"], [], lambda path: None, lambda done, total: None)
    names = [f"x.parquet/audio.wav{f'#{i}' if i > 1 else ''}" for i in range(1, 20_001)]
    assert list(found) == [*names, "x.parquet/audio.wav#20001"]


def test_a_changed_archive_replaces_the_clips_that_changed(files, tmp_path):
    (tmp_path / "in").mkdir()
    tar(files, tmp_path / "in" / "x.tar")
    prepare(tmp_path / "in", tmp_path / "out")
    soundfile.write(files / "a.wav", np.random.default_rng(9).normal(size=RATE) / 10, RATE)
    soundfile.write(files / "new.wav", np.random.default_rng(8).normal(size=RATE) / 10, RATE)
    tar(files, tmp_path / "in" / "x.tar", ("new.wav", "a.wav", "b.flac"))
    report = prepare(tmp_path / "in", tmp_path / "out")
    assert (report.clips, report.added, report.replaced, report.vanished) == (4, 1, 1, 1)


def test_an_archive_that_is_replaced_after_it_was_listed_is_read_again_by_the_next_run(files, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    archive, list_members = tmp_path / "in" / "x.tar", archives.members
    soundfile.write(files / "c.wav", np.random.default_rng(9).normal(size=RATE) / 10, RATE)
    soundfile.write(files / "a.wav", np.random.default_rng(8).normal(size=RATE) / 10, RATE)

    def list_then_replace(path: Path):
        listed = list_members(path)
        tar(files, archive, ("c.wav", "a.wav"))  # each where the other was
        return listed

    tar(files, archive, ("a.wav", "c.wav"))
    os.utime(archive, (1, 1))
    monkeypatch.setattr(archives, "members", list_then_replace)
    prepare(tmp_path / "in", tmp_path / "out")
    monkeypatch.undo()
    prepare(tmp_path / "in", tmp_path / "out")
    index = rows(tmp_path / "out" / "index.parquet")
    assert {path: row["sha256"] for path, row in index.items()} == {
        f"x.tar/{name}": sha256(files / name) for name in ("a.wav", "c.wav")
    }


def test_the_clips_of_an_archive_that_cannot_be_read_any_more_are_kept(files, tmp_path):
    (tmp_path / "in").mkdir()
    parquet(files, tmp_path / "in" / "x.parquet")
    prepare(tmp_path / "in", tmp_path / "out")
    half_parquet(files, tmp_path / "in" / "x.parquet")
    report = prepare(tmp_path / "in", tmp_path / "out")
    assert (report.clips, report.vanished, report.rejected) == (3, 3, {"damaged": 1})


@pytest.mark.parametrize("name", PACKERS)
def test_names_are_the_same_in_a_locale_of_ascii_alone(files, tmp_path, name):
    (tmp_path / "in").mkdir()
    renamed = {"b.flac": "日本.flac", "a.wav": "é.wav"}
    for old, new in renamed.items():
        os.rename(files / old, files / new)
    names = [renamed.get(n, n) for n in NAMES]
    PACKERS[name](files, tmp_path / "in" / name, names)
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "matpac_fast.cli", "prepare", str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, **ascii_alone}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inside = [os.path.basename(n) if "parquet" in name else n for n in names]
    assert sorted(rows(tmp_path / "out" / "index.parquet")) == sorted(f"{name}/{n}" for n in inside)


@pytest.mark.parametrize(
    ("pack", "name", "kept", "left_out"),
    [
        (
            tar_of_links,
            "x.tar",
            ["x.tar/a.wav"],
            {
                "x.tar/hard.wav": "a link in a tar file: pack that again",
                "x.tar/pipe.wav": "not a regular file",
                "x.tar/soft.wav": "a link in a tar file: pack that again",
            },
        ),
        (tar_with_holes, "x.tar", ["x.tar/a.wav"], {"x.tar/holes.wav": "a file with holes in a tar file: pack that"}),
        *(
            (
                pack,
                f"x.{suffix}",
                [f"x.{suffix}/a.wav"],
                {f"x.{suffix}/{name}": "an archive in an archive, " for name in ("deep/in.zip", "in.tar.gz")},
            )
            for pack, suffix in ((tar_of_archives, "tar"), (zip_of_archives, "zip"))
        ),
        (tar_gz, "x.tar", [], {"x.tar": "a compressed tar file: unpack it"}),
        (lambda files, path: os.mkfifo(path), "x.zip", [], {"x.zip": "not a regular file"}),
        (huge_tar, "x.tar", ["x.tar/b.flac"], {"x.tar": "", "x.tar/huge.wav": "truncated: its archive ends before it"}),
        (flipped(zipfile.ZIP_LZMA), "x.zip", ["x.zip/b.flac"], {"x.zip/a.wav": "cannot be read from its archive: "}),
        (flipped(zipfile.ZIP_BZIP2), "x.zip", ["x.zip/b.flac"], {"x.zip/a.wav": "cannot be read from its archive: "}),
        (zip_of_no_utf8, "x.zip", [], {"x.zip": "damaged: "}),
        (zip_of_tomorrow, "x.zip", [], {"x.zip": "damaged: zip file version"}),
        (locked_zip, "x.zip", ["x.zip/a.wav", "x.zip/deep/c.OGG"], {"x.zip/b.flac": "encrypted: unpack its archive"}),
        (parquet_of_no_utf8, "x.parquet", [r"x.parquet/\xff.wav"], {}),
        (numbered_parquet, "x.parquet", ["x.parquet/00000000"], {}),
        (
            flipped_parquet,
            "x.parquet",
            ["x.parquet/c.OGG"],
            {f"x.parquet/{name}": "in a part of its archive that cannot be read: " for name in ("a.wav", "b.flac")},
        ),
        (cut_tar, "x.tar", ["x.tar/b.flac"], {"x.tar": "damaged: ", "x.tar/a.wav": "truncated: its archive ends"}),
        (headless_tar, "x.tar", ["x.tar/b.flac"], {"x.tar": "damaged: after "}),
        (flipped_zip, "x.zip", ["x.zip/b.flac", "x.zip/deep/c.OGG"], {"x.zip/a.wav": "cannot be read from its arch"}),
        (half_parquet, "x.parquet", [], {"x.parquet": "damaged: "}),
        (names_alone, "x.parquet", ["x.parquet/00000000"], {"x.parquet/x.wav": "no audio in its row, a name alone"}),
        (lambda files, path: path.write_bytes(b"x" * 3000), "x.tar", [], {"x.tar": "damaged: "}),
        (lambda files, path: path.write_bytes(b""), "x.zip", [], {"x.zip": "damaged: "}),
    ],
)
def test_what_is_damaged_is_named_and_the_rest_is_taken(files, tmp_path, pack, name, kept, left_out):
    (tmp_path / "in").mkdir()
    pack(files, tmp_path / "in" / name)
    if not kept:
        with pytest.raises(CorpusError, match=f"{name}: {left_out[name]}.*rejected.parquet has"):
            prepare(tmp_path / "in", tmp_path / "out")
    for _ in range(2):  # and again
        if kept:
            assert prepare(tmp_path / "in", tmp_path / "out").clips == len(kept)
            assert sorted(rows(tmp_path / "out" / "index.parquet")) == kept
        rejected = rows(tmp_path / "out" / "rejected.parquet") if left_out else {}
        assert list(rejected) == list(left_out)
        assert not any("\n" in row["reason"] for row in rejected.values())
        assert all(rejected[path]["reason"].startswith(reason) for path, reason in left_out.items())


@pytest.mark.parametrize("name", ["x.tar.gz", "X.TGZ", "x.tar.bz2", "x.tbz2", "x.Tar.Xz", "x.txz", "x.tar.zst"])
def test_a_compressed_tar_file_is_left_out_with_its_reason(files, tmp_path, name):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    tar_gz(files, tmp_path / "in" / "deep" / name)
    reason = "a compressed tar file: unpack it, or pack it again without compression"
    with pytest.raises(CorpusError, match=rf"in: its one audio file cannot be used \(deep/{name}: {reason}\); "):
        prepare(tmp_path / "in", tmp_path / "out")
    shutil.copy(files / "a.wav", tmp_path / "in")
    (tmp_path / "in" / "notes.gz").touch()  # of whatever
    (tmp_path / "in" / ".tar.gz").touch()
    told = []
    report = prepare(tmp_path / "in", tmp_path / "out", listing=lambda *each: told.append(each))
    assert (report.clips, report.rejected, told) == (1, {"a compressed tar file": 1}, [(1, 1)])
    rejected = rows(tmp_path / "out" / "rejected.parquet")
    assert {path: row["reason"] for path, row in rejected.items()} == {f"deep/{name}": reason}
    before = snapshot(tmp_path / "out")
    again = prepare(tmp_path / "in", tmp_path / "out")
    assert (again.clips, again.added, again.rejected, snapshot(tmp_path / "out")) == (1, 0, report.rejected, before)
    tar(files, tmp_path / "in" / "deep" / "x.tar")  # as it was told
    (tmp_path / "in" / "deep" / name).unlink()
    report = prepare(tmp_path / "in", tmp_path / "out")
    assert (report.clips, report.added, report.rejected) == (4, 3, {})


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_file_without_audio_is_none_of_ours(files, tmp_path, kind, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "notes.txt").write_text("a" * 1000)
    with tarfile.open(tmp_path / "in" / f"code.tar.{kind}", f"w:{kind}") as file:
        file.add(tmp_path / "notes.txt", "notes.txt")
        file.add(files, "folder.wav", recursive=False)
    assert archives.members(tmp_path / "in" / f"code.tar.{kind}") == ([], None)
    shutil.copy(files / "a.wav", tmp_path / "in")
    assert prepare(tmp_path / "in", tmp_path / "out").rejected == {}
    monkeypatch.setattr(archives, "_BEGIN", 1000)  # what comes after it may be audio
    assert prepare(tmp_path / "in", tmp_path / "out").rejected == {"a compressed tar file": 1}


def test_an_archive_that_ends_while_it_is_read_leaves_reasons(files, tmp_path):
    parquet(files, tmp_path / "x.parquet")
    inside, reason = archives.members(tmp_path / "x.parquet")
    assert (len(inside), reason) == (3, None)
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    second = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(1).column(1).data_page_offset
    data[second : second + 40] = bytes(40)
    (tmp_path / "x.parquet").write_bytes(data)
    found = list(archives.contents(tmp_path / "x.parquet", inside))
    assert [type(each) for each in found] == [bytes, bytes, AudioError]


@pytest.mark.parametrize("name", PACKERS)
def test_an_archive_that_is_replaced_while_it_is_read_leaves_reasons(files, tmp_path, name):
    archive = tmp_path / name
    PACKERS[name](files, archive)
    inside, _ = archives.members(archive)
    if name == "x.tar":
        tar(files, archive, [])
    elif name == "x.ZIP":
        zipfile.ZipFile(archive, "w").close()
    else:
        pq.write_table(pa.table({"label": [1, 2, 3]}), archive)
    found = list(archives.contents(archive, inside))
    assert [type(each) for each in found] == 3 * [AudioError]


def test_a_member_of_another_name_in_the_same_place_is_not_taken_for_it(tmp_path):
    archive = tmp_path / "x.zip"
    for name in ("a.wav", "b.wav"):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(name, name)
        if name == "a.wav":
            wanted, _ = archives.members(archive)
    (found,) = archives.contents(archive, wanted)
    assert isinstance(found, AudioError)
    assert "changed meanwhile" in str(found)


def test_a_small_member_that_unpacks_to_much_is_never_in_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.wav", bytes(1 << 26))
        file.writestr("b.wav", b"b")
    inside, _ = archives.members(tmp_path / "x.zip")
    tracemalloc.start()
    found = list(archives.contents(tmp_path / "x.zip", inside))  # all before one is unpacked, as where many decode
    for data, size in zip(reversed(found), (1, 1 << 26), strict=True):
        with archives.unpacked(data, ".wav") as path:
            assert path.stat().st_size == size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_the_list_of_a_tar_file_keeps_nothing_of_what_is_no_audio(tmp_path):
    with open(tmp_path / "x.tar", "wb") as file:
        for i in range(5000):
            file.write(tarfile.TarInfo(f"{i}.json").tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(1024))
    path = tmp_path / "x.tar"
    archives.members(path)  # so that Python's own table of names, some megabytes, does not grow meanwhile
    tracemalloc.start()
    assert archives.members(path) == ([], None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000


def test_of_a_large_row_group_a_part_is_held(tmp_path):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    audio = [{"bytes": np.random.default_rng(i).bytes(1 << 20), "path": f"{i}.wav"} for i in range(64)]
    table = pa.table({"audio": pa.array(audio, kind)})
    pq.write_table(table, tmp_path / "x.parquet", use_dictionary=False, compression="none", write_batch_size=1)
    del audio, table
    inside, _ = archives.members(tmp_path / "x.parquet")
    before = pa.total_allocated_bytes()
    first = next(found := archives.contents(tmp_path / "x.parquet", inside))
    assert isinstance(first, bytes)
    assert pa.total_allocated_bytes() - before < 10 << 20
    del found


def test_a_full_temporary_folder_ends_it_with_what_to_do(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    tar(files, tmp_path / "in" / "x.tar")

    full = tmp_path / "full.wav"
    full.symlink_to("/dev/full")
    monkeypatch.setattr(archives.tempfile, "mkstemp", lambda suffix: (os.open(full, os.O_WRONLY), str(full)))
    assert cli.main(["prepare", str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    assert "No space left on device; make room, or set TMPDIR to another folder" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("shards/*"))


def test_the_column_of_audio_is_told_from_others(files, tmp_path):
    sound, picture = (files / "a.wav").read_bytes(), b"\x89PNG and more"
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    image, speech = (pa.array([{"bytes": data, "path": name}], kind) for data, name in ((picture, "p"), (sound, "s")))
    features = {
        "info": {"features": {"image": {"_type": "Image"}, "speech": {"sampling_rate": 16000, "_type": "Audio"}}}
    }
    described = pa.table({"image": image, "speech": speech}).replace_schema_metadata(
        {"huggingface": json.dumps(features)}
    )
    no_audio = {"info": {"features": {"image": {"_type": "Image"}}}}
    pictures = pa.table({"image": image}).replace_schema_metadata({"huggingface": json.dumps(no_audio)})
    tables = {
        "described": described,
        "named": pa.table({"image": image, "audio": speech}),
        "bytes alone": pa.table({"other": pa.array([picture], pa.binary()), "audio": pa.array([sound], pa.binary())}),
        "first": pa.table({"label": [1], "speech": speech, "image": image}),
        "by its bytes": pa.table({"hash": pa.array([picture], pa.binary()), "flac": pa.array([sound], pa.binary())}),
    }
    for name, table in tables.items():
        pq.write_table(table, tmp_path / "x.parquet")
        inside, reason = archives.members(tmp_path / "x.parquet")
        assert reason is None, name
        assert list(archives.contents(tmp_path / "x.parquet", inside)) == [sound], name
    hashes, none = (pa.table({"hash": pa.array(rows, pa.binary())}) for rows in ([picture, None], []))
    tables = (pictures, pa.table({"embedding": [[1.0]], "path": ["a"]}), pa.table({"audio": ["a.wav"]}), hashes, none)
    for table in tables:
        pq.write_table(table, tmp_path / "x.parquet")
        assert archives.members(tmp_path / "x.parquet") == ([], None)


@pytest.mark.parametrize("kind", [pa.list_(pa.binary()), pa.struct({"array": pa.list_(pa.float32())}), pa.int64()])
def test_a_column_audio_of_something_else_is_said(tmp_path, kind):
    pq.write_table(pa.table({"audio": pa.array([None], kind)}), tmp_path / "x.parquet")
    inside, reason = archives.members(tmp_path / "x.parquet")
    kind = str(kind).replace("item", "element")  # as Parquet calls it
    assert inside == []
    assert reason == f"no bytes in its column audio: it is of {kind}; expected bytes, alone or in a struct as `bytes`"
    wanted = [archives.Member(tmp_path / "x.parquet", "a", 0, 1)]
    (found,) = archives.contents(tmp_path / "x.parquet", wanted)
    assert isinstance(found, AudioError)


@pytest.mark.parametrize("name", ["x.tar", "x.ZIP"])
def test_what_macos_keeps_about_files_is_no_audio(files, tmp_path, name):
    kept = "__MACOSX/._a.wav" if name == "x.ZIP" else "._a.wav"
    (files / kept).parent.mkdir(exist_ok=True)
    (files / kept).write_bytes(APPLE_DOUBLE + bytes(200))
    shutil.copy(files / "a.wav", files / "._b.wav")  # which is only called so
    PACKERS[name](files, tmp_path / name, (kept, "a.wav", "._b.wav"))
    inside, reason = archives.members(tmp_path / name)
    assert ([member.name for member in inside], reason) == (["a.wav", "._b.wav"], None)
    (files / "._x.tar").write_bytes(APPLE_DOUBLE)
    found = {path.name for path in find_audio(files, also=archives.ARCHIVES)}
    assert "._b.wav" in found
    assert not {"._a.wav", "._x.tar"} & found
