"""`pretrain`, before it trains: weights of another size, and what a dry run sees of what the run would refuse."""

from __future__ import annotations

import pytest
import torch

from matpac_fast import cli
from matpac_fast.config import MatpacConfig
from matpac_fast.model import Matpac

SMALL = ["--crop-seconds", "0.32", "--batch-size", "2", "--device", "cpu", "--steps", "1"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def refused(corpus, tmp_path, capsys):
    def run(*options):
        assert cli.main(["pretrain", corpus, "--out", str(tmp_path / "run"), *SMALL, *map(str, options)]) == cli.FAILED
        return capsys.readouterr().err.strip().removeprefix("matpac-fast pretrain: ")

    return run


def run(corpus, out, *options):
    return cli.main(["pretrain", corpus, "--out", str(out), *SMALL, *map(str, options)])


def labelled(folder, n):
    """Two labels of so many files each, none of which can be decoded."""
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(n):
            (folder / name / f"{i}.wav").touch()
    return folder


def test_a_dry_run_looks_at_the_folder_of_the_probe(corpus, tmp_path, refused):
    three, four = labelled(tmp_path / "three", 3), labelled(tmp_path / "four", 4)
    dry = ["--preset", "nano", "--dry-run", "--probe-data"]
    assert "nowhere: no such folder" in refused(*dry, tmp_path / "nowhere")
    said = refused(*dry, three)
    assert "three: labels with four clips or more: 0" in said
    assert said.endswith("three/a: 3 clips; a label needs four")
    assert refused(*dry, four, "--probe-clips", 6).endswith("four/a: 3 clips of 4 taken; a label needs four")
    assert run(corpus, tmp_path / "run", *dry, four) == 0
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_a_folder_of_something_else(corpus, tmp_path, capsys):
    (tmp_path / "thesis.txt").touch()
    assert run(corpus, tmp_path, "--preset", "nano", "--dry-run") == cli.FAILED
    assert "is not empty and holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_sizes_that_are_not_those_of_the_weights_are_refused_by_their_options(corpus, tmp_path, refused, dry):
    weights = tmp_path / "weights"
    Matpac(MatpacConfig.preset("nano")).save(weights)
    begins = f"{weights} holds weights of another model: "
    assert refused("--init", weights, "--mcl-heads", 5, *dry) == (
        f"{begins}model.mcl_heads is 0 there and 5 here (--mcl-heads). To begin from them, leave out --mcl-heads"
    )
    assert refused("--init", weights, "--preset", "tiny", "--set", "model.num_heads=6", *dry) == (
        f"{begins}model.depth is 6 there and 12 here, model.predictor_depth is 4 there and 8 here (--preset); "
        "model.num_heads is 3 there and 6 here (--set model.num_heads). "
        "To begin from them, leave out --preset, --set model.num_heads"
    )
    # Before the length of the crops, which is no multiple of such patches.
    assert refused("--init", weights, "--set", "model.patch_size=10", *dry).startswith(
        f"{begins}model.patch_size is 16"
    )
    assert not (tmp_path / "run").exists()
    same = ["--preset", "nano", "--mcl-heads", 0, "--set", "model.depth=6"]
    assert run(corpus, tmp_path / "run", "--init", weights, *same, *dry) == 0


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_weights_that_lack_some_are_refused(tmp_path, refused, dry):
    state = Matpac(MatpacConfig.preset("nano")).official_state_dict()
    del state["_ema"]["norm.weight"]
    torch.save({"model": state}, tmp_path / "official.pt")
    said = refused("--init", tmp_path / "official.pt", "--preset", "nano", *dry)
    assert "official.pt does not fit this model; 1 missing: teacher.norm.weight" in said
    state = Matpac(MatpacConfig.preset("nano")).state_dict()
    del state["predictor.embed.weight"]  # which the predictor's width is read off
    torch.save(state, tmp_path / "bare.pt")
    said = refused("--init", tmp_path / "bare.pt", "--preset", "nano", *dry)
    assert "bare.pt does not fit this model; 1 missing: predictor.embed.weight" in said


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_has_begun_takes_no_weights_any_more(corpus, tmp_path, dry):
    weights = tmp_path / "weights"
    Matpac(MatpacConfig.preset("nano")).save(weights)
    assert run(corpus, tmp_path / "run", "--init", weights) == 0
    weights.unlink()
    assert run(corpus, tmp_path / "run", "--init", weights, *dry) == 0
