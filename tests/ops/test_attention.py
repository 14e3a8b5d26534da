"""ops.attention on a CPU, in C++, against attention written out in float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from matpac_fast import backend, ops, reference, use_backend

op_module = importlib.import_module("matpac_fast.ops.attention")
SHAPES = [(2, 58, 3, 64), (1, 134, 2, 64), (2, 191, 2, 32), (1, 97, 2, 48), (3, 5, 1, 7), (1, 1, 1, 1), (1, 16, 2, 128)]


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"], autouse=True)
def isa(request: pytest.FixtureRequest, instruction_set, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(op_module, "_LEAST", 0)
    with instruction_set(request.param):
        yield request.param


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3, H, d) and the gradient of the result (B, N, H, d)."""
    b, n, h, d = shape
    generator = torch.Generator().manual_seed(sum(shape))
    qkv = scale * torch.randn(b, n, 3, h, d, generator=generator, dtype=torch.float64)
    return qkv.to(dtype), torch.randn(b, n, h, d, generator=generator, dtype=torch.float64).to(dtype)


def run(function, qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def written_out(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_as_near_to_float64_as_the_reference(shape, scale, dtype, poisoned):
    tensors = problem(shape, dtype, scale)
    before = [t.clone() for t in tensors]
    exact = run(written_out, *(t.double() for t in tensors))
    plain, out, again = (run(f, *tensors) for f in (reference.attention, ops.attention, ops.attention))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    for value, own, best, same in zip(out, plain, exact, again, strict=True):
        assert torch.equal(value, same)
        assert value.dtype == dtype
        assert value.is_contiguous()
        # In float64 the one that they are held against is no better than they are.
        few = (8 if dtype == torch.float32 else 1000) * torch.finfo(dtype).eps * best.abs().max()
        assert (value - best).abs().max() <= 2 * (own - best).abs().max() + few
    assert torch.equal(ops.attention(tensors[0]), out[0])  # without a gradient


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"], indirect=True)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_is_float32_rounded_once(isa, shape, poisoned):
    """Results and gradients, given the same statistics and the same result."""
    qkv, grad = problem(shape, torch.bfloat16)
    out, slopes = run(ops.attention, qkv, grad)
    assert out.dtype == slopes.dtype == torch.bfloat16
    wide, stats = torch.ops.matpac_fast.attention(qkv.float(), True)
    assert torch.equal(out, wide.bfloat16())
    wide = torch.ops.matpac_fast.attention_backward(grad.float(), qkv.float(), out.float(), stats)
    assert torch.equal(slopes, wide.bfloat16())
    assert torch.equal(ops.attention(qkv), out)  # without a gradient


@pytest.mark.parametrize("isa", ["avx512_bf16"], indirect=True)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 33, 2, 5), (2, 49, 2, 17), (1, 47, 1, 40)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_bfloat16_products_are_as_near_to_float64_as_torch_s(isa, scale, shape, poisoned):
    """Odd tokens and widths leave half a pair; of 47 queries the last has no other beside it."""
    tensors = problem(shape, torch.bfloat16, scale)
    exact = run(written_out, *(t.double() for t in tensors))
    plain, out, again = (run(f, *tensors) for f in (reference.attention, ops.attention, ops.attention))
    for value, own, best, same in zip(out, plain, exact, again, strict=True):
        assert torch.equal(value, same)
        few = torch.finfo(torch.bfloat16).eps / 8 * best.square().mean().sqrt()
        assert (value - best).square().mean().sqrt() <= 1.5 * (own - best).square().mean().sqrt() + few
    assert torch.equal(ops.attention(tensors[0]), out[0])  # without a gradient


@pytest.mark.parametrize("isa", ["avx512_bf16"], indirect=True)
def test_bfloat16_is_what_is_multiplied(isa):
    tensors = problem((1, 70, 2, 32), torch.bfloat16)
    products = run(ops.attention, *tensors)
    wide = torch.ops.matpac_fast.attention(tensors[0].float(), False)[0]
    assert not torch.equal(products[0], wide.bfloat16())


def test_bfloat16_keeps_infinity_and_nan():
    qkv = torch.zeros(1, 2, 3, 1, 4, dtype=torch.bfloat16)
    qkv[0, :, 2, 0] = torch.tensor([torch.inf, torch.finfo(torch.bfloat16).max, torch.nan, -0.0]).bfloat16()
    want = torch.tensor([torch.inf, torch.finfo(torch.bfloat16).max, torch.nan, -0.0]).bfloat16().expand(1, 2, 1, 4)
    assert torch.equal(ops.attention(qkv).nan_to_num(7.0), want.nan_to_num(7.0))


def test_gradcheck():
    qkv, _ = problem((2, 5, 2, 3))
    assert torch.autograd.gradcheck(ops.attention, qkv.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_beyond_what_an_exponential_takes(dtype):
    qkv, grad = problem((1, 71, 2, 32), dtype, 100.0)  # logits of 1e4
    for value in run(ops.attention, qkv, grad):
        assert value.isfinite().all()
    one = torch.zeros(1, 3, 3, 1, 4)
    one[0, 1, :2] = 1e4
    assert torch.equal(ops.attention(one), written_out(one))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_head_and_its_sample(dtype):
    qkv, grad = problem((2, 60, 3, 16), dtype)
    qkv[1, 7, 0, 2, 3] = torch.nan  # a query: its row alone
    qkv[0, 9, 1, 0, 1] = torch.nan  # a key: all rows of the head
    out, slopes = run(ops.attention, qkv, grad)
    bad = out.isnan().any(-1)
    assert bad[1].nonzero().tolist() == [[7, 2]]
    assert bad[0, :, 0].all()
    assert not bad[0, :, 1:].any()
    assert not slopes[1, :, :, :2].isnan().any()
    assert slopes[1, 7, 0, 2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(dtype, monkeypatch):
    tensors, found = problem((1, 161, 3, 32), dtype), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(run(ops.attention, *tensors))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ["avx512"], indirect=True)
def test_avx512_has_the_bits_of_avx2(isa, dtype, instruction_set):
    tensors = problem((2, 101, 2, 32), dtype)
    wide = run(ops.attention, *tensors)
    with instruction_set("avx2"):
        assert all(torch.equal(a, b) for a, b in zip(run(ops.attention, *tensors), wide, strict=True))


def test_another_layout_gives_the_same():
    qkv, grad = problem((2, 37, 3, 16), torch.float32)
    want = run(ops.attention, qkv, grad)
    apart = qkv.permute(4, 1, 3, 0, 2).contiguous().permute(3, 1, 4, 2, 0), grad.mT.contiguous().mT
    assert all(torch.equal(a, b) for a, b in zip(run(ops.attention, *apart), want, strict=True))


def test_c_plus_plus_is_what_computes(monkeypatch):
    native, called = pytest.importorskip("matpac_fast._C", reason="needs the native extension"), []
    monkeypatch.setattr(native, "attention_cpu", lambda args, backward, threads: called.append(backward))
    qkv, grad = problem((1, 4, 1, 2), torch.float32)
    run(ops.attention, qkv, grad)
    with use_backend("cpp"):
        ops.attention(qkv)
    assert called == [False, True, False]
    monkeypatch.setattr(op_module, "_LEAST", 1 + 4 * 4 * 2)
    ops.attention(qkv)  # too little to gain anything
    assert len(called) == 3
    with use_backend("cpp"):
        ops.attention(qkv)
    assert called.pop() is False
    monkeypatch.setattr(op_module, "_LEAST", 4 * 4 * 2)
    ops.attention(qkv)
    assert called.pop() is False
    monkeypatch.setattr(op_module, "_LEAST", 4 * 4 * 4 * 2)
    ops.attention(qkv)
    assert len(called) == 3
    ops.attention(qkv.bfloat16())  # where torch's own takes twice as long, a quarter is enough
    assert called.pop() is False
    with use_backend("reference"):
        ops.attention(qkv)
    with torch.autocast("cpu", torch.bfloat16):  # which casts
        assert ops.attention(qkv).dtype == torch.bfloat16
        assert len(called) == 3
        ops.attention(qkv.bfloat16())  # as the qkv layer leaves it
    assert called.pop() is False
    ops.attention(qkv.half())
    monkeypatch.setitem(backend._reasons, "cpp", "not built")
    ops.attention(qkv)
    assert len(called) == 3


@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (2, 0, 2, 3), (2, 5, 0, 3)])
def test_nothing_to_attend_to(shape):
    qkv, grad = problem(shape, torch.float32)
    out, slopes = run(ops.attention, qkv, grad)
    assert (out.shape, slopes.shape) == (grad.shape, qkv.shape)


@pytest.mark.parametrize("isa", ["portable"], indirect=True)
def test_opcheck(isa):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        qkv, grad = problem((2, 5, 2, 3), dtype)
        torch.library.opcheck(torch.ops.matpac_fast.attention.default, (qkv.requires_grad_(), True))
        torch.library.opcheck(torch.ops.matpac_fast.attention.default, (qkv.detach().mT.contiguous().mT, False))
        out, stats = torch.ops.matpac_fast.attention(qkv.detach(), True)
        arguments = grad.transpose(1, 2).contiguous().transpose(1, 2), qkv.detach(), out, stats
        torch.library.opcheck(torch.ops.matpac_fast.attention_backward.default, arguments)


def test_compiles_whole_with_a_dynamic_batch():
    torch._dynamo.reset()
    compiled = torch.compile(ops.attention, fullgraph=True, dynamic=True, backend=aot_eager)
    for n in (5, 8):
        tensors = problem((2, n, 3, 4), torch.float32)
        for value, want in zip(run(compiled, *tensors), run(ops.attention, *tensors), strict=True):
            assert torch.equal(value, want)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="qkv is a list"):
        ops.attention([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"qkv is \(2, 3, 2, 4, 5\) float32 on cpu; expected \(B, N, 3, H, d\)"):
        ops.attention(torch.zeros(2, 3, 2, 4, 5))
    with pytest.raises(TypeError, match="expected one of float32, float64"):
        ops.attention(torch.zeros(2, 3, 3, 4, 5, dtype=torch.int64))
