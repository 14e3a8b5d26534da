"""The Python that README.md, docs/ops.md and, of fine-tuning, docs/encoders.md show runs as it stands, and gives the
shapes that they say."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from matpac_fast import load_encoder

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
    batches = [(tones, torch.tensor([0, 1]))] * 8
    names: dict[str, Any] = {"n_classes": 2, "batches": batches}
    (code,) = [code for code in blocks("docs/encoders.md") if "optimizer" in code]
    run(code, names)
    assert names["loss"] < 0.4  # from 0.7
    assert names["found"].tolist() == [0, 1]
    encoder, tuned = names["encoder"], names["tuned"]
    assert encoder.id == tuned.id != load_encoder(device="cpu").id
    assert torch.equal(encoder.embed(tones, 16_000).values, tuned.embed(tones, 16_000).values)  # nothing is hidden
    assert not torch.equal(encoder(tones), encoder(tones))
    assert len({group["lr"] for group in names["groups"]}) == encoder.depth + 2


def test_a_wrong_shape_is_found():
    with pytest.raises(AssertionError, match="x = "):
        run("x = torch.zeros(2, 3)  # (2, 4)\n", {"torch": torch})
