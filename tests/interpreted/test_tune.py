"""benchmarks/tune.py: a kernel's first candidate computes what the package's own options do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import tune


# Of the others one case takes the interpreter ten seconds.
@pytest.mark.parametrize("op", ["masked_patch_embed", "prediction_loss"])
def test_candidates_are_applied_and_right(op):
    for name, call, candidates in tune.CASES[op](1):
        for got, want in zip(call(candidates[0]), call(None), strict=True):
            assert got.shape == want.shape, name
            torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2, msg=name)
        with pytest.raises((TypeError, KeyError, AttributeError)):
            call({"NO_SUCH_OPTION": 1})
