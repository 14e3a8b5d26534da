"""Names that end in a step or a side of the model: "runs/a@20000", "runs/a@teacher", and both."""

from __future__ import annotations

import copy
import functools
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from matpac_fast import AudioEncoder, Matpac, MatpacConfig, checkpoint, download, encoder, get_matpac, load_encoder
from matpac_fast.choice import Choice, parse
from matpac_fast.encoder import register_encoder
from matpac_fast.errors import CheckpointError, ConfigError
from matpac_fast.train.weights import load_weights, weights_sizes

TINY = dict(n_frames=32, width=16, depth=1, num_heads=2, predictor_width=12, predictor_depth=1, predictor_heads=2)
TINY |= dict(head_hidden=16, head_bottleneck=8, prototypes=12)
STEPS = (4, 8, 12)


@functools.cache
def model(seed: int) -> Matpac:
    return Matpac(MatpacConfig(**TINY, seed=seed))


def run_of(folder: Path, steps: tuple[int, ...] = STEPS) -> Path:
    """A run whose checkpoints, and student and teacher in them, differ."""
    for step in steps:
        model(step).save(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return run_of(tmp_path_factory.mktemp("made") / "a")


@pytest.fixture
def run(made, tmp_path, monkeypatch) -> Path:
    """runs/a in the working directory, to do with as one likes."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made, Path("runs/a"))


def is_side(loaded: AudioEncoder, side: str, step: int) -> bool:
    """And no other: each step's student and teacher begin with weights of their own."""
    sides = {(name, seed): getattr(model(seed), name) for name in ("student", "teacher") for seed in (1, *STEPS)}
    weight = loaded.student.blocks[0].attn.qkv.weight
    return [key for key, one in sides.items() if torch.equal(one.blocks[0].attn.qkv.weight, weight)] == [(side, step)]


@pytest.mark.parametrize(
    ("name", "side", "step", "called"),
    [
        ("runs/a", "student", 12, "a"),
        ("runs/a@student", "student", 12, "a@student"),
        ("runs/a@teacher", "teacher", 12, "a@teacher"),
        ("runs/a/@teacher", "teacher", 12, "a@teacher"),
        ("runs/a@8", "student", 8, "a@8"),
        ("runs/a@8@teacher", "teacher", 8, "a@8@teacher"),
        ("runs/a@teacher@00000004", "teacher", 4, "a@teacher@00000004"),
        ("matpac:runs/a@4@teacher", "teacher", 4, "a@4@teacher"),
        ("runs/a/checkpoints/step-00000004@teacher", "teacher", 4, "step-00000004@teacher"),
        ("runs/a/checkpoints/step-00000004/model.safetensors@teacher", "teacher", 4, "model.safetensors@teacher"),
        (Path("runs/a@8@teacher"), "teacher", 8, "a@8@teacher"),
    ],
)
def test_a_name_says_step_and_side(run, name, side, step, called):
    loaded = load_encoder(name, "cpu")
    assert is_side(loaded, side, step)
    assert loaded.name == called


def test_official_training_checkpoints_have_a_teacher(run):
    torch.save({"model": model(1).official_state_dict(), "extra_state": {}}, "official.pt")
    assert is_side(load_encoder("official.pt@teacher", "cpu", num_heads=2), "teacher", 1)
    assert is_side(load_encoder("matpac:official.pt@student", "cpu", num_heads=2), "student", 1)


def test_a_path_that_is_there_comes_first(run):
    run_of(Path("x@teacher"))
    run_of(Path("x"), (1,))
    os.rename(run / "checkpoints/step-00000008/model.safetensors", "file@8")
    for name, side, step in [
        ("x@teacher", "student", 12),
        (Path("x@teacher"), "student", 12),
        ("matpac:x@teacher", "student", 12),
        ("x@teacher@teacher", "teacher", 12),
        ("x@teacher@4", "student", 4),
        ("x@1@teacher", "teacher", 1),
        ("file@8", "student", 8),
        ("file@8@teacher", "teacher", 8),
    ]:
        assert is_side(load_encoder(name, "cpu"), side, step), name


def test_the_option_agrees_with_the_name(run):
    assert is_side(load_encoder(run, "cpu", weights="teacher"), "teacher", 12)
    assert is_side(load_encoder("runs/a@8", "cpu", weights="teacher"), "teacher", 8)
    assert is_side(load_encoder("runs/a@teacher", "cpu", weights="teacher"), "teacher", 12)
    for asked, ending in (("teacher", "student"), ("student", "teacher")):
        with pytest.raises(ConfigError, match=f"weights is '{asked}', and 'runs/a@{ending}' says '{ending}'; leave"):
            load_encoder(f"runs/a@{ending}", "cpu", weights=asked)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("runs/a@9", CheckpointError, r"^runs/a: no checkpoint of step 9; there are 4, 8, 12$"),
        ("runs/b@9", CheckpointError, "no encoder 'runs/b': neither a file"),
        ("runs/b@teacher", CheckpointError, "no encoder 'runs/b': neither a file"),
        ("runs/a@4@8", CheckpointError, "no encoder 'runs/a@4': neither a file"),
        ("runs/a@teacher@student", CheckpointError, "no encoder 'runs/a@teacher': neither a file"),
        ("runs/a@last", CheckpointError, "no encoder 'runs/a@last': neither a file.*may end in @teacher, .* @layerN"),
        ("runs/a@layer1@layer1", CheckpointError, "no encoder 'runs/a@layer1': neither a file"),
        ("runs/a@layer2", ConfigError, r"^a@layer2: no layer 2; expected one from 1 to 1$"),
        ("beats@layer3", ConfigError, "@layer3 is for encoders of MATPAC and M2D, and this is beats: leave it out"),
        ("runs/a/checkpoints/step-00000004@8", CheckpointError, "00004: holds no checkpoints, so none of step 8"),
        ("own.safetensors@4", CheckpointError, "own.safetensors: holds no checkpoints, so none of step 4"),
        ("own.safetensors@teacher", CheckpointError, "own.safetensors@teacher: holds no teacher; expected weights"),
        ("matpac-nano@teacher", CheckpointError, "matpac-nano@teacher: holds no teacher"),
        ("untrained-nano@4", ConfigError, "'untrained-nano@4': only a run has steps; leave @4 out"),
        ("beats@teacher", ConfigError, "'beats@teacher': @teacher is for runs and .* of MATPAC, and this is beats"),
        ("beats@0", ConfigError, "'beats@0': @0 is for runs and .* of MATPAC, and this is beats: leave it out"),
        ("logmel-stats@4", ConfigError, "@4 is for runs and .* of MATPAC, and this is logmel-stats: leave it out"),
        ("passt:own.pt@teacher", CheckpointError, "own.pt@teacher: no such file; @teacher is for .* this is passt"),
        ("hear:nowhere@4@teacher", CheckpointError, "nowhere@4@teacher.*; @4@teacher is for .* this is hear"),
        ("foreign.pt@student", ConfigError, "'foreign.pt@student': @student is for .* this is cnn14"),
    ],
)
def test_what_is_not_there_is_an_error(run, name, error, says):
    load_encoder(run, "cpu").save("own.safetensors")
    torch.save({"conv_block6.conv1.weight": torch.zeros(1)}, "foreign.pt")
    with pytest.raises(error, match=says):
        load_encoder(name, "cpu")


def test_of_many_steps_the_last_are_named(run):
    for step in range(100, 130):
        os.makedirs(run / "checkpoints" / f"step-{step:08d}")
    os.makedirs(run / "checkpoints" / "step-00000099.part")
    last = ", ".join(map(str, range(110, 130)))
    with pytest.raises(CheckpointError, match=f"no checkpoint of step 99; there are {last}, and 13 before them$"):
        Choice("runs/a", step=99).source()


def test_addresses_are_taken_as_they_are(run, monkeypatch):
    os.rename(run / "checkpoints/step-00000008/model.safetensors", "cached.pt@teacher")
    asked = []
    monkeypatch.setattr(download, "_fetch", lambda url, pinned: asked.append(url) or Path("cached.pt@teacher"))
    for kind in ("", "matpac:"):
        assert is_side(load_encoder(f"{kind}https://me@example.org/x.pt@teacher", "cpu"), "student", 8)
    assert asked == ["https://me@example.org/x.pt@teacher"] * 2


def test_an_argument_of_another_kind_of_encoder_is_its_own(run, monkeypatch):
    class Echo(AudioEncoder):
        name, embedding_dim, settings = "echo", 1, {}

        def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
            return pieces.new_zeros(len(pieces), 1, 1)

    def load(argument, device, dtype):
        found = Echo()
        found.name = argument
        return found

    monkeypatch.setattr(encoder, "_registry", dict(encoder._registry))
    register_encoder("echo", load)
    register_encoder("echo@4", load)
    for name, argument in (
        ("echo:org/model@20000", "org/model@20000"),
        ("echo@4:x@teacher", "x@teacher"),
        ("echo", ""),
    ):
        assert load_encoder(name, "cpu").name == argument


def test_the_official_head_of_a_name(run):
    head = {"head.weight": torch.ones(3, 16), "head.bias": torch.zeros(3)}
    head |= {"head_norm.running_mean": torch.zeros(16), "head_norm.running_var": torch.ones(16)}
    released = checkpoint.to_official_names(
        {k: v for k, v in model(1).state_dict().items() if k[:4] in ("fron", "stud")}
    )
    torch.save({**released, **head}, "head.pt")
    for name in ("head.pt", "head.pt@student", "matpac:head.pt@student"):
        assert get_matpac(name, as_class_head=True, num_heads=2, device="cpu").head is not None
    with pytest.raises(CheckpointError, match=r"no AudioSet head"):
        get_matpac("matpac-nano@student", as_class_head=True, device="cpu")


def test_a_new_run_begins_with_the_whole_model_of_a_step(run):
    start = copy.deepcopy(model(0))
    load_weights(start, Path("runs/a@8"))
    assert all(torch.equal(tensor, start.state_dict()[name]) for name, tensor in model(8).state_dict().items())
    assert weights_sizes("runs/a@8")["width"] == 16
    for take in (weights_sizes, lambda source: load_weights(start, source)):
        with pytest.raises(ConfigError, match="runs/a@teacher: a new run begins with the whole .* leave @teacher out"):
            take("runs/a@teacher")
        with pytest.raises(CheckpointError, match="no checkpoint of step 9; there are 4, 8, 12"):
            take("runs/a@9")
        with pytest.raises(CheckpointError, match=r"runs/b: no such file"):
            take("runs/b@9")


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("a", Choice("a")),
        ("a@teacher@7", Choice("a", "@teacher@7", 7, "teacher")),
        ("a@layer12@teacher@7", Choice("a", "@layer12@teacher@7", 7, "teacher", 12)),
        ("a@layer0", Choice("a", "@layer0", layer=0)),
        ("a@layer", Choice("a@layer")),
        ("a@Teacher", Choice("a@Teacher")),
        ("@teacher", Choice("@teacher")),
        ("a@", Choice("a@")),
        ("a@-1", Choice("a@-1")),
        ("a@\N{SUPERSCRIPT TWO}", Choice("a@\N{SUPERSCRIPT TWO}")),
        ("a@" + "9" * 5000, Choice("a@" + "9" * 5000)),
        ("a\nb@8", Choice("a\nb", "@8", 8)),
    ],
)
def test_the_parts_of_a_name(run, name, want):
    assert parse(name) == want
