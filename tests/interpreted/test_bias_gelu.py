"""bias_gelu's Triton kernels under Triton's interpreter, against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from matpac_fast import ops, use_backend
from matpac_fast.kernels import bias_gelu as kernels

DTYPES = [torch.bfloat16, torch.float16]
# What the last rounding takes, in units: Triton's interpreter cuts bfloat16 off, a GPU rounds it to the nearest.
ROUNDING = {torch.bfloat16: 1.0, torch.float16: 0.5, torch.float32: 0.0}
# The absolute error of the derivative in float32.
ABSOLUTE = 2e-6
SHAPES = [  # (N, C): one of each, multiples of nothing, several splits and blocks of columns, blocks that divide C
    (1, 1),
    (3, 261),
    (33, 264),
    (5, 1024),
    (1, 3072),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory holds NaN, so that what is left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def exact(h: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """gelu and its derivative in float64, by erfc: torch's gelu takes 1 + erf, of which nothing is left at -9."""
    z = h.double() + bias.double()
    phi = 0.5 * torch.special.erfc(-z / math.sqrt(2))
    return z * phi, phi + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def unit(reference: Tensor, dtype: torch.dtype) -> Tensor:
    """A unit in the last place of `dtype` at the reference; for float32, which is not rounded to, bfloat16's."""
    info = torch.finfo(torch.bfloat16 if dtype == torch.float32 else dtype)
    return info.eps * torch.exp2(torch.floor(torch.log2(reference.abs().clamp_min(info.tiny))))


def problem(n: int, c: int, dtype: torch.dtype, bias_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + c)
    grad, h = (torch.randn(n, c, generator=generator).to(dtype) for _ in range(2))
    return grad, 2 * h, torch.randn(c, generator=generator).to(bias_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_float64(shape, dtype):
    bias_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    grad, h, bias = problem(*shape, dtype, bias_dtype)
    before = [t.clone() for t in (grad, h, bias)]
    y = kernels.forward(h, bias)
    dh, dbias = kernels.backward(grad, h, bias)
    assert all(torch.equal(a, b) for a, b in zip(before, (grad, h, bias), strict=True))
    assert (y.dtype, dh.dtype, dbias.dtype) == (dtype, dtype, torch.float32)

    z = (h.double() + bias.double()).requires_grad_()
    plain = F.gelu(z)
    (slope,) = torch.autograd.grad(plain, z, grad.double())
    value, derivative = exact(h, bias)
    assert (plain - value).abs().max() < 1e-14
    assert (slope - grad.double() * derivative).abs().max() < 1e-14
    assert ((y - value).abs() <= (ROUNDING[dtype] + 0.02) * unit(value, dtype)).all()
    # Where the derivative crosses zero, its parts cancel.
    size = grad.double().abs()
    assert ((dh - slope).abs() <= (ROUNDING[dtype] + 0.02) * unit(slope, dtype) + ABSOLUTE * size).all()
    # The sum takes what dh is before its rounding.
    assert ((dbias - slope.sum(0)).abs() <= 2 * ABSOLUTE * size.sum(0)).all()

    again = (kernels.forward(h, bias), *kernels.backward(grad, h, bias))
    assert all(torch.equal(a, b) for a, b in zip(again, (y, dh, dbias), strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
def test_dense_grid(dtype):
    """Rounded as the float64 result is, but for some hundredths of a unit; and before any rounding, in float32."""
    options = {"BLOCK_R": 16, "MAX_WARPS": 4, "ROWS": 32}  # few programs
    h = torch.linspace(-12, 12, 24 * 1024).reshape(-1, 1024).to(dtype)
    bias = torch.linspace(-0.05, 0.05, 1024)  # between 16-bit numbers
    bias[0] = 0
    value, derivative = exact(h, bias)
    z = h.double() + bias.double()
    share = ROUNDING[dtype] + torch.where(z.abs() < 9, 0.03, 0.15)
    y = kernels.forward(h, bias, {name: options[name] for name in ("BLOCK_R", "MAX_WARPS")})
    assert ((y - value).abs() <= share * unit(value, dtype)).all()
    for size in (1.0, -3.1e-3):
        grad = torch.full_like(h, size)
        slope = grad.double() * derivative
        dh, _ = kernels.backward(grad, h, bias, options)
        # Where the derivative crosses zero, its parts cancel.
        crossing = ABSOLUTE * abs(size) * ((z + 0.75).abs() < 0.5)
        assert ((dh - slope).abs() <= share * unit(slope, dtype) + crossing).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_values_and_no_numbers(dtype):
    large = torch.finfo(dtype).max
    inf = float("inf")
    h = torch.tensor([[large, -large, 100.0, -100.0, inf, -inf, float("nan"), 0.0]], dtype=dtype)
    bias = torch.zeros(8)
    y = kernels.forward(h, bias)[0]
    dh, dbias = kernels.backward(torch.ones_like(h), h, bias)
    assert y[:6].tolist() == [large, 0, 100, 0, inf, 0]
    assert y[6].isnan()
    assert y[7] == 0
    # Where torch's gelu and its gradient are NaN at an infinity, these are the limits.
    assert dh[0, :6].tolist() == [1, 0, 1, 0, 1, 0]
    assert dh[0, 6].isnan()
    assert dh[0, 7] == 0.5
    assert torch.equal(dbias.nan_to_num(7), dh[0].float().nan_to_num(7))
    assert kernels.forward(h, torch.full((8,), float("nan"))).isnan().all()


def test_every_configuration_gives_the_same():
    grad, h, bias = problem(9, 512, torch.bfloat16, torch.float32)
    y, (dh, dbias) = kernels.forward(h, bias), kernels.backward(grad, h, bias)
    for block_r, warps, rows in ((1, 1, 4), (8, 4, 64)):
        options = {"BLOCK_R": block_r, "MAX_WARPS": warps}
        assert torch.equal(kernels.forward(h, bias, options), y)
        other, sums = kernels.backward(grad, h, bias, {**options, "ROWS": rows})
        assert torch.equal(other, dh)
        torch.testing.assert_close(sums, dbias, rtol=1e-5, atol=1e-5)


def test_nothing():
    for n, c in ((0, 5), (3, 0), (0, 0)):
        h, bias = torch.empty((n, c), dtype=torch.bfloat16), torch.empty(c)
        dh, dbias = kernels.backward(h, h, bias)
        assert kernels.forward(h, bias).shape == dh.shape == (n, c)
        assert torch.equal(dbias, torch.zeros(c))


def test_the_op_and_its_gradients():
    generator = torch.Generator().manual_seed(0)
    h, bias = torch.randn(3, 5, 24, generator=generator).half(), torch.randn(24, generator=generator)
    grad = torch.randn(3, 5, 24, generator=generator).half()
    with use_backend("triton"):
        leaves = [h.clone().requires_grad_(), bias.clone().requires_grad_()]
        out = ops.bias_gelu(*leaves)
        got = [out, *torch.autograd.grad(out, leaves, grad)]
        wide = ops.bias_gelu(h.double(), bias.double())
    leaves = [h.double().requires_grad_(), bias.double().requires_grad_()]
    out = torch.nn.functional.gelu(leaves[0] + leaves[1])
    assert torch.equal(wide, out)
    for ours, want in zip(got, [out, *torch.autograd.grad(out, leaves, grad.double())], strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=2e-3, atol=2e-3)
