"""ops.log_mel on every launcher that runs here, against the official outputs and the reference in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from matpac_fast import ops, reference, use_backend
from matpac_fast.reference import LogMelConfig

CONFIG = LogMelConfig()


def wave(batch: int, samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(batch, samples, generator=generator)


@pytest.mark.parametrize("entry", ["noise", "chirp", "silence", "quiet", "loud", "one_frame", "odd"])
def test_no_further_from_float64_than_the_official_float32(golden, entry):
    arrays = golden("log_mel")
    exact = arrays[f"{entry}/exact_fp64"]
    official_error = (arrays[f"{entry}/official_fp32"] - exact).abs().max()
    with use_backend("cpp"):
        out = ops.log_mel(arrays[f"{entry}/wave"])
    assert out.dtype == torch.float32
    assert (out - exact).abs().max() <= official_error


def test_opcheck():
    scalars = (*dataclasses.astuple(CONFIG), torch.float32)
    op = torch.ops.matpac_fast.log_mel.default
    torch.library.opcheck(op, (wave(3, 1234), *scalars))
    torch.library.opcheck(op, (wave(1234, 3).T.requires_grad_(), *scalars))


def test_gradient_is_that_of_the_reference():
    x = wave(2, 1000).requires_grad_()
    upstream = torch.randn(2, 80, 4, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(ops.log_mel(x), x, upstream)
    (expected,) = torch.autograd.grad(reference.log_mel(x), x, upstream)
    assert torch.equal(grad, expected)


def test_too_short_says_what_to_do():
    with pytest.raises(ValueError, match=r"\(2, 399\).*400 samples \(25 ms\)"):
        ops.log_mel(wave(2, 399))
