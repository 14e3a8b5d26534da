"""add_layer_norm's Triton kernels under Triton's interpreter, against LayerNorm and its gradients in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from matpac_fast import ops, reference, use_backend
from matpac_fast.kernels import add_layer_norm as kernels

EPS = 1e-6
FLOAT32 = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever the launchers allocate is NaN until it is written; few programs, so that each loops over its rows."""
    for owner, name in ((torch, "empty_like"), (Tensor, "new_empty")):
        make = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, make=make, **kwargs: make(*args, **kwargs).fill_(float("nan")))
    options = kernels._options
    monkeypatch.setattr(kernels, "_options", lambda *args: (3, options(*args)[1]))


def problem(n: int, d: int, dtype: torch.dtype, mean: float = 0.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n + d)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "x": (mean + normal(n, d)).to(dtype),
        "delta": normal(n, d).bfloat16(),
        "bias": normal(d),
        "gamma": 1 + 0.1 * normal(d),
        "beta": normal(d),
        "dnormed": normal(n, d).bfloat16(),
        "dx_next": normal(n, d).to(dtype),
    }


def roundings(out: Tensor, exact: Tensor, terms: Tensor | float = 0.0, few: float = 0.0) -> None:
    """`out` is `exact` but for the rounding of its dtype, and for `few` float32 roundings of `terms`."""
    # Triton's interpreter cuts the bits that bfloat16 lacks, where a GPU rounds to nearest.
    share = 0.5 * FLOAT32 if out.dtype == torch.float32 else torch.finfo(out.dtype).eps
    assert out.shape == exact.shape
    bound = share * exact.abs() + few * FLOAT32 * terms
    excess = ((out.double() - exact).abs() - bound).amax(dim=tuple(range(out.dim()))) if out.numel() else exact.sum()
    assert excess <= 0


def check(tensors: dict[str, Tensor], delta: bool, bias: bool, dx_next: bool, out_dtype: torch.dtype) -> None:
    t: dict[str, Tensor | None] = dict(tensors)
    t |= {name: None for name, there in (("delta", delta), ("bias", bias), ("dx_next", dx_next)) if not there}
    before = {name: value.clone() for name, value in tensors.items()}
    x, gamma, beta, dnormed = (tensors[name] for name in ("x", "gamma", "beta", "dnormed"))
    new_x, normed, stats = kernels.forward(x, t["delta"], t["bias"], gamma, beta, EPS, out_dtype)

    terms = [tensors["x"].double()] + [value.double() for value in (t["delta"], t["bias"]) if value is not None]
    if delta:
        roundings(new_x, torch.stack(torch.broadcast_tensors(*terms)).sum(0), sum(term.abs() for term in terms), 2)
    else:
        assert not new_x.numel()
        new_x = x
    assert (new_x.dtype, normed.dtype, stats.dtype) == (x.dtype, out_dtype, torch.float32)

    # From what the kernel itself rounded new_x to, so that no bound has to carry that rounding along.
    leaves = [value.double().requires_grad_() for value in (new_x, gamma, beta)]
    exact = F.layer_norm(leaves[0], gamma.shape, leaves[1], leaves[2], EPS)
    rows = leaves[0].detach()
    rstd = ((rows - rows.mean(1, keepdim=True)).square().mean(1, keepdim=True) + EPS).rsqrt()
    hat = (rows - rows.mean(1, keepdim=True)) * rstd
    # The mean is as exact as its own size allows; rounded, it moves all of the row.
    shift = rows.abs().amax(1, keepdim=True) * rstd
    roundings(normed, exact.detach(), ((hat.abs() + shift) * gamma.double().abs()) + beta.double().abs(), 4)
    roundings(stats[:, :1], rows.mean(1, keepdim=True), rows.abs().amax(1, keepdim=True), 2)
    roundings(stats[:, 1:], rstd, rstd * (1 + shift * FLOAT32 * shift), 4)

    delta_dtype = torch.bfloat16 if delta else None
    dx, ddelta, sums = kernels.backward(dnormed, t["dx_next"], new_x, stats, gamma, delta_dtype)
    dx64, dgamma64, dbeta64 = torch.autograd.grad(exact, leaves, dnormed.double())
    residual = 0.0 if t["dx_next"] is None else tensors["dx_next"].double()
    dx64 = dx64 + residual
    # Sizes of the terms that each result adds up.
    g = (dnormed.double() * gamma.double()).abs()
    along = g.mean(1, keepdim=True) + (hat.abs() + shift) * (g * (hat.abs() + shift)).mean(1, keepdim=True)
    size = (g + along) * rstd + (residual.abs() if dx_next else 0.0)
    roundings(dx, dx64, size, 4)
    assert dx.dtype == x.dtype
    roundings(sums[0], dgamma64, (dnormed.double().abs() * (hat.abs() + shift)).sum(0), 4)
    roundings(sums[1], dbeta64, dnormed.double().abs().sum(0), 4)
    assert (sums.dtype, len(sums)) == (torch.float32, 3 if delta else 2)
    if delta:
        roundings(sums[2], dx64.sum(0), size.sum(0), 4)
    if delta and x.dtype != delta_dtype:
        assert ddelta.dtype == delta_dtype
        roundings(ddelta, dx64, size, 4)
    else:
        assert not ddelta.numel()

    assert all(torch.equal(value, tensors[name]) for name, value in before.items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [96, 100, 192, 512, 768])
def test_sizes(d, dtype):
    check(problem(15, d, dtype), True, True, True, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dx_next", [False, True])
@pytest.mark.parametrize(("delta", "bias"), [(False, False), (True, False), (True, True)])
def test_what_may_be_absent(delta, bias, dx_next, dtype):
    # With x in float32 so is all the rest, where no rounding of the result hides an error.
    tensors = problem(13, 100, dtype)
    check({**tensors, "dnormed": tensors["dnormed"].to(dtype)}, delta, bias, dx_next, dtype)


@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_few_rows(n):
    check(problem(n, 192, torch.float32), True, True, True, torch.bfloat16)
    check(problem(n, 37, torch.bfloat16), False, False, True, torch.bfloat16)


def test_same_bits_twice():
    t = problem(17, 192, torch.float32)
    runs = []
    for _ in range(2):
        out = kernels.forward(t["x"], t["delta"], t["bias"], t["gamma"], t["beta"], EPS, torch.bfloat16)
        grads = kernels.backward(t["dnormed"], t["dx_next"], out[0], out[2], t["gamma"], torch.bfloat16)
        runs.append(out + grads)
    assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_far_from_zero(dtype):
    check(problem(11, 768, dtype, mean=1000.0), True, True, True, torch.float32)


@pytest.mark.parametrize("first", [True, False])
def test_the_op_and_its_gradients(first):
    """Through dispatch and autograd, against the reference in float64; the sum goes on, as a residual stream does."""
    t = problem(12, 192, torch.float32)
    norm = torch.nn.LayerNorm(192, EPS)
    with torch.no_grad():
        norm.weight.copy_(t["gamma"]), norm.bias.copy_(t["beta"])
    results = []
    for dtype, source in ((torch.float32, ops), (torch.float64, reference)):
        x = t["x"].to(dtype).view(3, 4, -1)
        delta = (t["delta"] if dtype == torch.float32 else t["delta"].double()).view_as(x)
        leaves = [v.clone().requires_grad_() for v in ((x,) if first else (x, delta, t["bias"].to(dtype)))]
        module = norm.double() if dtype == torch.float64 else norm
        with use_backend("triton" if dtype == torch.float32 else "reference"):
            total, normed = source.add_layer_norm(*leaves, *[None] * (3 - len(leaves)), module, dtype)
            out = (total * t["dx_next"].view_as(x)).sum() + (normed * t["dnormed"].to(dtype).view_as(x)).sum()
            results.append([total, normed, *torch.autograd.grad(out, [*leaves, *module.parameters()])])
    for got, want in zip(*results, strict=True):
        rough = 1e-2 if got.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got.double(), want, rtol=rough, atol=rough * want.abs().max().item())


def test_wide_rows_and_odd_ones():
    check(problem(5, 1280, torch.float32), True, True, True, torch.bfloat16)
    check(problem(5, 2048, torch.float32), True, False, True, torch.bfloat16)
    check(problem(5, 1, torch.float32), True, True, True, torch.bfloat16)


def test_views_of_other_tensors():
    """Columns of a wider matrix, a transposed one and a row that repeats are read where they lie."""
    wide, norm = torch.randn(16, 200), torch.nn.LayerNorm(16, EPS)
    for x, delta in ((wide[:, :16], wide[:, 16:32].bfloat16()), (wide[:, :16].T, wide[:, 16:32].T.bfloat16())):
        bias = torch.randn(1).expand(16)
        want = reference.add_layer_norm(x, delta, bias, norm, torch.float32)
        with use_backend("triton"):
            got = ops.add_layer_norm(x, delta, bias, norm, torch.float32)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_two_leaves_of_one_dtype_have_gradients_of_their_own():
    x, delta = (torch.randn(4, 32, requires_grad=True) for _ in range(2))
    norm = torch.nn.LayerNorm(32, EPS)
    with use_backend("triton"):
        total, normed = ops.add_layer_norm(x, delta, None, norm, torch.float32)
        (total.sum() + normed.sum()).backward()
    assert x.grad.data_ptr() != delta.grad.data_ptr()


def test_a_norm_of_another_width_is_refused():
    x = torch.randn(3, 64)
    with use_backend("triton"):
        with pytest.raises(ValueError, match=r"the norm's weight is \(32,\) float32 on cpu; expected \(64,\)"):
            ops.add_layer_norm(x, None, None, torch.nn.LayerNorm(32), torch.bfloat16)
        with pytest.raises(TypeError, match="the norm's weight is a NoneType; expected a torch.Tensor"):
            ops.add_layer_norm(x, None, None, torch.nn.LayerNorm(64, elementwise_affine=False), torch.bfloat16)
        with pytest.raises(ValueError, match=r"the norm's weight is \(64,\) float32 on cpu; expected \(\)"):
            ops.add_layer_norm(torch.tensor(1.0), None, None, torch.nn.LayerNorm(64), torch.bfloat16)
