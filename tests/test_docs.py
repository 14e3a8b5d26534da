"""The Python that README.md and pages of docs/ show runs, and gives what they say."""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import torch.distributed as dist
from ranks import on_ranks
from safetensors.torch import load_file

from matpac_fast import load_encoder
from matpac_fast.audio.prepare import prepare
from matpac_fast.checkpoint import find_weights
from matpac_fast.config import MatpacConfig
from matpac_fast.model import Matpac
from matpac_fast.tasks import folder
from matpac_fast.train import TrainConfig, fit_to_run, joining, pretrain, read_log

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def run(code: str, names: dict[str, Any]) -> int:
    """Run `code`; how many shapes it had, as in `name = ...  # (2, 3)`, and of several names the first's: all held."""
    lines, checked = code.splitlines(), 0
    for statement in ast.parse(code).body:
        exec(compile(ast.Module([statement], []), "docs", "exec"), names)
        shape = re.search(r"# (\(\d[\d, ]*\))$", lines[statement.end_lineno - 1])
        if shape:
            target = statement.targets[0]
            name = target.elts[0].id if isinstance(target, ast.Tuple) else target.id
            assert tuple(names[name].shape) == ast.literal_eval(shape[1]), lines[statement.lineno - 1]
            checked += 1
    return checked


def test_the_ops_page():
    names: dict[str, Any] = {}
    assert sum(run(code, names) for code in blocks("docs/ops.md")) == 11
    assert names["masked"].shape == (4, 134, 192)
    assert names["mean"].shape == (2048,)
    assert names["prototypes"].grad is not None


def test_a_data_set_of_parquet_files_becomes_a_task(tmp_path, monkeypatch):
    """As Hugging Face writes them: what a number stands for is in the metadata."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    label = {"names": ["dog", "rain, light"], "_type": "ClassLabel"}
    about = {"info": {"features": {"audio": {"_type": "Audio"}, "label": label, "fold": {"dtype": "int64"}}}}
    for split in ("train", "validation", "test"):
        rows = []
        for i in range(40):
            soundfile.write("clip.flac", np.random.default_rng(i).normal(0, 0.1, 1600), 16_000)
            audio = {"bytes": Path("clip.flac").read_bytes(), "path": None if i == 0 else f"{i}.flac"}
            rows.append({"audio": audio, "label": i % 2, "fold": 1})
        table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(about)})
        pq.write_table(table, f"data/{split}-00000-of-00001.parquet", row_group_size=30)
    run(next(code for code in blocks("docs/study.md") if "parquet" in code), {})
    task = folder.load("my-task")
    (fold,) = task.folds
    assert task.classes == ("dog", "rain, light")
    assert [len(part) for part in (fold.train, fold.valid, fold.test)] == [40, 40, 40]
    assert [task.paths[i].name for i in fold.test[:2]] == [
        f"test-00000-of-00001-{n}" for n in ("000000", "000001.flac")
    ]
    assert task.targets[fold.test].tolist() == [0, 1] * 20


def test_the_readme():
    encoder, official, model = blocks("README.md")
    names: dict[str, Any] = {}
    run(encoder, names)
    assert names["clip"].values.shape == (1, names["encoder"].embedding_dim)
    assert names["every"].values.shape[0] == 5
    assert names["frames"].values.ndim == 3
    assert "get_matpac" in official  # needs the official weights; tests/test_official.py has it
    run(model, names)
    assert names["spec"].shape == (4, 80, 608)
    assert names["model"].center.any()


def test_fine_tuning(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    tones = torch.sin(torch.tensor([[0.1], [0.2]]) * torch.arange(16_000)) / 2  # 255 and 509 Hz
    soundfile.write("clip.wav", tones.flatten().numpy(), 16_000)
    batches = [(tones, torch.tensor([0, 1]))] * 12
    names: dict[str, Any] = {"n_classes": 2, "batches": batches}
    (code,) = [code for code in blocks("docs/encoders.md") if "optimizer" in code]
    run(code, names)
    with torch.no_grad():  # nothing is hidden
        assert torch.nn.functional.cross_entropy(names["model"](tones), torch.tensor([0, 1])) < 0.3  # from 0.7
    assert names["found"].tolist() == [0, 1]
    encoder, tuned = names["encoder"], names["tuned"]
    assert encoder.id == tuned.id != load_encoder(device="cpu").id
    assert torch.equal(encoder.embed(tones, 16_000).values, tuned.embed(tones, 16_000).values)  # nothing is hidden
    assert not torch.equal(encoder(tones), encoder(tones))
    assert encoder.native_seconds * 3 < 8
    assert encoder(torch.zeros(1, 8 * 16_000)).shape == (1, encoder.embedding_dim)  # its last piece is short
    assert len({group["lr"] for group in names["groups"]}) == encoder.depth + 2


def shorter(code: str) -> str:
    """A loop of docs/training.md, of a few steps on short crops; all of `code` that it changes must be there."""
    for said, tried in (
        ("steps=2000, batch_size=32", "steps=3, batch_size=4"),
        ("97_520", "5_360"),
        ('preset("nano")', 'preset("nano", depth=1, predictor_depth=1, prototypes=16)'),
    ):
        assert said in code
        code = code.replace(said, tried)
    return code


@pytest.fixture
def noise(tmp_path, monkeypatch) -> None:
    """The folder `corpus` of the examples, where they run."""
    rng = np.random.default_rng(0)
    for i in range(5):
        (tmp_path / "audio").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "audio" / f"{i}.wav", 0.1 * rng.standard_normal(6_000 + 500 * i), 16_000)
    prepare(tmp_path / "audio", tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():  # Adam's first steps divide small gradients by their own size
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_the_loop_of_ones_own(tmp_path, noise):
    """Its steps are those of `pretrain`, and the transform beside it is one."""
    (loop,) = [code for code in blocks("docs/training.md") if "optimizer.step()" in code]
    (gain,) = [code for code in blocks("docs/training.md") if "def gain" in code]
    names: dict[str, Any] = {}
    run(shorter(loop), names)
    corpus, config, train = names["corpus"], names["model"].config, names["train"]
    assert config.max_steps == train.steps  # as `fit_to_run` makes it
    own = replace(train, crop_frames=(32,), precision="float32", log_every=1)
    pretrain(corpus, "runs/a", config, own, "cpu")
    assert_same_weights(tmp_path / "own.safetensors", find_weights("runs/a"))
    first = Matpac(config).state_dict()
    assert not torch.allclose(first["student.norm.weight"], names["model"].student.norm.weight, atol=1e-5)

    names["train"] = own
    run(gain, names)
    losses = [[r["loss"] for r in read_log(f"runs/{name}/log.jsonl") if "loss" in r] for name in ("a", "gain")]
    assert len(losses[0]) == len(losses[1]) == 3
    assert losses[0][0] != losses[1][0]


def test_what_is_left_of_the_random_teacher():
    train, model = TrainConfig(steps=2000), MatpacConfig.preset("nano")
    for config, left in ((model, 0.90), (fit_to_run(model, train), 0.0001)):
        decays = [Matpac.ema_decay(SimpleNamespace(config=config), step) for step in range(1, 2000)]
        assert math.prod(decays) == pytest.approx(left, rel=0.5 if left < 0.01 else 0.01)


def shared(rank: int, loop: str, lines: str, folder: Path) -> None:
    """The loop on one process of two, with the lines that are then others."""
    os.chdir(folder)
    before, within = lines.split("for step in range(train.steps):\n")
    for said, then in (
        (r"sampler = .*\n", before),
        (r"    out = .*\n(    .*\n)+?    model\.update_teachers.*\n", within),
    ):
        loop, found = re.subn(said, lambda _, then=then: then, loop)
        assert found == 1
    loop = loop.replace("own.safetensors", f"rank-{rank}.safetensors")
    ddp = torch.nn.parallel.DistributedDataParallel
    if "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters:
        loop = loop.replace("broadcast_buffers", "forward_sync_buffers")
    with joining.join("cpu"):
        names = {"DistributedDataParallel": ddp, "dist": dist, "rank": rank, "world": 2}
        run(loop, names)


def test_the_loop_of_ones_own_on_two_processes(tmp_path, noise):
    (loop,) = [code for code in blocks("docs/training.md") if "optimizer.step()" in code]
    (lines,) = [code for code in blocks("docs/training.md") if "DistributedDataParallel" in code]
    run(shorter(loop), {})
    lines = lines.replace("97_520", "5_360")
    assert on_ranks(2, shared, shorter(loop), lines, tmp_path) == {0: None, 1: None}
    for rank in range(2):
        assert_same_weights(tmp_path / "own.safetensors", tmp_path / f"rank-{rank}.safetensors")


def test_a_wrong_shape_is_found():
    with pytest.raises(AssertionError, match="x = "):
        run("x = torch.zeros(2, 3)  # (2, 4)\n", {"torch": torch})
