"""mask_shuffle's Triton kernel under Triton's interpreter: the bits of the reference."""

from __future__ import annotations

import pytest
import torch

from matpac_fast import ops, reference, use_backend


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 64, 65, 190, 300])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (7, 123_456), (-1, 2**63), (2**64 + 5, -(2**63))])
def test_the_same_bits(seed, step, n_tokens):
    index = torch.tensor([0, 1, -1, 2**62, -(2**63)])
    with use_backend("triton"):
        got = ops.mask_shuffle(seed, step, index, n_tokens)
    assert torch.equal(got, reference.mask_shuffle(seed, step, index, n_tokens))


def test_strided_and_empty_index():
    index = torch.arange(12).view(4, 3)[:, 1]
    with use_backend("triton"):
        got = ops.mask_shuffle(1, 2, index, 30)
        assert ops.mask_shuffle(1, 2, index[:0], 30).shape == (0, 30)
    assert torch.equal(got, reference.mask_shuffle(1, 2, index, 30))
