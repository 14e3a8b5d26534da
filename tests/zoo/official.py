"""Weights files with the official names, at the tiny sizes of the golden vectors or at random."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def weights(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in golden.items() if name.startswith(prefix)}


def passt_file(golden: dict[str, Tensor], folder: Path, stride: int = 10) -> Path:
    path = folder / "passt.pt"
    torch.save(weights(golden, f"stride{stride}/w/"), path)
    return path


def beats_config(golden: dict[str, Tensor]) -> dict[str, object]:
    return {name: value.item() for name, value in weights(golden, "cfg/").items()}


def beats_file(golden: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "beats.pt"
    torch.save({"cfg": beats_config(golden), "model": weights(golden, "w/")}, path)
    return path


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 10
