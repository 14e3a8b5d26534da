"""attention's Triton kernels under Triton's interpreter, against softmax attention in float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from matpac_fast import load_encoder, ops, use_backend
from matpac_fast.kernels import attention as kernels
from matpac_fast.study.cost import count_macs

op_module = importlib.import_module("matpac_fast.ops.attention")
SHAPES = [(n, 1, 2, 32) for n in (1, 64, 65, 191, 200)] + [(n, 2, 1, 64) for n in (16, 58, 134, 256)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(n: int, batch: int, heads: int, d: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3, H, D) and the gradient of the output (B, N, H, D)."""
    generator = torch.Generator().manual_seed(n + d)
    qkv = scale * torch.randn(batch, n, 3, heads, d, generator=generator)
    return qkv.to(dtype), torch.randn(batch, n, heads, d, generator=generator).to(dtype)


def exact(qkv: Tensor, grad: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Output, lse and dqkv of attention written out; in 16 bits, rounded wherever that rounds."""
    qkv = qkv.to(dtype).detach().requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, N, D)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    out = (logits.softmax(-1) @ v).transpose(1, 2)
    (dqkv,) = torch.autograd.grad(out, qkv, grad.to(dtype))
    return out.detach(), logits.detach().double().logsumexp(-1) * math.log2(math.e), dqkv


def run(qkv: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    out, lse = kernels.forward(qkv, need_lse=True)
    return out, lse, kernels.backward(grad, qkv, out, lse)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradient(shape, dtype):
    qkv, grad = problem(*shape, dtype)
    before = qkv.clone(), grad.clone()
    out, lse, dqkv = run(qkv, grad)
    assert torch.equal(qkv, before[0])
    assert torch.equal(grad, before[1])

    out64, lse64, dqkv64 = exact(qkv, grad)
    assert out.dtype == dqkv.dtype == dtype
    assert (out.shape, dqkv.shape) == (out64.shape, dqkv64.shape)
    eps = torch.finfo(dtype).eps
    assert (out - out64).abs().max() <= eps * out64.abs().max()
    assert (lse - lse64).abs().max() <= 1e-5 * (1 + lse64.abs().max())
    for part, part64 in zip(dqkv.unbind(2), dqkv64.unbind(2), strict=True):  # of q, k and v
        assert (part - part64).abs().max() <= 2 * eps * part64.abs().max() + 1e-6


@pytest.mark.parametrize("shape", [(64, 2, 2, 32), (191, 2, 1, 32), (70, 1, 2, 64), (256, 1, 1, 32)], ids=str)
def test_the_gradient_of_a_bias_comes_with_it(shape):
    qkv, grad = problem(*shape, torch.bfloat16)
    out, lse, dqkv = run(qkv, grad)
    same, sums = kernels.backward(grad, qkv, out, lse, need_sums=True)
    assert torch.equal(same, dqkv)
    assert sums is not None
    exact64 = exact(qkv, grad)[2].sum((0, 1))  # (3, H, D)
    rounded = dqkv.double().sum((0, 1))
    for i, mine in enumerate(sums.view(exact64.shape).double()):
        assert (mine - exact64[i]).abs().max() <= (rounded[i] - exact64[i]).abs().max() + 1e-2
    assert not sums.view(exact64.shape)[1].any()  # that of the keys' bias
    assert exact64[1].abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(64, 1, 2, 32), (134, 2, 1, 64)], ids=str)
def test_all_queries_of_a_head_in_one_program(shape, monkeypatch):
    qkv, _ = problem(*shape, torch.bfloat16)
    apart = kernels.forward(qkv, need_lse=True)
    monkeypatch.setattr(kernels, "FWD_HEADS", 1)
    assert all(torch.equal(a, b) for a, b in zip(kernels.forward(qkv, need_lse=True), apart, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(70, 1, 1, 32), (58, 1, 1, 64)], ids=str)
@pytest.mark.parametrize("sign", [-1, 1])
def test_large_logits(shape, dtype, sign):
    """Up to thousands, and where all are negative their exponentials vanish unless the largest is taken off."""
    qkv, grad = problem(*shape, dtype, 30.0)
    if sign < 0:
        qkv[:, :, 0] = qkv[:, :, 0].abs()
        qkv[:, :, 1] = -qkv[:, :, 1].abs()
    out, _, dqkv = run(qkv, grad)
    out64, _, dqkv64 = exact(qkv, grad)
    # A gradient is a difference of products as large as these, which the softmax may multiply by next to nothing.
    size = (qkv.double().abs().max() ** 2).item()
    eps = torch.finfo(dtype).eps
    assert (out - out64).abs().max() <= eps * out64.abs().max()
    assert (dqkv - dqkv64).abs().max() <= 2 * eps * size


@pytest.mark.parametrize("shape", [(58, 1, 1, 64), (134, 1, 1, 32)], ids=str)
def test_same_bits_twice_and_without_what_the_gradient_needs(shape):
    qkv, grad = problem(*shape, torch.bfloat16)
    once = run(qkv, grad)
    assert all(torch.equal(a, b) for a, b in zip(run(qkv, grad), once, strict=True))
    without, empty = kernels.forward(qkv, need_lse=False)
    assert torch.equal(without, once[0])
    assert empty.numel() == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shape", [(58, 1, 1, 64), (191, 1, 1, 32)], ids=str)
def test_the_blocks_of_every_architecture(shape, capability, monkeypatch):
    qkv, grad = problem(*shape, torch.bfloat16)
    monkeypatch.setattr(kernels, "capability_of", lambda _: capability)
    torch.testing.assert_close(run(qkv, grad)[2].double(), exact(qkv, grad)[2], atol=2e-2, rtol=2e-2)


def test_no_samples_and_every_width():
    assert {d for d, _ in kernels._BWD} == set(op_module.HEAD_WIDTHS)
    qkv, grad = problem(58, 0, 2, 64, torch.bfloat16)
    out, lse, dqkv = run(qkv, grad)
    assert (out.shape, lse.shape, dqkv.shape) == (grad.shape, (0, 2, 58), qkv.shape)


def test_the_op_and_its_gradient():
    """Through dispatch and autograd; what the kernels do not take goes to torch."""
    qkv, grad = problem(58, 2, 2, 64, torch.bfloat16)
    want = run(qkv, grad)
    leaf = qkv.clone().requires_grad_()
    with use_backend("triton"):
        out = ops.attention(leaf)
        assert torch.equal(out, want[0])
        assert torch.equal(torch.autograd.grad(out, leaf, grad)[0], want[2])
        assert torch.equal(ops.attention(qkv), want[0])
        for other in (
            problem(257, 1, 1, 64, torch.bfloat16),
            problem(9, 1, 1, 48, torch.bfloat16),
            problem(9, 1, 1, 32, torch.float32),
        ):
            torch.testing.assert_close(ops.attention(other[0]).double(), exact(*other)[0], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(ops.attention(leaf), out, atol=1e-2, rtol=0.02)


def test_a_study_counts_its_products():
    encoder = load_encoder("untrained-tiny", dtype=torch.bfloat16)
    waves = torch.zeros(1, 4_000)
    counts = []
    for name in ("triton", "reference"):
        with use_backend(name):
            counts.append(count_macs(encoder, waves))
    mels = 80 * 201 * 23  # which the reference's log-mel takes as a product
    assert counts[0] == counts[1] - mels
