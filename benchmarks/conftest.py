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
    rows = [row for b in session.benchmarks for row in b.extra_info.get("rows", ())] if session else []
    if rows:
        terminalreporter.section("ops")
        for line in _timing.table(rows):
            terminalreporter.line(line)
