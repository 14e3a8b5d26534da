"""prediction_loss's Triton kernels under Triton's interpreter, through the op and its gradient."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from matpac_fast import ops, reference, use_backend


@pytest.fixture(autouse=True)
def triton_in_poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


def run(function, prediction: Tensor, target: Tensor, temperature: float | None, upstream: Tensor):
    leaf = prediction.detach().requires_grad_()
    loss, best = function(leaf, target, temperature)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))[0], best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("shape", "temperature"),
    [((37, 19), None), ((9, 768), None), ((0, 5), None), ((23, 5, 17), 0.3), ((6, 3, 96), 0.0)],
)
def test_as_near_to_float64_as_the_reference(shape, temperature, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    prediction = torch.randn(shape, generator=generator).to(dtype)
    target = torch.randn(shape[0], shape[-1], generator=generator)  # float32, as the teacher's final norm gives it
    upstream = torch.randn(shape[0], generator=generator)
    exact = run(reference.prediction_loss, prediction.double(), target.double(), temperature, upstream)
    out, again = (run(ops.prediction_loss, prediction, target, temperature, upstream) for _ in range(2))
    assert (out[0].dtype, out[1].dtype) == (torch.float32, dtype)
    assert out[2] is None if temperature is None else torch.equal(out[2], exact[2])
    for value, same, best, roundings in zip(out, again, exact, (8, 2 if dtype == torch.float32 else 1), strict=False):
        assert torch.equal(value, same)
        if value.numel():
            eps = max(torch.finfo(value.dtype).eps, 8 * torch.finfo(torch.float32).eps)
            assert (value - best).abs().max() <= roundings * eps * best.abs().max()


def test_vectors_of_no_length_and_of_great_length():
    prediction, target = torch.zeros(4, 8), torch.ones(4, 8)
    prediction[1], target[1] = 1e19, 1e-19
    prediction[2], target[2] = 1e-25, 1.0
    loss, grad, _ = run(ops.prediction_loss, prediction, target, None, torch.ones(4))
    want, want_grad, _ = run(reference.prediction_loss, prediction.double(), target.double(), None, torch.ones(4))
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-3)


def test_what_the_kernel_does_not_take_is_the_reference_s():
    prediction, target = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    assert ops.prediction_loss(prediction, target)[0].dtype == torch.float64
