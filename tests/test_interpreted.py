"""The Triton kernels' own tests, run on the CPU in processes of their own: by Triton's interpreter, and from the PTX
that Triton compiles for a GPU."""

from __future__ import annotations

import re

import numpy as np
import pytest
from early import FROM_PTX, INTERPRETED, from_ptx, interpreted
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


def test_what_kernels_are_compiled_to(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    triton = pytest.importorskip("triton", reason="needs triton: pip install 'matpac_fast[triton]'")
    if not "3.6" <= TorchVersion(triton.__version__) < "3.9":
        pytest.skip(f"benchmarks/ptx knows the instructions of Triton 3.6 to 3.8, and this is {triton.__version__}")
    job = request.config.stash.get(FROM_PTX, None) or from_ptx(request.config)
    request.addfinalizer(job.end)
    code, output = job.wait()
    assert code == 0, output
    passed = [int(number) for number in re.findall(r"(\d+) passed", output)]
    assert len(passed) == 4, output
    with capsys.disabled():
        print(f"\n  {sum(passed)} tests of Triton kernels passed from PTX for sm_90, 80, 100 and 120", end="")
