"""The demo from end to end on a few notes, and the pieces of its study."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from matpac_fast import cli, samples
from matpac_fast.cli import _demo_study as study
from matpac_fast.cli import demo
from matpac_fast.cli._demo_study import NAMES, TRAINED, UNTRAINED, Row
from matpac_fast.encoder import load_encoder
from matpac_fast.errors import ConfigError
from matpac_fast.ops import log_mel
from matpac_fast.samples import Samples
from matpac_fast.study.probe import ProbeResult, bootstrap_interval
from matpac_fast.train.logs import read_log
from matpac_fast.zoo.statistics import LogMelStatistics

OPTIONS = ["--crop-seconds", "0.16", "0.32", "--batch-size", "4", "--temporal-supports", "0.8", "2.4"]


@functools.cache
def few(split: str) -> Samples:
    """Two notes of each family, or two mixtures."""
    whole = samples.load_samples(split)  # pyright: ignore[reportArgumentType]
    kept = [0, 1] if split == "mixtures" else [40 * family + i for family in range(10) for i in (0, 7)]
    numbers = {} if split == "mixtures" else {k: getattr(whole, k)[kept] for k in ("program", "pitch", "velocity")}
    return dataclasses.replace(whole, waves=[whole.waves[i] for i in kept], labels=whole.labels[kept], **numbers)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "load_samples", few)
        assert cli.main(["demo", "--out", str(out), "--steps", "3", *OPTIONS]) == 0
    return out


def test_it_leaves_a_report_numbers_and_an_encoder(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == ["report.html", "results.json", "run"]
    assert load_encoder(finished / "run", "cpu").embedding_dim == 960
    found = json.loads((finished / "results.json").read_text())
    assert [row["temporal_support"] for row in found["temporal_supports"]] == [0.8, 2.4]
    page = (finished / "report.html").read_text()
    for row in found["temporal_supports"]:
        assert row["windows"] == round(2.4 / row["temporal_support"])
        assert set(row["accuracy"]) == set(NAMES)
        for accuracy in row["accuracy"].values():
            assert accuracy["low"] <= accuracy["mean"] <= accuracy["high"]
            assert f"{100 * accuracy['mean']:.1f} % (" in page
        gain = row["accuracy"][TRAINED]["mean"] - row["accuracy"][UNTRAINED]["mean"]
        assert row["gain"][UNTRAINED]["mean"] == pytest.approx(gain)
        assert row["clip_ms"] > 0
        assert row["window_ms"] > 0
    assert found["made"]["torch"] == torch.__version__
    assert page.count("<section>") == 5


def test_training_moved_the_encoder(finished: Path) -> None:
    # Three steps, the first at a rate of 0: the encoder is another one, but started from the preset's weights.
    trained, untrained = load_encoder(finished / "run", "cpu"), load_encoder("untrained-nano", "cpu")
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(trained.student.parameters(), untrained.student.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 0.02


def row(trained: int) -> Row:
    """A row whose other encoders have 100, 150 and 200 of 400 notes right."""

    def probe(right: int) -> ProbeResult:
        correct = torch.arange(400) < right
        return ProbeResult(bootstrap_interval(correct), correct, 1.0)

    right = dict(zip(NAMES, (100, 150, trained, 200), strict=True))
    return Row(0.8, 3, 1.0, 1.0, {name: probe(n) for name, n in right.items()}, torch.arange(400))


def test_a_second_run_goes_on_with_the_first(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    asked = {}
    monkeypatch.setattr(demo, "load_samples", few)
    monkeypatch.setattr(demo, "compare", lambda encoders, *_: asked.update(encoders) or [row(250)])
    assert cli.main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "going on with the run" in printed
    assert "62.5 % (" in printed
    assert "\x1b" not in printed  # no terminal, no colours
    assert "62.5 % (" in (out / "report.html").read_text()
    assert asked[TRAINED].id == load_encoder(finished / "run", "cpu").id
    # The options it was begun with: the encoder before training is that of the run.
    assert asked[UNTRAINED].native_seconds == asked[TRAINED].native_seconds == 0.32


def test_ctrl_c_saves_the_steps_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = demo._Steps.step

    def interrupted(self: demo._Steps, step: int) -> None:
        real(self, step)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(demo, "load_samples", few)
    monkeypatch.setattr(demo._Steps, "step", interrupted)
    command = ["demo", "--out", str(tmp_path), "--steps", "3", *OPTIONS]
    assert cli.main(command) == cli.INTERRUPTED
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "stopped at step 2 of 3; the same command goes on from here"
    assert not (tmp_path / "report.html").exists()
    monkeypatch.setattr(demo, "compare", lambda *_: [row(250)])
    assert cli.main(command) == 0
    steps = [record["step"] for record in read_log(tmp_path / "run/log.jsonl") if record.get("event") == "resume"]
    assert steps == [2]


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.html").write_text("my thesis")
    assert cli.main(["demo", "--out", str(tmp_path)]) == cli.FAILED
    assert f"demo: {tmp_path} is not empty and holds no demo; give a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_minutes_become_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained: list[int] = []

    def stop(*arguments: object, **_: object) -> None:
        trained.append(arguments[3].steps)  # pyright: ignore[reportAttributeAccessIssue]
        raise ConfigError("far enough")

    monkeypatch.setattr(demo, "load_samples", few)
    monkeypatch.setattr(demo, "_seconds_a_step", lambda *_: 0.5)
    monkeypatch.setattr(demo, "pretrain", stop)
    assert cli.main(["demo", "--out", str(tmp_path), "--minutes", "1.5"]) == cli.FAILED
    assert cli.main(["demo", "--out", str(tmp_path), "--minutes", "0.001"]) == cli.FAILED
    assert trained == [180, 1]


def test_a_step_is_timed_by_training(tmp_path: Path) -> None:
    corpus = demo.Corpus.from_arrays(few("train").waves)
    tiny = demo.MatpacConfig.preset("tiny", n_frames=32, depth=1, predictor_depth=1)
    train = demo.TrainConfig(steps=1, batch_size=2, crop_frames=(16, 32))
    assert 1e-4 < demo._seconds_a_step(corpus, tiny, train, torch.device("cpu"), 0.1) < 30


def test_a_moment_in_which_the_machine_is_busy_does_not_decide_how_many_steps_fit() -> None:
    clock = demo._Clock(3.0)
    for tick in (0.0, 2.5, 2.6):
        clock.ticks.append(tick)
        assert not clock.is_enough()  # three steps at least
    clock.ticks += [2.7]
    assert not clock.is_enough()  # and as long as was said
    clock.ticks += [3.05]
    assert clock.is_enough()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--temporal-supports", "0.7"], "--temporal-supports 0.7: expected seconds that divide 2.4 s"),
        (["--temporal-supports", "0"], "--temporal-supports 0: expected"),
        (["--temporal-supports", "nan"], "--temporal-supports nan: expected seconds"),
        (["--temporal-supports", "inf"], "--temporal-supports inf: expected seconds"),
        (["--temporal-supports"], "--temporal-supports has no numbers"),
        (["--minutes", "0"], "--minutes is 0"),
        (["--minutes", "inf"], "--minutes is inf"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--crop-seconds"], "--crop-seconds has no numbers"),
        (["--crop-seconds", "nan"], "--crop-seconds nan: expected"),
        (["--steps", "0"], "steps is 0; expected at least 1"),
        (["--crop-seconds", "1.3"], "--crop-seconds 1.3: expected a multiple of 0.16 s"),
        (["--crop-seconds", "9.6", "--steps", "1"], "no clip is as long as a crop"),
    ],
)
def test_what_cannot_be_is_one_line(
    options: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(demo, "load_samples", few)
    assert cli.main(["demo", "--out", str(tmp_path / "out"), *options]) == cli.FAILED
    error = capsys.readouterr().err
    assert line in error
    assert len(error.splitlines()) == 1


def test_features_average_windows() -> None:
    waves = torch.from_numpy(np.stack(few("test").waves[:3]))[:, :38_400]
    halves = [waves[:, :19_200], waves[:, 19_200:]]
    specs = [log_mel(half.contiguous()) for half in halves]
    expected = sum(torch.cat([spec.mean(2), spec.var(2, correction=0).sqrt()], 1) for spec in specs) / 2
    assert torch.allclose(study.embed(LogMelStatistics(), waves, 1.2), expected, atol=1e-5)
    encoder = load_encoder("untrained-tiny", "cpu")
    expected = sum(encoder.embed(half, 16_000).values[:, 0] for half in halves) / 2
    assert torch.allclose(study.embed(encoder, waves, 1.2), expected, atol=1e-5)


def test_verdicts_claim_only_what_the_test_can_tell() -> None:
    better, same, worse = study.verdicts([row(250), row(151), row(50)])
    assert "+25.0 points" in better
    assert "chance" not in better
    assert "+0.2 points" in same
    assert same.count("within chance") == 1  # against the statistics it gains
    assert "-25.0 points" in worse
    assert "chance" not in worse


def test_a_folder_that_cannot_be_made_is_said_before_steps_are_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load_samples", few)
    monkeypatch.setattr(demo, "_seconds_a_step", lambda *_: pytest.fail("timed"))
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file")]) == cli.FAILED
    assert "file: a file, where a folder for the demo was expected" in capsys.readouterr().err
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "demo")]) == cli.FAILED
    assert "Not a directory" in capsys.readouterr().err
    assert cli.main(["demo", "--out", str(tmp_path / os.fsdecode(b"\xff"))]) == cli.FAILED
    assert "a name is not UTF-8" in capsys.readouterr().err
