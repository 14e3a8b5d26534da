"""The tests of tests/interpreted in a pytest of their own: Triton decides at import whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


class InterpretedTests:
    """Under way from when it is made."""

    def __init__(self, root: Path):
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by end(); a pipe would fill and stop it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-p", "no:cacheprovider"],
            env={**os.environ, "TRITON_INTERPRET": "1"},
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


# Begun beside the first tests where the whole suite runs: most tests take one core, and there are two.
EARLY = pytest.StashKey[InterpretedTests]()
