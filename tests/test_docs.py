"""The Python that README.md and docs/ops.md show runs as it stands, and gives the shapes that they say."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch

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


def test_a_wrong_shape_is_found():
    with pytest.raises(AssertionError, match="x = "):
        run("x = torch.zeros(2, 3)  # (2, 4)\n", {"torch": torch})
