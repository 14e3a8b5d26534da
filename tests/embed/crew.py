"""Workers in processes of their own, for tests: forked from a server that has imported all, so that they start fast."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forks import forks
from torch import Tensor

from matpac_fast.audio_encoder import AudioEncoder
from matpac_fast.embed.extract import embed_collection


class Tiny(AudioEncoder):
    """Two numbers a window, after a while."""

    name, sample_rate, embedding_dim, min_samples, settings = "tiny", 8_000, 2, 4, {"kind": "tiny"}
    seconds = 0.0  # that a batch takes

    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        time.sleep(self.seconds)
        return torch.stack([pieces.abs().mean(-1), pieces.square().mean(-1)], dim=-1)[:, None]


def work(source: Path, out: Path, seconds: float, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    encoder = Tiny()
    encoder.seconds = seconds
    embed_collection(source, out, encoder, 0.1, workers=1, **options)


def start(source: Path, out: Path, seconds: float = 0.0, **options: Any) -> Any:
    context = forks()
    process = context.Process(target=work, args=(source, out, seconds, options))
    process.start()
    return process


def result(out: Path) -> dict[str, bytes]:
    """All that is in an output folder."""
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / 10
