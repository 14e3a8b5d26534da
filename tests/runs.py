"""What a pre-training run leaves in its folder, and two runs compared."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from matpac_fast import distcp
from matpac_fast.train.logs import read_log


def newest(folder):
    """Every tensor of the newest checkpoint, in one file or in parts."""
    latest = folder / "checkpoints" / (folder / "latest").read_text().strip()
    if distcp.is_one(latest / "parts"):
        return {name.replace(".", "/", 1): tensor for name, tensor in distcp.load(latest / "parts")[0].items()}
    return {
        f"{file}/{name}": tensor
        for file in ("model", "optimizer")
        for name, tensor in load_file(latest / f"{file}.safetensors").items()
    }


def curve(folder):
    """The log without its clock."""
    clock = {"crops_per_s", "data_wait", "versions"}
    records = [r for r in read_log(folder / "log.jsonl") if "loss" in r]
    return [{key: value for key, value in r.items() if key not in clock} for r in records]


def assert_same_run(a, b):
    """To the bit."""
    one, other = newest(a), newest(b)
    assert one.keys() == other.keys()
    assert len(one) > 60
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert curve(a) == curve(b)


def assert_same_curve(one, other):
    """Every number of the log but its clock, to rounding, and the weights that Adam made of it."""
    a, b = curve(one), curve(other)
    assert [r["step"] for r in a] == [r["step"] for r in b]
    assert len(a) >= 6
    for first, second in zip(a, b, strict=True):
        assert first.keys() == second.keys()
        for key in first:
            assert second[key] == pytest.approx(first[key], rel=2e-4, abs=1e-6), (first["step"], key)
    ours, theirs = newest(one), newest(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
