"""The Triton kernels' own tests, run by Triton's interpreter on the CPU in a process of their own.

Triton decides at import whether it interprets, so they cannot share this process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_interpreted_kernels(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install 'matpac_fast[triton]'")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE / "interpreted"), "-q", "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
    )
    output = run.stdout + run.stderr
    assert run.returncode == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    with capsys.disabled():
        print(f"\n  {passed[1]} tests of Triton kernels passed under the interpreter", end="")
