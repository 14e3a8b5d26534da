"""`pretrain --set`: its words, the run that keeps what they say, and what is refused."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from matpac_fast import checkpoint, cli
from matpac_fast.cli import pretrain
from matpac_fast.cli._set import CLASSES, read_fields
from matpac_fast.config import MatpacConfig
from matpac_fast.errors import ConfigError
from matpac_fast.train import TrainConfig, fit_to_run
from matpac_fast.train.begin import OPTIONS

SMALL = ["--preset", "tiny", "--crop-seconds", "0.32", "--batch-size", "2", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


def test_values_are_json_and_names_may_be_bare():
    words = ["model.student_temp=7e-2", "model.ema_end=1", "model.center_of=logits", 'model.teacher_init="copy"']
    more = ["train.warmup=null", "train.compile=true", "train.crop_frames=[16, 32]", "train.precision=bf16"]
    assert read_fields([*words, *more]) == {
        "model": {"student_temp": 0.07, "ema_end": 1, "center_of": "logits", "teacher_init": "copy"},
        "train": {"warmup": None, "compile": True, "crop_frames": [16, 32], "precision": "bf16"},
    }


def test_every_default_is_a_value_of_its_field():
    """So no field has a type that cannot be given."""
    defaults = {f"{part}.{name}": value for part, cls in CLASSES.items() for name, value in cls().to_dict().items()}
    words = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in defaults.items()]
    found = read_fields(words)
    assert {f"{part}.{name}": value for part in found for name, value in found[part].items()} == defaults


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.depth=1.5"], "--set model.depth=1.5: expected a whole number$"),
        (["model.depth=true"], "expected a whole number$"),
        (["model.student_temp=hot"], "expected a number such as 0.1$"),
        (["train.warmup=all"], "expected a whole number or null$"),
        (["train.compile=1"], "expected true or false$"),
        (["train.betas=0.9"], r"expected a list such as \[0.9, 0.95\]$"),
        (["train.betas=[0.9, null]"], r"expected a list such as \[0.9, 0.95\]$"),
        (["train.crop_frames=[1.5]"], r"expected a list such as \[192, 608\] or null$"),
        (["model.depth"], "--set model.depth has no value; expected model.depth=VALUE"),
        (["model.depth=1", "model.depth=2"], "--set gives model.depth twice; leave one out"),
        (["weight_decay=1"], r"there is no field 'weight_decay'; did you mean train.weight_decay\?"),
        (["model.lr=1"], r"did you mean train.lr\?"),
        (["seed=1"], r"did you mean model.seed or train.seed\?"),
        (["q=1"], "there is no field 'q'; expected one of model.n_mels, .*, train.shard$"),
    ],
)
def test_what_is_no_field_or_no_value_of_it_is_refused(words, says):
    with pytest.raises(ConfigError, match=says):
        read_fields(words)


def test_every_field_has_an_option_or_stands_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    names = [f"{part}.{name}" for part, cls in CLASSES.items() for name in cls().to_dict()]
    assert [name for name in names if name not in OPTIONS and f"`{name}`" not in text] == []
    options = {option.removeprefix("--").replace("-", "_") for option in OPTIONS.values()}
    assert options <= set(inspect.signature(pretrain.main).parameters)


def run(*options):
    return cli.main(["pretrain", *map(str, options)])


def config_of(out):
    config = json.loads((out / "config.json").read_text())
    return {f"{part}.{name}": value for part in ("model", "train") for name, value in config[part].items()}


@pytest.mark.parametrize("text", ["3", "null", "hamming!"])
def test_a_name_that_there_is_not_is_refused_with_those_that_there_are(text):
    fields = read_fields([f"model.window={text}"])["model"]
    with pytest.raises(ConfigError, match=rf"window is '{text}'; expected one of hann"):
        MatpacConfig.from_dict(fields)


def test_set_gives_every_field_and_the_run_keeps_it(corpus, tmp_path, capsys):
    fields = ["--set", "model.depth=1", "model.ema_end=0.9", "model.center_of=logits"]
    fields += ["--set", "train.betas=[0.9, 0.98]", "train.seed=5", "model.n_mels=64"]
    out = tmp_path / "run"
    assert run(corpus, "--out", out, "--steps", 2, *SMALL, *fields) == 0
    train = TrainConfig(steps=2)
    plain = fit_to_run(MatpacConfig.preset("tiny", n_frames=32), train)
    config = config_of(out)
    assert {name for name, value in plain.to_dict().items() if config[f"model.{name}"] != value} == {
        *("depth", "ema_end", "center_of", "n_mels"),  # as they were given: not stretched
        "seed",  # the run's
    }
    assert [config[f"model.{name}"] for name in ("depth", "ema_end", "n_mels", "seed")] == [1, 0.9, 64, 5]
    assert config["train.betas"] == [0.9, 0.98]
    state, _ = checkpoint.load(checkpoint.find_weights(out))
    assert not any(name.startswith("student.blocks.1.") for name in state)
    # The same command goes on, and one that changes no result.
    for options in ([*SMALL, *fields], ["--set", "train.max_bad_steps=3", "train.save_every=1"]):
        capsys.readouterr()
        assert run(corpus, "--out", out, "--device", "cpu", *options) == 0
        assert capsys.readouterr().out.startswith("nothing to do")


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_field_that_would_change_a_run_is_refused_in_the_words_that_gave_it(corpus, tmp_path, capsys, options):
    out = tmp_path / "run"
    assert run(corpus, "--out", out, "--steps", 1, *SMALL, "--set", "model.depth=1") == 0
    capsys.readouterr()
    other = ["--lr", "1", "--set", "model.depth=2", "train.clip_norm=1", "train.stretch_decays=false"]
    assert run(corpus, "--out", out, "--device", "cpu", *other, *options) == cli.FAILED
    said = capsys.readouterr().err
    assert "model.depth is 1 there and 2 here (--set model.depth)" in said
    leave_out = "--set model.depth, --set train.clip_norm, --lr, --set train.stretch_decays"
    assert f"To go on with it, leave out {leave_out}. For another run" in said


def test_the_estimate_counts_what_set_gives(corpus, tmp_path, capsys):
    def rows(*options):
        assert run(corpus, "--out", tmp_path / "run", "--steps", 8, *SMALL, "--dry-run", *options) == 0
        return dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())

    plain, other = rows(), rows("--set", "model.depth=1", "train.keep_last=7", "train.grad_accumulation=2")
    trained = [float(table["trained parameters"].split()[0]) for table in (plain, other)]
    assert trained[0] - trained[1] == pytest.approx(11 * 0.445, abs=0.1)  # M a block of width 192
    assert "the newest 7 stay" in other["checkpoint"]
    assert other["activations"].endswith("1 at a time")


def test_crops_are_of_whole_patches_whatever_their_size(corpus, tmp_path, capsys):
    options = ["--preset", "tiny", "--batch-size", 2, "--device", "cpu", "--steps", 1]
    sizes = ["--set", "model.patch_size=10", "model.n_mels=60", "model.depth=1"]
    assert run(corpus, "--out", tmp_path / "a", *options, *sizes, "--crop-seconds", "0.2", "0.3") == 0
    # As the weights that a run begins from, unless it says otherwise.
    more = ["--out", tmp_path / "b", "--init", tmp_path / "a", *options[2:]]
    assert run(corpus, *more, "--crop-seconds", "0.32") == cli.FAILED
    assert "expected a multiple of 0.1 s, such as 0.3 or 0.4" in capsys.readouterr().err
    assert run(corpus, *more, "--crop-seconds", "0.4") == 0
    config = config_of(tmp_path / "b")
    assert [config[f"model.{name}"] for name in ("patch_size", "depth", "n_mels", "n_frames")] == [10, 1, 60, 40]
    assert (
        run(corpus, *more[:1], tmp_path / "c", *more[2:], "--crop-seconds", "0.3", "--set", "model.depth=2")
        == cli.FAILED
    )
    assert "model.depth is 1 there and 2 here (--set model.depth). To begin from" in capsys.readouterr().err
