"""Embedding the clips of a corpus: the rows of its files, and reasons for what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from matpac_fast import cli
from matpac_fast.audio.corpus import Corpus
from matpac_fast.audio.prepare import prepare
from matpac_fast.embed.extract import embed_collection
from matpac_fast.embed.source import open_source
from matpac_fast.errors import AudioError, CorpusError
from tests.embed.test_collection import RATE, encoder, encoder_file  # noqa: F401


@pytest.fixture
def audio(tmp_path) -> Path:
    """16-bit files, so that the corpus holds just what they do."""
    random, folder = np.random.default_rng(0), tmp_path / "audio"
    (folder / "sub").mkdir(parents=True)
    for name, seconds in (("b.wav", 2.3), ("sub/a.flac", 1.0), ("c.wav", 0.3)):
        soundfile.write(folder / name, random.normal(0, 0.1, round(seconds * RATE)), RATE, subtype="PCM_16")
    return folder


def table(out: Path) -> list[dict]:
    rows = [row for shard in sorted(out.glob("shard-*.parquet")) for row in pq.read_table(shard).to_pylist()]
    return sorted(rows, key=lambda row: (row["path"], row["start"]))


def test_clips_give_the_rows_of_their_files(audio, tmp_path, encoder):  # noqa: F811
    prepare(audio, tmp_path / "corpus")
    for source, out in ((audio, "of files"), (tmp_path / "corpus", "of clips")):
        report = embed_collection(source, tmp_path / out, encoder, 1.0)
        assert (report.total, report.failed) == (3, 0)
    want, got = table(tmp_path / "of files"), table(tmp_path / "of clips")
    assert [row["path"] for row in got] == ["b.wav", "b.wav", "b.wav", "c.wav", "sub/a.flac"]
    for one, other in zip(want, got, strict=True):
        values = [np.array(row.pop("embedding")) for row in (one, other)]
        np.testing.assert_allclose(*values, rtol=0, atol=1e-6)
        assert one == other


def test_it_goes_on_with_what_is_new_and_tells_what_changed(audio, tmp_path, encoder):  # noqa: F811
    out = tmp_path / "out"
    prepare(audio, tmp_path / "corpus")
    embed_collection(tmp_path / "corpus", out, encoder)
    soundfile.write(audio / "new.wav", np.random.default_rng(1).normal(0, 0.1, RATE), RATE)
    soundfile.write(audio / "b.wav", np.random.default_rng(2).normal(0, 0.1, RATE), RATE)
    prepare(audio, tmp_path / "corpus")
    report = embed_collection(tmp_path / "corpus", out, encoder)
    assert (report.total, report.before, report.files, report.changed, report.gone) == (4, 3, 1, ["b.wav"], [])


def test_another_rate_is_resampled_and_a_lower_one_refused(audio, tmp_path, encoder, capsys, encoder_file):  # noqa: F811
    prepare(audio, tmp_path / "high", sample_rate=32_000)
    prepare(audio, tmp_path / "low", sample_rate=8_000)
    high = Corpus(tmp_path / "high")
    (tmp_path / "files" / "sub").mkdir(parents=True)
    for i, name in enumerate(high.paths):
        soundfile.write(tmp_path / "files" / name, high.read(i), 32_000, subtype="PCM_16")
    embed_collection(tmp_path / "files", tmp_path / "want", encoder, 1.0)
    embed_collection(tmp_path / "high", tmp_path / "got", encoder, 1.0)
    want, got = (np.array([row["embedding"] for row in table(tmp_path / name)]) for name in ("want", "got"))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    arguments = ["embed", str(tmp_path / "low"), "--encoder", str(encoder_file), "--out", str(tmp_path / "no")]
    assert cli.main([*arguments, "--device", "cpu"]) == 2
    assert "a corpus at 8000 Hz, and the encoder takes 16000; prepare one with --sample-rate" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_long_clip_streams(audio, tmp_path, encoder, monkeypatch):  # noqa: F811
    prepare(audio, tmp_path / "corpus")
    embed_collection(tmp_path / "corpus", tmp_path / "want", encoder, 0.5)
    monkeypatch.setattr("matpac_fast.embed.shard.LONG_SECONDS", 0.9)
    monkeypatch.setattr("matpac_fast.embed.shard._BLOCK_SECONDS", (0.4, 0.4))
    embed_collection(tmp_path / "corpus", tmp_path / "got", encoder, 0.5)
    for one, other in zip(table(tmp_path / "want"), table(tmp_path / "got"), strict=True):
        np.testing.assert_allclose(np.array(one.pop("embedding")), np.array(other.pop("embedding")), atol=1e-5)
        assert one == other


def test_a_shard_that_is_cut_short_costs_its_clips_alone(audio, tmp_path, encoder):  # noqa: F811
    prepare(audio, tmp_path / "corpus", shard_seconds=0.1)  # a shard a clip
    number = Corpus(tmp_path / "corpus").paths.index("c.wav")
    os.truncate(tmp_path / "corpus" / "shards" / f"{number:05d}.i16", 100)
    report = embed_collection(tmp_path / "corpus", tmp_path / "out", encoder)
    assert (report.files, report.failed) == (3, 1)
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert [error["path"] for error in errors] == ["c.wav"]
    assert "100 bytes, the index needs 9600: copy or prepare the corpus again" in errors[0]["reason"]


def test_a_corpus_that_is_gone_or_unfinished_is_said(audio, tmp_path, encoder, capsys, encoder_file):  # noqa: F811
    prepare(audio, tmp_path / "corpus")
    embed_collection(tmp_path / "corpus", tmp_path / "out", encoder)
    (tmp_path / "corpus" / "index.parquet").rename(tmp_path / "corpus" / "index.old")
    arguments = ["embed", str(tmp_path / "corpus"), "--encoder", str(encoder_file), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--device", "cpu"]) == 2
    assert "its preparation was interrupted: run the same matpac-fast prepare again" in capsys.readouterr().err
    os.rename(tmp_path / "corpus", tmp_path / "elsewhere")
    with pytest.raises(AudioError, match="is its disk mounted"):
        embed_collection(tmp_path / "corpus", tmp_path / "out", encoder)


def test_a_clip_that_failed_and_is_gone_since_can_be_tried_again(audio, tmp_path, encoder):  # noqa: F811
    prepare(audio, tmp_path / "corpus", shard_seconds=0.1)  # a shard a clip
    number = Corpus(tmp_path / "corpus").paths.index("c.wav")
    os.truncate(tmp_path / "corpus" / "shards" / f"{number:05d}.i16", 100)
    embed_collection(tmp_path / "corpus", tmp_path / "out", encoder)
    os.unlink(audio / "c.wav")
    prepare(audio, tmp_path / "corpus", shard_seconds=0.1)
    report = embed_collection(tmp_path / "corpus", tmp_path / "out", encoder, retry_errors=True)
    assert (report.total, report.failed) == (3, 1)
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert errors == [{"path": "c.wav", "reason": "no longer in the corpus"}]


def test_a_corpus_that_lost_its_shards_is_no_folder_of_files(audio, tmp_path, encoder):  # noqa: F811
    prepare(audio, tmp_path / "corpus")
    embed_collection(tmp_path / "corpus", tmp_path / "out", encoder, files_per_shard=1)
    before = pq.read_table(tmp_path / "out" / "manifest.parquet")
    next((tmp_path / "out").glob("shard-*")).unlink()
    shutil.rmtree(tmp_path / "corpus" / "shards")
    with pytest.raises(CorpusError, match="a corpus without its .*: copy it again, or run the same matpac-fast p"):
        embed_collection(tmp_path / "corpus", tmp_path / "out", encoder)
    assert pq.read_table(tmp_path / "out" / "manifest.parquet").equals(before)


def test_shards_that_go_while_it_embeds_fail_no_clip(audio, tmp_path, encoder):  # noqa: F811
    prepare(audio, tmp_path / "corpus")

    def remove(progress):
        shutil.rmtree(tmp_path / "corpus" / "shards", ignore_errors=True)

    with pytest.raises(AudioError, match="no corpus, where one was; is its disk mounted"):
        embed_collection(tmp_path / "corpus", tmp_path / "out", encoder, progress=remove)
    assert not list((tmp_path / "out").glob("shard-*"))


def test_a_clip_of_fewer_samples_than_one_at_the_encoder_s_rate_is_named(tmp_path, encoder):  # noqa: F811
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "click.wav", np.array([0.5]), 96_000)
    soundfile.write(tmp_path / "audio" / "a.wav", np.random.default_rng(0).normal(0, 0.1, 96_000), 96_000)
    prepare(tmp_path / "audio", tmp_path / "corpus", sample_rate=96_000, min_seconds=0, silence_db=-np.inf)
    report = embed_collection(tmp_path / "corpus", tmp_path / "out", encoder)
    assert (report.total, report.failed) == (2, 1)
    errors = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert errors == [{"path": "click.wav", "reason": "empty: 1 samples at 96000 Hz are none at 16000 Hz"}]


def test_clips_keep_their_names_where_the_corpus_is_prepared_again_meanwhile(audio, tmp_path, encoder):  # noqa: F811
    prepare(audio, tmp_path / "corpus")
    source = open_source(tmp_path / "corpus")
    soundfile.write(audio / "b.wav", np.random.default_rng(2).normal(0, 0.1, RATE), RATE)
    prepare(audio, tmp_path / "corpus")
    assert source.find((), 1, lambda *_: None).files == ["b.wav", "c.wav", "sub/a.flac"]
    ((_, read),) = source.readers(["b.wav"])
    assert sum(map(len, read(RATE, 1.0))) == round(2.3 * RATE)


@pytest.mark.parametrize("kind", ["corpus", "archive"])
def test_a_locale_that_knows_ascii_alone_loses_no_clip(audio, tmp_path, kind):
    os.rename(audio / "b.wav", audio / "\xe9.wav")
    if kind == "corpus":
        prepare(audio, tmp_path / "corpus")
    else:
        (tmp_path / "corpus").mkdir()
        with tarfile.open(tmp_path / "corpus" / "\xe0.tar", "w") as file:
            file.add(audio, "")
    inside = "" if kind == "corpus" else "\xe0.tar/"
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["embed", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), "--encoder", "untrained-nano"]
    command = [sys.executable, "-m", "matpac_fast.cli", *words, "--device", "cpu"]
    done = subprocess.run(command, env={**os.environ, **ascii_alone}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["path"] for row in table(tmp_path / "out")] == [inside + n for n in ("c.wav", "sub/a.flac", "\xe9.wav")]
