"""Bad input of every kind is a row with a reason; and what can be done about it can be done."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from torch import Tensor

from matpac_fast import cli
from matpac_fast.audio import container, decode
from matpac_fast.cli.embed import summary
from matpac_fast.embed import extract, shard
from matpac_fast.embed import manifest as manifest_module
from matpac_fast.embed import source as source_module
from matpac_fast.embed.extract import embed_collection
from matpac_fast.embed.lease import Leases
from matpac_fast.embed.worker import Report
from matpac_fast.errors import AudioError, ConfigError
from tests.embed import crew

RATE = 8_000


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(4):
        soundfile.write(folder / f"{i}.wav", crew.noise(2_000, seed=i), RATE)
    return folder


def errors(out: Path) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in pq.read_table(out / "errors.parquet").to_pylist()}


def embedded(out: Path) -> set[str]:
    return {name for path in out.glob("shard-*") for name in pq.read_table(path)["path"].to_pylist()}


def test_what_is_no_audio_file_is_a_row_with_its_reason(source, tmp_path, monkeypatch):
    (source / "folder.wav").mkdir()
    shutil.copy(source / "0.wav", source / "folder.wav" / "inside.wav")
    (source / "self.wav").symlink_to(source / "self.wav")
    (source / "gone.wav").symlink_to(source / "nowhere.wav")
    (source / "folder.wav" / "up").symlink_to(source)
    os.mkfifo(source / "pipe.wav")
    for name in ("locked.wav", "film.mp4", "film.webm"):
        shutil.copy(source / "0.wav", source / name)
    (source / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(1_000))
    (source / "film.webm").write_bytes(b"\x1a\x45\xdf\xa3" + bytes(1_000))
    (source / "page.mp3").write_text("<html>404</html>")
    (source / "random.flac").write_bytes(np.random.default_rng(0).bytes(5_000))
    shutil.copy(source / "0.wav", source / "a: b.wav")

    def guarded(file, *args, **rest):
        if os.path.basename(os.fspath(file)) == "locked.wav":
            raise PermissionError(13, "Permission denied")
        return open(file, *args, **rest)

    monkeypatch.setattr(decode, "open", guarded, raising=False)  # file modes do not stop root
    monkeypatch.setattr(container, "is_available", lambda: False)
    report = embed_collection(source, tmp_path / "out", crew.Tiny())
    found = errors(tmp_path / "out")
    told = {
        "folder.wav": "a folder by the name of an audio file",
        "folder.wav/up": "a link to a folder that holds it",
        "self.wav": "cannot be opened: Too many levels of symbolic links",
        "gone.wav": "cannot be opened: No such file or directory",
        "pipe.wav": "not a regular file",
        "locked.wav": "cannot be opened: Permission denied",
    }
    assert told.items() <= found.items()
    assert set(found) - set(told) == {"film.mp4", "film.webm", "page.mp3", "random.flac"}
    assert "no decoder for .mp4 files: pip install 'matpac_fast[video]'" in found["film.mp4"]
    assert all(found.values())
    assert embedded(tmp_path / "out") == {"0.wav", "1.wav", "2.wav", "3.wav", "a: b.wav", "folder.wav/inside.wav"}
    assert report.total == len(found) + 6


@pytest.mark.parametrize("long", [False, True])
def test_a_file_too_loud_once_it_is_resampled_is_a_row_and_the_others_go_on(source, tmp_path, monkeypatch, long):
    if long:
        monkeypatch.setattr(shard, "LONG_SECONDS", 0.05)
    square = 31.5 * np.sign(np.sin(np.arange(44_100) / 16))
    soundfile.write(source / "loud.wav", square.astype(np.float32), 44_100, subtype="FLOAT")
    report = embed_collection(source, tmp_path / "out", crew.Tiny(), 0.1, workers=1)
    assert (report.total, report.failed) == (5, 1)
    assert errors(tmp_path / "out")["loud.wav"].startswith("out of range: a sample of 3")
    assert embedded(tmp_path / "out") == {"0.wav", "1.wav", "2.wav", "3.wav"}


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("way", ["grows", "is replaced", "vanishes"])
def test_a_file_that_changes_while_it_is_read_is_a_row(source, tmp_path, monkeypatch, way, long):
    read = source_module.read_blocks
    if long:
        monkeypatch.setattr(shard, "LONG_SECONDS", 0.05)

    def meanwhile(path, rate, seconds):
        for block in read(path, rate, 0.1):
            if path.name == "1.wav" and path.exists():
                if way == "grows":
                    with open(path, "ab") as file:
                        file.write(bytes(10))
                elif way == "is replaced":
                    shutil.copy(source / "0.wav", source / "new")
                    os.replace(source / "new", path)
                else:
                    path.unlink()
            yield block

    monkeypatch.setattr(source_module, "read_blocks", meanwhile)
    embed_collection(source, tmp_path / "out", crew.Tiny(), 0.1, workers=1)
    reason = "it changed while it was read; try again with --retry-errors once it is at rest"
    assert errors(tmp_path / "out") == {"1.wav": reason}
    assert embedded(tmp_path / "out") == {"0.wav", "2.wav", "3.wav"}


def test_what_failed_is_tried_again_on_request_and_nothing_else(source, tmp_path):
    out = tmp_path / "out"
    good = (source / "1.wav").read_bytes()
    (source / "1.wav").write_bytes(good[:2_000])
    (source / "bad.wav").touch()
    embed_collection(source, out, crew.Tiny(), files_per_shard=2)
    assert set(errors(out)) == {"1.wav", "bad.wav"}
    before = {path.name: path.read_bytes() for path in out.glob("shard-*")}
    (source / "1.wav").write_bytes(good)

    report = embed_collection(source, out, crew.Tiny(), files_per_shard=2)
    assert (report.files, report.failed) == (0, 2)
    report = embed_collection(source, out, crew.Tiny(), files_per_shard=2, retry_errors=True)
    assert (report.total, report.before, report.files, report.failed) == (5, 3, 2, 1)
    assert set(errors(out)) == {"bad.wav"}
    assert embedded(out) == {"0.wav", "1.wav", "2.wav", "3.wav"}
    assert before.items() <= {path.name: path.read_bytes() for path in out.glob("shard-*")}.items()
    again = embed_collection(source, out, crew.Tiny(), files_per_shard=2)
    assert (again.files, again.failed) == (0, 1)


def test_what_is_tried_again_and_again_has_its_rows_once_in_the_end(source, tmp_path):
    out = tmp_path / "out"
    good = (source / "1.wav").read_bytes()
    (source / "1.wav").write_bytes(good[:2_000])
    (source / "more.tar.gz").write_bytes(b"\x1f\x8b")
    for again in (False, True, True):
        report = embed_collection(source, out, crew.Tiny(), 0.05, retry_errors=again)
        assert (report.total, report.failed) == (5, 2)
        assert set(errors(out)) == {"1.wav", "more.tar.gz"}
    (source / "1.wav").write_bytes(good)
    assert embed_collection(source, out, crew.Tiny(), 0.05, retry_errors=True).failed == 1
    assert set(errors(out)) == {"more.tar.gz"}
    starts = [(row["path"], row["start"]) for p in out.glob("shard-*") for row in pq.read_table(p).to_pylist()]
    assert len(starts) == len(set(starts))
    assert {path for path, _ in starts} == {"0.wav", "1.wav", "2.wav", "3.wav"}


def test_files_that_changed_or_vanished_since_are_said_and_their_rows_stay(source, tmp_path):
    out = tmp_path / "out"
    (source / "bad.wav").touch()
    embed_collection(source, out, crew.Tiny(), files_per_shard=1)
    before = {path.name: path.read_bytes() for path in out.glob("shard-*")}
    shard = next(path for path in sorted(out.glob("shard-*")) if pq.read_table(path)["path"].to_pylist() == ["3.wav"])
    shard.unlink()  # so 3.wav is still to be embedded
    for name in ("0.wav", "3.wav", "bad.wav"):
        soundfile.write(source / name, crew.noise(999), RATE)
    (source / "1.wav").unlink()
    report = embed_collection(source, out, crew.Tiny(), files_per_shard=1)
    assert (report.files, report.changed, report.gone) == (1, ["0.wav"], ["1.wav"])
    del before[shard.name]
    assert before.items() <= {path.name: path.read_bytes() for path in out.glob("shard-*")}.items()
    assert summary(report)[-2] == (
        "1 file changed in size and 1 gone since they were embedded (0.wav, 1.wav): their old rows stay; "
        "to be without them, embed into a new folder"
    )
    # What is embedded now, or tried again, is as the folder knows it.
    embed_collection(source, out, crew.Tiny(), retry_errors=True)
    report = embed_collection(source, out, crew.Tiny())
    assert (report.failed, report.changed, report.gone) == (0, ["0.wav"], ["1.wav"])
    many = Report(total=9, changed=["a", "b"], gone=["c", "d"])
    assert "2 files changed in size and 2 gone since they were embedded (a, b, c, ...)" in summary(many)[-1]


@pytest.mark.parametrize("harm", ["cut", "columns"])
def test_a_damaged_manifest_is_one_line_with_what_to_do(source, tmp_path, harm):
    manifest = tmp_path / "out" / "manifest.parquet"
    embed_collection(source, tmp_path / "out", crew.Tiny())
    if harm == "cut":
        os.truncate(manifest, 100)
    else:
        pq.write_table(pq.read_table(manifest).drop(["bytes"]), manifest)
    with pytest.raises(ConfigError) as refused:
        embed_collection(source, tmp_path / "out", crew.Tiny())
    said = str(refused.value)
    assert said.startswith(f"{manifest}: damaged (")
    assert said.endswith("): copy it again, or give a new folder to --out")
    assert "\n" not in said


@pytest.mark.parametrize("name", ["manifest.parquet", "settings.json"])
def test_what_the_disk_does_not_give_is_not_called_damaged(source, tmp_path, monkeypatch, name):
    """Its folder was to be given up then, and is there."""
    embed_collection(source, tmp_path / "out", crew.Tiny())

    def fails(path, *args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(
        *((manifest_module, "read_parquet") if name == "manifest.parquet" else (Path, "read_text")), fails
    )
    with pytest.raises(OSError, match="Input/output error") as refused:
        embed_collection(source, tmp_path / "out", crew.Tiny())
    assert Path(refused.value.filename).name == name


def test_without_its_manifest_nothing_is_taken_for_embedded(source, tmp_path):
    out = tmp_path / "out"
    embed_collection(source, out, crew.Tiny(), 0.1, files_per_shard=1)
    (out / "manifest.parquet").unlink()
    before = crew.result(out)
    with pytest.raises(ConfigError, match=r"manifest.parquet: missing, and there are shards: copy it again, or give"):
        embed_collection(source, out, crew.Tiny(), 0.1, files_per_shard=1)
    assert crew.result(out) == before


def test_a_folder_of_other_things_is_refused_and_nothing_is_written(source, tmp_path):
    for out in (source, tmp_path):
        with pytest.raises(ConfigError, match="is not empty and holds no embeddings; give a new folder to --out"):
            embed_collection(source, out, crew.Tiny())
    with pytest.raises(ConfigError, match="a file, where a folder for the embeddings was expected"):
        embed_collection(source, source / "0.wav", crew.Tiny())
    assert sorted(os.listdir(source)) == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert os.listdir(tmp_path) == ["source"]
    other = tmp_path / "other"
    other.mkdir()
    for text in ('{"made": {}, "encoders": ["a"]}', '{"encoder": "a", "encoder_name": "a", "source": "b"}', "[1]"):
        (other / "settings.json").write_text(text)
        with pytest.raises(ConfigError, match=r"settings.json: of something else than embeddings; give a new folder"):
            embed_collection(source, other, crew.Tiny())
    assert os.listdir(other) == ["settings.json"]
    (tmp_path / "out" / ".cache").mkdir(parents=True)
    assert embed_collection(source, tmp_path / "out", crew.Tiny()).files == 4


def test_too_many_errors_stop_it_before_the_shard_is_written(source, tmp_path, capsys, monkeypatch):
    for i in range(3):
        (source / f"bad {i}.wav").touch()
    out = tmp_path / "out"
    options = dict(files_per_shard=1, workers=1)
    report = embed_collection(source, out, crew.Tiny(), max_errors=1, **options)
    assert report.stopped
    assert embedded(out) == {"0.wav", "1.wav", "2.wav", "3.wav"}  # the longest come first
    assert len(errors(out)) == report.failed == 2
    assert len(list(out.glob("shard-*"))) == 5
    # As many as are allowed are no reason to stop.
    report = embed_collection(source, out, crew.Tiny(), max_errors=3, **options)
    assert (report.stopped, report.failed, report.files) == (False, 3, 2)
    assert list((out / "leases").glob("*")) == []

    command = ["embed", str(source), "--encoder", "untrained-tiny", "--device", "cpu", "--temporal-support", "0.1"]
    assert cli.main([*command, "--out", str(tmp_path / "a"), "--max-errors", "3"]) == 0
    assert cli.main([*command, "--out", str(tmp_path / "a"), "--max-errors", "2"]) == 3
    assert "stopped" not in capsys.readouterr().out  # all was done
    assert cli.main([*command, "--out", str(tmp_path / "b"), "--max-errors", "0"]) == 3
    assert "stopped: too many files could not be used" in capsys.readouterr().out


def test_what_lies_above_a_link_is_where_the_link_leads(source, tmp_path):
    (source / "real" / "sub").mkdir(parents=True)
    (source / "link").symlink_to(Path("real", "sub"))
    soundfile.write(source / "real" / "0.wav", crew.noise(800), RATE)  # shorter than that beside the list
    (source / "list.txt").write_text("link/../0.wav\n")
    embed_collection(source / "list.txt", tmp_path / "out", crew.Tiny())
    (row,) = pq.read_table(tmp_path / "out" / "shard-00000.parquet").to_pylist()
    assert row["path"] == "link/../0.wav"
    assert row["end"] == 0.1


def test_a_list_of_files(source, tmp_path):
    (source / "sub").mkdir()
    os.rename(source / "3.wav", source / "sub" / "3.wav")
    elsewhere = tmp_path / "elsewhere.wav"
    soundfile.write(elsewhere, crew.noise(800), RATE)
    names = [b"\xef\xbb\xbf0.wav", b"./sub/3.wav\r", b"", os.fsencode(elsewhere), b"0.wav", b"none.wav", b"\xff.wav"]
    (source / "list.txt").write_bytes(b"\n".join(names))
    report = embed_collection(source / "list.txt", tmp_path / "out", crew.Tiny())
    assert embedded(tmp_path / "out") == {"0.wav", "sub/3.wav", str(elsewhere)}
    assert errors(tmp_path / "out") == {
        "none.wav": "cannot be opened: No such file or directory",
        "\\xff.wav": "the name is not UTF-8: rename the file",
    }
    assert report.total == 5
    with pytest.raises(AudioError, match=r"no text in UTF-8; expected a folder, or a text file with one path"):
        embed_collection(source / "0.wav", tmp_path / "other", crew.Tiny())
    (source / "list.txt").write_text("\n\n")
    with pytest.raises(AudioError, match="no audio files in this list"):
        embed_collection(source / "list.txt", tmp_path / "other", crew.Tiny())
    assert not (tmp_path / "other").exists()


def test_another_decoder_is_refused_with_what_to_do(source, tmp_path, monkeypatch):
    embed_collection(source, tmp_path / "out", crew.Tiny(), files_per_shard=2)
    before = crew.result(tmp_path / "out")
    (tmp_path / "out" / "shard-00001.parquet").unlink()
    versions = decode.decoder_versions()
    monkeypatch.setattr(extract, "decoder_versions", lambda: {**versions, "libsndfile": "9.9"})
    with pytest.raises(ConfigError) as refused:
        embed_collection(source, tmp_path / "out", crew.Tiny(), files_per_shard=2)
    said = str(refused.value)
    assert f"libsndfile is '{versions['libsndfile']}' there and '9.9' here" in said
    assert f"pip install soundfile=={versions['soundfile']}" in said
    assert "--any-decoder" in said
    embed_collection(source, tmp_path / "out", crew.Tiny(), files_per_shard=2, any_decoder=True)
    settings = [
        json.loads(pq.read_schema(path).metadata[b"matpac_fast"])["settings"]["decoder"]["libsndfile"]
        for path in sorted((tmp_path / "out").glob("shard-*"))
    ]
    assert settings == [versions["libsndfile"], "9.9"]  # each shard says with what it was made
    assert crew.result(tmp_path / "out")["settings.json"] == before["settings.json"]


def test_a_source_that_moved_goes_on_and_another_one_is_refused(source, tmp_path):
    out = tmp_path / "out"
    embed_collection(source, out, crew.Tiny(), files_per_shard=2)
    before = crew.result(out)
    moved = tmp_path / "moved"
    os.rename(source, moved)
    (out / "shard-00000.parquet").unlink()
    embed_collection(moved, out, crew.Tiny(), files_per_shard=2)
    assert crew.result(out) == before
    soundfile.write(moved / "2.wav", crew.noise(999), RATE)
    with pytest.raises(ConfigError, match=r"1 of its 4 files are not the same in .*moved \(such as 2.wav\): give the"):
        embed_collection(moved, out, crew.Tiny(), files_per_shard=2)
    assert crew.result(out) == before
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({**settings, "source": str(moved)}))
    assert embed_collection(moved, out, crew.Tiny(), files_per_shard=2).changed == ["2.wav"]


@pytest.mark.parametrize("there", ["empty", "missing"])
@pytest.mark.parametrize("when", ["before", "joining", "meanwhile"])
def test_a_source_whose_disk_is_away_is_said_and_no_file_is_called_unusable(source, tmp_path, monkeypatch, there, when):
    out, away = tmp_path / "out", tmp_path / "away"
    options = dict(files_per_shard=2, workers=1)
    embed_collection(source, out, crew.Tiny(), **options)
    whole = crew.result(out)
    (out / "shard-00001.parquet").unlink()

    def go_away():
        os.rename(source, away)
        if there == "empty":
            source.mkdir()

    if when == "meanwhile":
        jobs = extract.ShardEmbedder.jobs
        monkeypatch.setattr(extract.ShardEmbedder, "jobs", lambda *of: [*jobs(*of), go_away()][:-1])
    else:
        go_away()
    with Leases(out / "leases") as other:
        if when == "joining":
            other.claim("worker-other")
        with pytest.raises(AudioError, match=r"source: .*, where audio was; is its disk mounted\? Then run the same"):
            embed_collection(source, out, crew.Tiny(), **options)
    assert not (out / "shard-00001.parquet").exists()
    monkeypatch.undo()
    shutil.rmtree(source, ignore_errors=True)
    os.rename(away, source)
    embed_collection(source, out, crew.Tiny(), **options)
    assert crew.result(out) == whole


def test_an_encoder_by_another_name_goes_on_and_another_encoder_is_refused_by_both_names(source, tmp_path):
    out = tmp_path / "out"
    embed_collection(source, out, crew.Tiny(), files_per_shard=2)
    before = crew.result(out)
    (out / "shard-00001.parquet").unlink()
    renamed = crew.Tiny()
    renamed.name = "small"
    embed_collection(source, out, renamed, files_per_shard=2)
    assert crew.result(out) == before
    renamed.settings = {"kind": "another"}
    with pytest.raises(ConfigError, match=r"encoder is .* there and .* here; encoder_name is 'tiny' there and 'small'"):
        embed_collection(source, out, renamed, files_per_shard=2)
    renamed.name = "tiny"
    with pytest.raises(
        ConfigError, match=r"here; both are 'tiny': its weights, its options or --precision changed; give"
    ):
        embed_collection(source, out, renamed, files_per_shard=2)


class Cramped(crew.Tiny):
    """Has memory for two windows at once."""

    def forward_groups(self, groups: list[Tensor], pool: str, layers: str) -> list[Tensor]:
        if sum(map(len, groups)) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward_groups(groups, pool, layers)


@pytest.mark.filterwarnings("ignore:out of memory with [48531]+ windows")
@pytest.mark.parametrize("long", [False, True])
def test_out_of_memory_goes_on_with_the_same_rows(source, tmp_path, monkeypatch, long):
    if long:
        monkeypatch.setattr(shard, "LONG_SECONDS", 0.05)
    with pytest.warns(UserWarning, match="out of memory with 16 windows a batch; going on with 8"):
        embed_collection(source, tmp_path / "cramped", Cramped(), 0.01)
    embed_collection(source, tmp_path / "roomy", crew.Tiny(), 0.01)
    got, want = (pq.read_table(tmp_path / name / "shard-00000.parquet") for name in ("cramped", "roomy"))
    assert got.drop(["embedding"]) == want.drop(["embedding"])
    values = [np.array(table["embedding"].to_pylist()) for table in (got, want)]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_shards_hold_so_many_files_and_so_many_seconds_the_longest_first(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i, seconds in enumerate((0.1, 0.5, 0.2, 0.4, 3.0, 0.1)):
        soundfile.write(source / f"{i}.wav", crew.noise(round(seconds * RATE)), RATE)
    (source / "bad.wav").touch()
    embed_collection(source, tmp_path / "out", crew.Tiny(), files_per_shard=3, shard_seconds=1.0)
    rows = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert [(row["path"], row["shard"]) for row in rows] == [
        ("4.wav", 0),  # one that is longer than a shard
        ("1.wav", 1),
        ("3.wav", 1),
        ("2.wav", 2),
        ("0.wav", 2),
        ("5.wav", 2),
        ("bad.wav", 3),
    ]
    assert [row["seconds"] for row in rows] == pytest.approx([3.0, 0.5, 0.4, 0.2, 0.1, 0.1, 0.0])
