"""What the tests of several operators need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

NO_EXTENSION = "needs the native extension: pip install . with a C++17 compiler"


@contextlib.contextmanager
def _instruction_set(name: str) -> Iterator[None]:
    native = pytest.importorskip("matpac_fast._C", reason=NO_EXTENSION)
    before = native.cpu_isa()
    try:
        native.set_cpu_isa(name)
    except ValueError as error:
        pytest.skip(f"{error}; .ci/avx512 emulates avx512")
    yield
    native.set_cpu_isa(before)


@pytest.fixture
def instruction_set() -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """A context in which the CPU kernels use the instruction set of that name; skips where this CPU lacks it."""
    return _instruction_set


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty comes filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
