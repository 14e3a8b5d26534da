"""The Triton kernels' own tests, run by Triton's interpreter on the CPU in a process of their own."""

from __future__ import annotations

import re

import pytest
from interpreter import EARLY, InterpretedTests


def test_interpreted_kernels(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install 'matpac_fast[triton]'")
    run = request.config.stash.get(EARLY, None) or InterpretedTests(request.config.rootpath)
    request.addfinalizer(run.end)
    code, output = run.wait()
    assert code == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    with capsys.disabled():
        print(f"\n  {passed[1]} tests of Triton kernels passed under the interpreter", end="")
