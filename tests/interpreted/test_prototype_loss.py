"""prototype_loss's Triton kernels under Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from matpac_fast import ops, reference, use_backend
from matpac_fast.errors import BackendError
from matpac_fast.kernels import prototype_loss as kernels
from matpac_fast.ops import _prototype_launchers

TEMPS = (0.1, 0.04)
SCALES = math.log2(math.e) / torch.tensor(TEMPS, dtype=torch.float64)
SHAPES = [  # (N, K, d): within one tile, across tiles, multiples of nothing, one of each
    (130, 140, 40),
    (65, 133, 100),
    (7, 3, 16),
    (1, 1, 1),
]


def sides(n: int, k: int, d: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n + k + d)
    student, teacher, student_weight, teacher_weight = (
        F.normalize(torch.randn(rows, d, generator=generator), dim=1) for rows in (n, n, k, k)
    )
    center = 0.1 * torch.randn(k, generator=generator)
    student, teacher = scale * student, scale * teacher
    return *(t.to(dtype) for t in (student, student_weight, teacher, teacher_weight)), center


def run_kernels(inputs: tuple[Tensor, ...], delta_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Loss, mean and delta from the kernels themselves, in poisoned memory."""
    n, k = inputs[0].shape[0], inputs[1].shape[0]
    nan = float("nan")
    loss, stats = torch.full((n,), nan), torch.full((n, 4), nan)
    delta, column_sum = torch.full((n, k), nan, dtype=delta_dtype), torch.zeros(k, dtype=torch.float64)
    kernels.forward(*inputs, SCALES, loss, stats, column_sum)
    kernels.delta(*inputs, SCALES, stats, delta)
    return loss, column_sum / n, delta


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_the_reference(shape, dtype, scale, monkeypatch):
    monkeypatch.setattr(kernels, "SPLIT_ROWS", 64)
    inputs = sides(*shape, dtype, scale)
    before = [t.clone() for t in inputs]
    loss, mean, delta = run_kernels(inputs, dtype)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))

    student, student_weight, teacher, teacher_weight, center = (t.double() for t in inputs)
    exact, exact_mean = reference.prototype_loss(student, student_weight, teacher, teacher_weight, center, *TEMPS)
    p = torch.softmax((teacher @ teacher_weight.T - center) / TEMPS[1], 1)
    exact_delta = torch.softmax(student @ student_weight.T / TEMPS[0], 1) - p
    # The reference's own error in float32 on these inputs; in 16 bits only the stored delta is rounded further.
    plain, plain_mean = reference.prototype_loss(*inputs, *TEMPS)
    few = 4 * torch.finfo(torch.float32).eps
    assert (loss - exact).abs().max() <= 2 * (plain - exact).abs().max() + few * exact.abs().max()
    # A logit is rounded by its size, which for large ones is a share of the probability; how much depends on the order.
    share = torch.finfo(torch.float32).eps * ((teacher @ teacher_weight.T).abs().max() / TEMPS[1]) + few
    assert (mean - exact_mean).abs().max() <= 2 * (plain_mean - exact_mean).abs().max() + share * exact_mean.max()
    logit = torch.cat([student @ student_weight.T / TEMPS[0], teacher @ teacher_weight.T / TEMPS[1]]).abs().max()
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    assert (delta.double() - exact_delta).abs().max() <= few * (1 + logit) + rounding

    again = run_kernels(inputs, dtype)
    assert all(torch.equal(a, b) for a, b in zip(again, (loss, mean, delta), strict=True))


@pytest.mark.parametrize("mean_of", ["probabilities", "logits"])
def test_op_and_its_gradients(mean_of, monkeypatch):
    monkeypatch.setattr(_prototype_launchers, "_CHUNK_BYTES", {"cpu": 1})  # chunks of 64 rows
    inputs = sides(70, 33, 20, torch.float32)
    upstream = torch.randn(70, generator=torch.Generator().manual_seed(0))
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        student, student_weight, *rest = (t.to(dtype) for t in inputs)
        student.requires_grad_(), student_weight.requires_grad_()
        with use_backend(backend):
            loss, mean = ops.prototype_loss(student, student_weight, *rest, *TEMPS, mean_of)
            grads = torch.autograd.grad(loss, (student, student_weight), upstream.to(dtype))
        results.append((loss.detach(), mean, *grads))
    for out, plain, exact in zip(*results, strict=True):
        few = 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + few


@pytest.mark.parametrize("off", [1, 64, 130, 199])
def test_prototypes_that_an_infinite_centre_takes_from_the_teacher(off):
    """A whole block of them among the first too."""
    *rest, center = sides(9, 200, 20, torch.float32)
    center[:off] = torch.inf
    want = reference.prototype_loss(*(t.double() for t in (*rest, center)), *TEMPS)
    with use_backend("triton"):
        out = ops.prototype_loss(*rest, center, *TEMPS)
    for mine, exact in zip(out, want, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-6)


def test_many_prototypes(monkeypatch):
    """K = 65,536 and one beyond, in tiles that the interpreter gets through in seconds."""
    tiles = {"BLOCK_M": 16, "BLOCK_K": 8192, "BLOCK_D": 16, "PRECISION": kernels.PRECISION}
    monkeypatch.setattr(kernels, "_options", lambda *_: tiles)
    inputs = sides(5, 65_537, 8, torch.float32)
    loss, mean = reference.prototype_loss(*(t.double() for t in inputs), *TEMPS)
    with use_backend("triton"):
        out, out_mean = ops.prototype_loss(*inputs, *TEMPS)
    torch.testing.assert_close(out.double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out_mean.double(), mean, rtol=1e-5, atol=1e-9)


def test_no_rows_and_float64():
    with use_backend("triton"):
        loss, mean = ops.prototype_loss(*sides(0, 5, 3, torch.float32), *TEMPS)
        assert loss.shape == (0,)
        assert mean.isnan().all()
        with pytest.raises(BackendError, match="it has no float64"):
            ops.prototype_loss(*sides(2, 5, 3, torch.float64), *TEMPS)
