"""The transpose and the sums that a linear layer's gradients are made of: right, and the same bits whoever computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

_C = pytest.importorskip("matpac_fast._C", reason="needs the native extension: pip install . with a C++17 compiler")


def transposed(x: Tensor, threads: int = 1) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    out, sums = torch.full((width, rows), torch.nan), torch.full((width,), torch.nan)
    _C.transposed_cpu(_C.TransposedArgs(x.data_ptr(), rows, width, out.data_ptr(), sums.data_ptr()), threads)
    return out, sums


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize(
    "shape", [(464, 96), (1528, 512), (70, 33), (4, 31), (3, 17), (64, 32), (65, 1), (1, 40), (1, 1), (5, 0)], ids=str
)
def test_every_instruction_set_and_any_threads(shape, isa, instruction_set):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    given = x.clone()
    with instruction_set("portable"):
        _, want = transposed(x)
    with instruction_set(isa):
        for threads in (1, 3):
            out, sums = transposed(x, threads)
            assert torch.equal(out, x.t())
            assert torch.equal(sums, want)
    assert torch.equal(x, given)
    exact = x.double().sum(0)
    assert ((want - exact).abs() <= 1e-6 * x.double().abs().sum(0)).all()


def test_sums_are_as_near_to_float64s_as_torchs():
    x = torch.rand(4096, 64, generator=torch.Generator().manual_seed(0))  # of one sign, where every error shows
    exact = x.double().sum(0)
    ours, torchs = ((sums - exact).abs().max() for sums in (transposed(x)[1], x.sum(0)))
    assert ours <= torchs


def test_what_is_no_number_stays_so():
    x = torch.ones(8, 20)
    x[5, 3], x[2, 17] = torch.nan, torch.inf
    out, sums = transposed(x)
    torch.testing.assert_close(out, x.t().contiguous(), equal_nan=True)
    assert sums[3].isnan()
    assert sums[17] == torch.inf
    assert sums.isfinite().sum() == 18
