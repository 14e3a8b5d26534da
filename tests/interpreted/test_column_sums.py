"""column_sums under Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

from matpac_fast.kernels.column_sums import column_sums


@pytest.mark.parametrize(
    "shape", [(792, 2, 24), (1, 16), (512, 40), (513, 1), (3, 261), (0, 20), (4, 0)], ids=str
)  # one row, a block of them and one more, columns that are multiples of nothing, neither rows nor columns
def test_sums_of_columns(shape):
    # The next columns' and rows' neighbours are NaN: what lies past the end must not be read.
    whole = torch.full((1 + shape[0], *shape[1:]), torch.nan)
    partial = whole[: shape[0]].copy_(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))))
    sums = column_sums(partial)
    assert (sums.shape, sums.dtype) == (shape[1:], torch.float32)
    torch.testing.assert_close(sums.double(), partial.double().sum(0), rtol=0, atol=1e-6 * (1 + shape[0]))
    assert torch.equal(sums, column_sums(partial))


def test_a_column_with_a_nan():
    partial = torch.ones(700, 33)
    partial[600, 17] = torch.nan
    assert column_sums(partial).isnan().nonzero().tolist() == [[17]]
