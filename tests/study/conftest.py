"""A small encoder in a file, and a small folder of clips that it can tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from matpac_fast.study.cost import Cost
from matpac_fast.vit_encoder import Encoder
from tests.tasks import miniature

SMALL = dict(n_frames=64, width=16, depth=1, num_heads=2)


def save_encoder(path: Path, seed: int = 0) -> Path:
    encoder = Encoder(**SMALL)
    generator = torch.Generator().manual_seed(seed)
    for p in encoder.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    encoder.save(path)
    return path


def made_cost(ts: float, peak: float = 1.0) -> Cost:
    return Cost("e", "id", ts, 4, "cpu", "float32", 1, 10, 1000, 4e3 * ts, 1.0, 1.0, 5, peak, 1.0, 16_000, 8, "2", "0")


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "small.safetensors")


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Three classes of ten clips of 1 s, tones in noise; test clips in two subsets."""
    root, random = tmp_path_factory.mktemp("clips") / "tones", np.random.default_rng(0)
    root.mkdir()
    rows = []
    for k in range(3):
        for i in range(10):
            time = np.arange(16_000) / 16_000
            wave = 0.1 * np.sin(2 * np.pi * 300 * (1 + k + 0.3 * random.normal()) * time)
            soundfile.write(root / f"{k}-{i}.wav", wave + 0.05 * random.normal(size=16_000), 16_000)
            split = "test" if i < 4 else "valid" if i < 6 else "train"
            rows.append(
                dict(path=f"{k}-{i}.wav", label=f"class {k}", split=split, subset="even" if i % 2 == 0 else "odd")
            )
    miniature.table(root / "clips.csv", rows)
    return root
