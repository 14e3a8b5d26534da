"""`matpac-fast pretrain` on several folders of one corpus, some of whose clips come more often than others."""

from __future__ import annotations

import shutil

import pytest

from matpac_fast import cli
from matpac_fast.errors import ConfigError
from matpac_fast.train.config import TrainConfig
from matpac_fast.train.logs import read_log
from tests.cli.test_pretrain import SMALL, run


@pytest.fixture
def folders(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "more")
    return [corpus, str(tmp_path / "more")]


def test_a_run_on_two_folders_goes_on_with_its_visits(folders, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(*folders, "--out", out, "--steps", 6, "--visits", 1, 2, *SMALL) == 0
    assert "8 clips (2 shorter than a crop are left out)" in capsys.readouterr().out
    log = read_log(out / "log.jsonl")
    assert log[0]["config"]["train"]["visits"] == [1, 2]
    assert [record["epoch"] for record in log if "loss" in record][-1] == 1.0  # 2 crops a step, of 4 + 2 * 4
    assert run(*folders, "--out", out) == 0
    assert "the run was complete already" in capsys.readouterr().out


def test_other_visits_or_folders_are_another_run(folders, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(*folders, "--out", out, "--steps", 2, "--visits", 1, 2, *SMALL) == 0
    capsys.readouterr()
    assert run(*folders, "--out", out, "--visits", 2, 1) == cli.FAILED
    assert "train.visits is [1, 2] there and [2, 1] here (--visits)" in capsys.readouterr().err
    assert run(folders[0], "--out", out) == cli.FAILED
    said = capsys.readouterr().err
    assert "visits is (1, 2); expected 1, one of each folder of the corpus: to go on with a run, give all its" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--visits", 1, 2, 3], "visits is (1, 2, 3); expected 2, one of each folder"),
        (["--visits", 1, 0], "visits is (1, 0); expected a number from 1 for each folder of the corpus"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_visits_that_cannot_be_are_refused_before_a_run_begins(folders, tmp_path, capsys, given, message, dry):
    assert run(*folders, "--out", tmp_path / "run", "--steps", 2, *given, *SMALL, *dry) == cli.FAILED
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_both_folders(folders, tmp_path, capsys):
    assert run(*folders, "--out", tmp_path / "run", "--steps", 6, "--visits", 1, 2, *SMALL, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "8, 2 shorter than a crop are left out" in said
    assert "6, 6.0 an epoch" in said


def test_no_folder_is_an_error(tmp_path, capsys):
    assert run("--out", tmp_path / "run") == cli.FAILED
    assert "expected a folder that matpac-fast prepare wrote, or several; got none" in capsys.readouterr().err


def test_no_visits_are_not_once_each():
    with pytest.raises(ConfigError, match=r"visits is \(\); expected a number"):
        TrainConfig(visits=())
