"""What a run is watched by: the live probe, TensorBoard, curves; and that a run which is gone on with still is."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import soundfile

from matpac_fast import cli
from matpac_fast.train import read_log

SMALL = ["--preset", "tiny", "--crop-seconds", "0.32", "--batch-size", "2", "--device", "cpu", "--log-every", "2"]

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*options):
    return cli.main(["pretrain", *map(str, options)])


@pytest.fixture
def labelled(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        (tmp_path / "labelled" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "labelled" / str(i % 2) / f"{i}.wav", rng.uniform(-0.5, 0.5, 6_000), 16_000)
    return tmp_path / "labelled"


def probed(out):
    return [record["step"] for record in read_log(out / "log.jsonl") if record.get("event") == "probe"]


def longer(out, steps):
    """A run that was stopped at a checkpoint before its end."""
    config = json.loads((out / "config.json").read_text())
    config["train"]["steps"] = config["model"]["max_steps"] = steps
    (out / "config.json").write_text(json.dumps(config))


def test_all_of_it_stands_in_the_runs_folder_and_goes_on(corpus, labelled, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    options = ["--probe-data", "labelled", "--probe-every", 2, "--tensorboard", "--keep-last", 1]
    assert run(corpus, "--out", out, "--steps", 4, *SMALL, *options) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"probing on 8 clips of 2 labels, {labelled}"
    assert [line.split(":")[0] for line in said if line.startswith("probe at")] == [
        f"probe at step {step}" for step in (0, 2, 4)
    ]
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == [
        "checkpoints",
        "config.json",
        "curves.png",
        "latest",
        "log.jsonl",
        "tensorboard",
        "watching.json",
    ]
    assert len(list((out / "tensorboard").iterdir())) == 1
    # From another folder, without a word of it.
    monkeypatch.chdir(corpus)
    longer(out, 6)
    assert run(corpus, "--out", out, "--device", "cpu") == 0
    assert probed(out) == [0, 2, 4, 6]
    assert len(list((out / "tensorboard").iterdir())) == 2
    # Until it is said.
    longer(out, 8)
    assert run(corpus, "--out", out, "--device", "cpu", "--probe-data", "none", "--no-tensorboard") == 0
    longer(out, 10)
    assert run(corpus, "--out", out, "--device", "cpu") == 0
    assert probed(out) == [0, 2, 4, 6]
    assert len(list((out / "tensorboard").iterdir())) == 2


def test_a_run_whose_labelled_folder_is_gone_goes_on_and_says_so(corpus, labelled, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(corpus, "--out", out, "--steps", 2, *SMALL, "--probe-data", labelled, "--probe-every", 2) == 0
    shutil.move(labelled, tmp_path / "moved")
    longer(out, 4)
    capsys.readouterr()
    assert run(corpus, "--out", out, "--device", "cpu") == 0
    note = f"note: this run was probed on {labelled}, which is not there: it goes on without"
    assert capsys.readouterr().out.splitlines()[0] == note
    longer(out, 6)
    assert run(corpus, "--out", out, "--device", "cpu", "--probe-data", tmp_path / "moved") == 0
    assert probed(out) == [0, 2, 4, 6]  # the fourth as it began, for it was missing


def test_a_damaged_file_of_it_is_named(corpus, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "watching.json").write_text("{")
    assert run(corpus, "--out", tmp_path / "run", *SMALL) == cli.FAILED
    assert "watching.json: damaged (" in capsys.readouterr().err
