"""Cold caches for honest first calls, and the op table after the run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import _timing
import pytest


@pytest.fixture(scope="session", autouse=True)
def cold_caches() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            patch.setenv(name, os.path.join(folder, name))
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    done = [b for b in session.benchmarks if "op" in b.extra_info and b.stats.data] if session else []
    if done:
        terminalreporter.section("ops")
        for line in _timing.table([_timing.told(b.extra_info, b.stats.median, b.stats.min) for b in done]):
            terminalreporter.line(line)
