"""The Triton kernels' own tests, run by Triton's interpreter on the CPU in a process of their own."""

from __future__ import annotations

import re

import numpy as np
import pytest
from early import INTERPRETED, interpreted
from torch.torch_version import TorchVersion


def test_interpreted_kernels(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    triton = pytest.importorskip("triton", reason="needs triton: pip install 'matpac_fast[triton]'")
    if TorchVersion(triton.__version__) < "3.7" and TorchVersion(np.__version__) >= "2.4":
        pytest.skip("Triton's interpreter fails on numpy 2.4 and later before Triton 3.7: pip install 'numpy<2.4'")
    job = request.config.stash.get(INTERPRETED, None) or interpreted(request.config)
    request.addfinalizer(job.end)
    code, output = job.wait()
    assert code == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None, output
    with capsys.disabled():
        print(f"\n  {passed[1]} tests of Triton kernels passed under the interpreter", end="")
