"""`matpac-fast embed`: what is said, in what words, with which exit code; which device each worker takes."""

from __future__ import annotations

import contextlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from matpac_fast import cli
from matpac_fast.cli import _progress, embed
from matpac_fast.config import MatpacConfig
from matpac_fast.embed import writer
from matpac_fast.embed.extract import embed_collection
from matpac_fast.embed.manifest import read_manifest
from matpac_fast.embed.worker import Progress, Report
from matpac_fast.model import Matpac
from tests.embed import crew


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(6):
        soundfile.write(folder / f"{i}.wav", crew.noise(4_000, seed=i), 16_000)
    return folder


def command(source: Path, out: Path, *more: str) -> list[str]:
    start = ["embed", str(source), "--encoder", "untrained-tiny", "--device", "cpu", "--temporal-support", "0.1"]
    return [*start, "--out", str(out), "--workers", "1", *more]


def test_the_summary_says_who_did_what_and_what_was_the_limit():
    report = Report(
        files=40,
        rows=200,
        audio_seconds=7200.0,
        model_seconds=30.0,
        waited_seconds=10.0,
        total=100,
        before=35,
        failed=6,
        failed_before=2,
        failed_here=1,
        out=Path("o"),
    )
    assert embed.summary(report) == [
        "94 files embedded in o, 33 of them before, 22 of them by other workers",
        "200 embeddings of 2.00 h of audio in 40.0 s, 180 times real time; the model was the limit",
        "6 files could not be used; o/errors.parquet says why; --retry-errors tries those of before again",
    ]
    report = Report(
        files=1, total=1, rows=1, audio_seconds=4.5, model_seconds=1.0, waited_seconds=2.0, changed=["a"], out=Path("o")
    )
    assert embed.summary(report)[:2] == [
        "1 file embedded in o",
        "1 embedding of 4.5 s of audio in 3.0 s, 1.50 times real time; decoding was the limit",
    ]
    assert embed.summary(report)[2].startswith("1 file changed in size and 0 gone")
    report = Report(total=3, before=1, failed=2, failed_before=1, unusable=1, out=Path("o"))  # an archive nobody reads
    assert embed.summary(report)[-1] == "2 files could not be used; o/errors.parquet says why"


def test_progress_is_told_in_total_and_of_this_worker(monkeypatch):
    told = []
    now = iter([0.0, 10.0, 12.0])
    monkeypatch.setattr(_progress.time, "monotonic", lambda: next(now))
    tell = embed._told(lambda done, total, note="": told.append((done, total, note)))
    tell(Progress(seconds=61.7, total_seconds=600.2, files=5, total_files=50))
    tell(Progress(61.7, 600.2, 5, 50, own_files=2, own_seconds=25.0, workers=3))
    tell(Progress(61.7, 600.2, 5, 50, own_files=2, own_seconds=3.0, workers=3))
    assert told == [
        (61, 600, "5/50 files"),
        (61, 600, "5/50 files, 3 workers, this one 2 files at 2.5/s"),
        (61, 600, "5/50 files, 3 workers, this one 2 files at 4.0 s each"),
    ]


def test_the_bar_of_listing_ends_where_that_of_embedding_begins(monkeypatch):
    told = []

    @contextlib.contextmanager
    def bar(title, unit):
        told.append(f"{title} begins")
        yield lambda done, total, note="": told.append((done, total, unit))
        told.append(f"{title} ends")

    monkeypatch.setattr(_progress, "progress", bar)
    with embed._bars() as (listing, tell):
        listing(3, 9, "")
        tell(Progress(1.0, 2.0))
        tell(Progress(2.0, 2.0))
    assert told == [
        "listing begins",
        (3, 9, "files"),
        "listing ends",
        "embedding begins",
        (1, 2, "s of audio"),
        (2, 2, "s of audio"),
        "embedding ends",
    ]


def test_each_worker_of_a_machine_takes_its_own_gpu(monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert str(embed._device("cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(embed._device("auto")) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert str(embed._device("cuda:1")) == "cuda:1"
    monkeypatch.setenv("SLURM_LOCALID", "6")
    assert str(embed._device("auto")) == "cuda:2"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert str(embed._device("auto")) == "cuda:3"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(embed._device("auto")) == "cpu"


def test_ctrl_c_keeps_what_is_finished_and_gives_back_the_rest(source, tmp_path, capsys, monkeypatch):
    write = writer.Rows.write

    def interrupted(self, out, shard, *rest):
        if shard == 3:
            raise KeyboardInterrupt
        return write(self, out, shard, *rest)

    monkeypatch.setattr(writer.Rows, "write", interrupted)
    assert cli.main(command(source, tmp_path / "out", "--files-per-shard", "1")) == cli.INTERRUPTED
    assert capsys.readouterr().err.splitlines() == [
        "the shards that are finished are kept; the same command goes on from there",
        "matpac-fast embed: interrupted",
    ]
    assert len(list((tmp_path / "out").glob("shard-*"))) == 3
    assert not (tmp_path / "out" / "leases").exists()
    monkeypatch.undo()
    assert cli.main(command(source, tmp_path / "out", "--files-per-shard", "1")) == 0
    assert "6 files embedded" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("shard-*"))) == 6


def test_what_cannot_be_is_one_line_and_exit_code_2(source, tmp_path, capsys):
    for more, line in (
        (["--temporal-support", "-1"], "temporal_support is -1.0 s"),
        (["--files-per-shard", "0"], "files_per_shard is 0"),
        (["--max-errors", "-1"], "max_errors is -1; expected 0 or more"),
        (["--out", str(source)], "is not empty and holds no embeddings"),
        (["--encoder", "nothing"], "no encoder 'nothing'"),
        (["--device", "cuda:99"], "device is 'cuda:99'; torch finds"),
        (["--device", "gpu"], "device is 'gpu'; expected auto, cpu, cuda or cuda:N"),
    ):
        assert cli.main(command(source, tmp_path / "out", *more)) == cli.FAILED
        said = capsys.readouterr()
        assert line in said.err
        assert len(said.err.strip().splitlines()) == 1
    whole = [
        word for word in command(source, tmp_path / "out", "--hop", "1") if word not in ("--temporal-support", "0.1")
    ]
    assert cli.main(whole) == cli.FAILED
    assert "hop is 1.0 s without a temporal_support; give both, or neither" in capsys.readouterr().err
    assert cli.main(command(tmp_path / "nowhere", tmp_path / "out")) == cli.FAILED
    assert "no such folder" in capsys.readouterr().err
    assert cli.main(command(source / "0.wav", tmp_path / "out")) == cli.FAILED
    assert "0.wav: no text in UTF-8; expected a folder, or a text file with one path" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_option_reaches_the_collection(source, tmp_path, capsys):
    more = ["--format", "npy", "--dtype", "float16", "--layers", "all", "--pool", "none", "--hop", "0.05"]
    assert cli.main(command(source, tmp_path / "out", *more, "--remainder", "pad", "--shard-seconds", "0.6")) == 0
    assert len(list((tmp_path / "out").glob("shard-*.npy"))) == 3
    values = np.load(tmp_path / "out" / "shard-00000.npy", mmap_mode="r")
    assert values.dtype == np.float16
    assert values.ndim == 3  # frames, layers, numbers
    assert os.path.exists(tmp_path / "out" / "shard-00000.index.parquet")


def test_options_that_change_no_shard_reach_the_collection_too(source, tmp_path, capsys, monkeypatch):
    asked, loaded = {}, []

    def collected(*args, **options):
        asked.update(inspect.signature(embed_collection).bind(*args, **options).arguments)
        return Report(total=1, out=tmp_path)

    monkeypatch.setattr("matpac_fast.embed.extract.embed_collection", collected)
    monkeypatch.setattr("matpac_fast.encoder.load_encoder", lambda *args, dtype: loaded.append((*args, dtype)))
    more = ["--batch-size", "5", "--files-per-shard", "9", "--max-errors", "8", "--retry-errors", "--any-decoder"]
    more += ["--lease-seconds", "33", "--num-heads", "6", "--precision", "bfloat16"]
    assert cli.main(command(source, tmp_path / "out", *more)) == 0
    assert loaded == [("untrained-tiny", torch.device("cpu"), 6, "bfloat16")]
    wanted = dict(batch_size=5, files_per_shard=9, max_errors=8, retry_errors=True, any_decoder=True, workers=1)
    assert asked.items() >= (wanted | {"lease_seconds": 33.0, "temporal_support": 0.1}).items()


@pytest.mark.parametrize(
    ("failed", "more", "code"),
    [(1, [], 0), (2, [], 3), (1, ["--max-errors", "1"], 0), (1, ["--max-errors", "0"], 3)],
)
def test_it_exits_with_3_where_too_many_files_failed_or_all(source, tmp_path, capsys, monkeypatch, failed, more, code):
    report = Report(total=2, failed=failed, out=tmp_path)
    monkeypatch.setattr("matpac_fast.embed.extract.embed_collection", lambda *_, **__: report)
    monkeypatch.setattr("matpac_fast.encoder.load_encoder", lambda *_, **__: None)
    assert cli.main(command(source, tmp_path / "out", *more)) == code


def test_a_full_disk_is_one_line_with_the_folder(source, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matpac_fast.embed.writer.Rows.add", full)
    assert cli.main(command(source, tmp_path / "out")) == cli.FAILED
    assert capsys.readouterr().err == f"matpac-fast embed: {tmp_path / 'out'}: No space left on device\n"
    assert not list((tmp_path / "out").glob("shard-*"))


def test_a_damaged_checkpoint_is_said_with_one_that_is_whole(source, tmp_path, capsys):
    run = tmp_path / "run"
    for step in (1, 2):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        Matpac(MatpacConfig.preset("nano")).save(folder / "model.safetensors")
        Matpac(MatpacConfig.preset("nano")).save(folder / "optimizer.safetensors")  # any file that is whole
        (folder / "state.json").write_text(f'{{"step": {step}}}')
    (run / "latest").write_text("step-00000002")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-20])
    assert cli.main(command(source, tmp_path / "out", "--encoder", str(run))) == cli.FAILED
    said = capsys.readouterr().err
    assert "step-00000002/model.safetensors: damaged safetensors file" in said
    assert said.endswith(f"step-00000001 is intact: to load it, give {run}/checkpoints/step-00000001\n")
    whole = run / "checkpoints" / "step-00000001"
    assert cli.main(command(source, tmp_path / "out", "--encoder", str(whole))) == 0


@pytest.mark.parametrize("kind", ["parquet", "npz", "npy"])
@pytest.mark.parametrize("name", ["file:", "s3:x", os.fsdecode(b"\xff")])
def test_any_name_does_for_a_folder(source, tmp_path, monkeypatch, capsys, name, kind):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert cli.main(command(source, Path(name), "--format", kind)) == 0
    assert "6 files embedded" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "source"])


def test_a_locale_that_knows_ascii_alone_loses_no_file(source, tmp_path):
    os.rename(source / "0.wav", source / "\xe9.wav")
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    words = command(source, tmp_path / "\xe8", "--encoder", "untrained-nano")
    ran = subprocess.run(
        [sys.executable, "-m", "matpac_fast.cli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **ascii_alone},
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    assert f"6 files embedded in {tmp_path}/\\udcc3\\udca8\n" in ran.stdout
    manifest = read_manifest(tmp_path / "\xe8")
    assert manifest is not None
    assert manifest.homes().keys() == {"\xe9.wav", *(f"{i}.wav" for i in range(1, 6))}


def test_a_list_or_an_encoder_that_is_a_pipe_is_refused_and_not_waited_for(source, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert cli.main(command(tmp_path / "pipe", tmp_path / "out")) == cli.FAILED
    assert "pipe: neither a folder nor a regular file; a list of paths must be one" in capsys.readouterr().err
    assert cli.main(command(source, tmp_path / "out", "--encoder", str(tmp_path / "pipe"))) == cli.FAILED
    assert "pipe: not a regular file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
