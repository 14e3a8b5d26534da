"""Long jobs in processes of their own, begun beside the first tests where the whole suite runs.

There are two cores and most tests take one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Torch's threads sleep while they wait; by default they spin for a while, on the cores that these jobs need. Read by
# OpenMP when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

HERE = Path(__file__).parent


class Job:
    """A command under way from when it is made, behind whatever else wants the cores."""

    def __init__(self, root: Path, *command: str, **env: str):
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end(); a pipe would fill and stop it
        self._process = subprocess.Popen(
            ["nice", sys.executable, *command],
            # What is installed, and not the sources in `root`, which `python -m` would put first.
            env={**os.environ, "PYTHONSAFEPATH": "1", **env},
            cwd=root,
            stdout=self._said,
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> tuple[int, str]:
        """Exit code and output."""
        code = self._process.wait()
        self._said.seek(0)
        return code, self._said.read()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._said.close()


def interpreted(config: pytest.Config) -> Job:
    """The tests of tests/interpreted, for Triton decides at import whether it interprets."""
    command = ("-m", "pytest", str(HERE / "interpreted"), "-q", "-p", "no:cacheprovider")
    return Job(config.rootpath, *command, TRITON_INTERPRET="1")


def from_ptx(config: pytest.Config) -> Job:
    """The same tests of what the kernels are compiled to (tests/from_ptx.py)."""
    folder = triton_cache(config)
    return Job(config.rootpath, str(HERE / "from_ptx.py"), **{"TRITON_CACHE_DIR": str(folder)} if folder else {})


def compiled_ahead(config: pytest.Config) -> Job | None:
    """Fills the cache of tests/test_compile_ahead.py, which finds there what is compiled by then."""
    if (folder := triton_cache(config)) is None:
        return None
    code = "import test_compile_ahead as tests; [tests.compile_one(key) for key in tests.KEYS]"
    modules = os.pathsep.join(map(str, (HERE, HERE.parent / "benchmarks")))
    return Job(config.rootpath, "-c", code, PYTHONPATH=modules, TRITON_CACHE_DIR=str(folder))


def triton_cache(config: pytest.Config) -> Path | None:
    """In pytest's own cache, so that a second run costs little; None under -p no:cacheprovider."""
    cache = getattr(config, "cache", None)
    return Path(cache.mkdir("triton")) if cache else None


INTERPRETED, FROM_PTX, COMPILED = (pytest.StashKey[Job]() for _ in range(3))
