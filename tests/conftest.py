"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import early  # before torch: it says how threads wait
import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor

from matpac_fast import backend

# No test is timed: a machine may be slow.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

GOLDEN = Path(__file__).parent / "golden"

# Worker processes find the functions they are sent under tests.*; last, so that the installed package comes first.
sys.path.append(str(Path(__file__).parent.parent))

# Triton decides at import whether it interprets, so these run in pytest processes of their own
# (tests/test_interpreted.py starts them).
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


def pytest_sessionstart() -> None:
    # Interpreted, the kernels are the same from the sources; there is no -P for `python -m` before Python 3.11.
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if not interprets and "these are the sources" in (reason := backend.unavailable("cpp") or ""):
        pytest.exit(f"matpac_fast: {reason}; or run pytest, not python -m pytest", returncode=2)


def pytest_collection_finish(session: pytest.Session) -> None:
    config, names = session.config, {item.name for item in session.items}
    whole = len(session.items) > 1000 and not config.option.collectonly
    if whole and "test_interpreted_kernels" in names and importlib.util.find_spec("triton"):
        config.stash[early.INTERPRETED] = early.interpreted(config)
        config.stash[early.FROM_PTX] = early.from_ptx(config)
        if (job := early.compiled_ahead(config)) is not None:
            config.stash[early.COMPILED] = job


def pytest_sessionfinish(session: pytest.Session) -> None:
    for key in (early.INTERPRETED, early.FROM_PTX, early.COMPILED):
        if (job := session.config.stash.get(key, None)) is not None:
            job.end()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What waits for another process comes last, so that both cores have work until then.
    items.sort(key=lambda item: item.nodeid.startswith("tests/test_interpreted.py"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On tensors as small as those of tests, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture
def peak_growth() -> Callable[[Callable[[], object]], float]:
    """Calls what it is given; the MiB by which resident memory rose meanwhile, at its peak."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("reads its peak memory from Linux's /proc")

    if "libasan" in Path("/proc/self/maps").read_text():
        pytest.skip("AddressSanitizer holds on to what is freed; the suite without it measures this")

    def mib(name: str) -> float:
        return int(status.read_text().split(f"{name}:")[1].split()[0]) / 1024

    def of(call: Callable[[], object]) -> float:
        gc.collect()
        clear.write_text("5")  # forget the peak so far
        before = mib("VmRSS")
        call()
        return mib("VmHWM") - before

    return of
