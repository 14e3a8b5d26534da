"""What a pre-training run leaves in its folder, to compare."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from matpac_fast.train.logs import read_log


def newest(folder):
    """Every tensor of the newest checkpoint, by file and name."""
    latest = folder / "checkpoints" / (folder / "latest").read_text().strip()
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
    one, other = newest(a), newest(b)
    assert one.keys() == other.keys()
    assert len(one) > 60
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert curve(a) == curve(b)
