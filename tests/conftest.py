"""Fixtures that every test may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"

# Worker processes find the functions they are sent under tests.*; last, so that the installed package comes first.
sys.path.append(str(Path(__file__).parent.parent))

# Triton decides at import whether it interprets, so these run in a pytest process of their own
# (tests/test_interpreted.py starts it).
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """golden("log_mel") -> the arrays of tests/golden/log_mel.npz as tensors."""

    def load(name: str) -> dict[str, Tensor]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: torch.from_numpy(np.ascontiguousarray(arrays[key])) for key in arrays.files}

    return load


@pytest.fixture(scope="module")
def local_ray():
    """A Ray of two workers on this machine, where ray is installed."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()
