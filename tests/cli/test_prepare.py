"""`matpac-fast prepare`: what is said, on which stream, with which exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from matpac_fast import cli
from matpac_fast.audio.corpus import Corpus
from matpac_fast.audio.prepare import PrepareReport
from matpac_fast.cli._quiet import quiet_libraries
from matpac_fast.cli.prepare import summary
from matpac_fast.errors import ConfigError

RATE = 16_000


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", np.sin(np.arange(RATE) / (9 + i)), RATE)
    (folder / "empty.wav").touch()
    return folder


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_summary_says_what_was_used_and_what_was_not(source, tmp_path, capsys):
    out = tmp_path / "corpus"
    assert cli.main(["prepare", str(source), str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        f"{out}: 3 clips, 3.0 s, 1 shard; 3 added",
        f"1 file left out: 1 empty; {out}/rejected.parquet says which and why",
        f"next: matpac-fast pretrain {out} --out runs/a --preset tiny --steps 2000",
    ]
    assert said.err == ""
    assert len(Corpus(out)) == 3
    assert cli.main(["prepare", str(source), str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 3 clips, 3.0 s, 1 shard; 0 added\n1 file left out")


def test_every_option_reaches_the_corpus(source, tmp_path, monkeypatch):
    asked = {}

    def prepared(*_, **options):
        asked.update(options)
        raise ConfigError("that is all")

    monkeypatch.setattr("matpac_fast.audio.prepare.prepare", prepared)
    words = ["--sample-rate", "8000", "--workers", "1", "--shard-seconds", "9", "--min-seconds", "0.3"]
    assert cli.main(["prepare", str(source), str(tmp_path), *words, "--silence-db", "-50"]) == cli.FAILED
    wanted = dict(sample_rate=8_000, workers=1, shard_seconds=9.0, min_seconds=0.3, silence_db=-50.0)
    assert asked.items() >= wanted.items()


def test_a_corpus_that_training_does_not_take_is_not_sent_there(source, tmp_path, capsys):
    assert cli.main(["prepare", str(source), str(tmp_path / "corpus"), "--sample-rate", "8000"]) == 0
    assert "next:" not in capsys.readouterr().out


def test_the_summary_says_what_went_with_its_shard(source, tmp_path, capsys):
    out = tmp_path / "corpus"
    cli.main(["prepare", str(source), str(out)])
    (out / "shards" / "00000.i16").unlink()
    (source / "0.wav").unlink()
    capsys.readouterr()
    assert cli.main(["prepare", str(source), str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"{out}: 2 clips, 2.0 s, 1 shard; 0 added",
        "2 clips made again, because a shard was gone or cut short",
        "1 clip dropped: lost with a shard, and the file is gone too or cannot be used",
    ]


def test_the_summary_of_a_corpus_brought_up_to_date_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    report = PrepareReport(Path("c"), 1200, 9000.0, 3, 1, 2, 1, 1, {"silent": 2, "damaged": 1})
    assert summary(report).splitlines() == [
        "c: 1200 clips, 2.50 h, 3 shards; 1 added",
        "2 clips replaced, because the file had changed",
        "1 clip kept, whose file is no longer in the source",
        "1 new clip went beyond full scale in places and was clipped there",
        "3 files left out: 2 silent, 1 damaged; c/rejected.parquet says which and why",
        "next: matpac-fast pretrain c --out runs/a",
    ]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda source: [str(source / "missing"), "c"], "missing: no such folder"),
        (lambda source: [str(source), str(source)], "holds other files; give a new or empty folder"),
        (lambda source: [str(source), "c", "--workers", "0"], "workers is 0; expected more than 0"),
        (lambda source: [str(source), "c", "--min-seconds", "-1"], "min_seconds is -1.0; expected seconds, 0 or more"),
        (lambda source: [str(source), "c", "--silence-db", "nan"], "silence_db is nan; expected a level below 0 dB"),
        (lambda source: [str(source), "c", "--silence-db", "5"], "silence_db is 5.0; expected a level below 0 dB"),
        (lambda source: [str(source), "c", "--min-seconds", "60"], "(0.wav: too short: 1 s, less than 60 s)"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(source, tmp_path, capsys, monkeypatch, make, line):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *make(source)]) == cli.FAILED
    said = capsys.readouterr()
    assert line in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert said.out == ""


def test_one_file_that_cannot_be_used_is_said_in_the_singular(tmp_path, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "empty.wav").touch()
    assert cli.main(["prepare", str(tmp_path / "one"), str(tmp_path / "c")]) == cli.FAILED
    assert "one: its one audio file cannot be used (empty.wav: empty" in capsys.readouterr().err


def test_libraries_are_quiet_and_python_is_not():
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])  # the module alone, without importing the package
from _quiet import quiet_libraries
with quiet_libraries():
    os.write(2, b"library\\n")
    print("python", file=sys.stderr)
os.write(2, b"library again\\n")
print("python again", file=sys.stderr)
"""
    command = [sys.executable, "-c", code, str(Path(cli.__file__).parent)]
    environment = {**os.environ, "MATPAC_FAST_DEBUG": ""}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.stderr.split("\n") == ["python", "library again", "python again", ""]
    environment["MATPAC_FAST_DEBUG"] = "1"
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.stderr.startswith("library\npython\n")


def test_an_error_passes_through_the_quiet(capfd):
    before = sys.stderr
    with pytest.raises(KeyError), quiet_libraries():
        raise KeyError
    assert sys.stderr is before
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(source, tmp_path):
    out = tmp_path / "corpus"
    for i in range(297):
        os.link(source / "0.wav", source / f"more {i}.wav")
    command = [sys.executable, "-m", "matpac_fast.cli", "prepare", str(source), str(out), "--shard-seconds", "4"]

    def start() -> subprocess.Popen[str]:
        # A background job ignores SIGINT, and so would what it starts.
        reset = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=reset, cwd=tmp_path)

    process = start()
    deadline = time.monotonic() + 120
    while len(list(out.glob("shards/*.i16"))) < 2:  # so the first one is in the index
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)
    assert process.returncode == cli.INTERRUPTED, said
    assert said[1].splitlines() == [
        "the shards that are finished are kept; the same command goes on from there",
        "matpac-fast prepare: interrupted",
    ]
    assert "next:" not in said[0]
    again = start()
    said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert len(Corpus(out)) == 300
    added = int(said[0].partition(" added")[0].rpartition("; ")[2])
    assert 0 < added < 300


@pytest.mark.parametrize("name", ["file:", "file:x", "s3:x", os.fsdecode(b"\xff")])
def test_any_name_does_for_a_corpus(source, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert cli.main(["prepare", str(source), name]) == 0
    assert sorted(path.name for path in Path(name).iterdir()) == ["index.parquet", "rejected.parquet", "shards"]
    assert Corpus(name).paths == ["0.wav", "1.wav", "2.wav"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "source"])


def test_a_folder_that_is_a_link_to_nothing_is_said(source, tmp_path, capsys):
    (tmp_path / "link").symlink_to("nowhere")
    assert cli.main(["prepare", str(source), str(tmp_path / "link")]) == cli.FAILED
    assert "link: a link to nothing, where a folder for the corpus was expected" in capsys.readouterr().err
