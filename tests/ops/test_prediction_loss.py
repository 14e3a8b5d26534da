"""ops.prediction_loss and its C++ kernels, against the reference and autograd's gradient of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from matpac_fast import backend, ops, reference, use_backend

CASES = [((37, 19), None), ((1, 768), None), ((0, 5), None), ((23, 5, 17), 0.3), ((23, 5, 17), 0.0), ((4, 1, 3), 2.0)]


@pytest.fixture(params=["reference", "portable", "avx2", "avx512"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, instruction_set) -> Iterator[str]:
    """What computes: PyTorch, as where the extension was not built, or C++ for an instruction set."""
    if request.param == "reference":
        monkeypatch.setitem(backend._reasons, "cpp", "not built")
        yield request.param
    else:
        with instruction_set(request.param):
            yield request.param


def problem(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    prediction = torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randn(shape[0], shape[-1], generator=generator, dtype=torch.float64)
    upstream = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    return prediction.to(dtype), target.to(dtype), upstream


def run(function, prediction: Tensor, target: Tensor, upstream: Tensor, temperature: float | None):
    leaf = prediction.detach().requires_grad_()
    loss, best = function(leaf, target, temperature)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))[0], best


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "temperature"), CASES, ids=str)
def test_as_near_to_float64_as_the_reference(shape, temperature, dtype, poisoned):
    tensors = problem(shape, dtype)
    before = [t.clone() for t in tensors]
    exact = run(reference.prediction_loss, *(t.double() for t in tensors), temperature)
    plain, out, again = (run(f, *tensors, temperature) for f in (reference.prediction_loss, *[ops.prediction_loss] * 2))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert out[0].dtype == torch.promote_types(dtype, torch.float32)
    assert (out[1].dtype, out[1].shape) == (dtype, tensors[0].shape)
    for value, own, best, same in zip(out[:2], plain, exact, again, strict=False):
        assert torch.equal(value, same)
        if value.numel():
            few = 8 * torch.finfo(value.dtype).eps * best.abs().max()
            assert (value.double() - best).abs().max() <= 2 * (own.double() - best).abs().max() + few
    if temperature is None:
        assert out[2] is None
    else:
        assert torch.equal(out[2], ops.prediction_loss(*(t.float() for t in tensors[:2]), temperature)[1])


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_gradcheck(temperature):
    prediction, target, _ = problem((3, 4) if temperature is None else (3, 2, 4))
    weights = torch.softmax(-reference.prediction_loss(prediction, target)[0], 0) if temperature is None else None
    prediction.requires_grad_()
    if weights is not None:
        assert torch.autograd.gradcheck(lambda x: ops.prediction_loss(x, target)[0] * weights, prediction)
    # The weights of the heads carry no gradient, so that the numerical one is another: the minimum has none.
    else:
        assert torch.autograd.gradcheck(lambda x: ops.prediction_loss(x, target, 0.0)[0], prediction)


@pytest.mark.parametrize("temperature", [None, 0.3])
def test_a_zero_and_a_tiny_prediction(temperature):
    prediction, target, upstream = problem((6, 5) if temperature is None else (6, 2, 5), torch.float32)
    prediction[1], prediction[2] = 0, 1e-14
    for value, want in zip(
        run(ops.prediction_loss, prediction, target, upstream, temperature)[:2],
        run(reference.prediction_loss, prediction, target, upstream, temperature)[:2],
        strict=True,
    ):
        torch.testing.assert_close(value, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [None, 0.3])
def test_16_bits_are_float32_inside_in_the_reference_too(dtype, temperature):
    prediction, target, upstream = problem((6, 5) if temperature is None else (6, 2, 5), dtype)
    prediction[1], target[2] = 0, 0
    want = run(ops.prediction_loss, prediction.float(), target.float(), upstream, temperature)
    loss, grad, best = run(ops.prediction_loss, prediction, target.requires_grad_(), upstream, temperature)
    torch.testing.assert_close(loss, want[0])
    torch.testing.assert_close(grad, want[1].to(dtype))
    assert best is want[2] or torch.equal(best, want[2])


def test_nan_stays_in_its_row():
    prediction, target, upstream = problem((6, 5))
    prediction[2, 1], target[4, 0] = torch.nan, torch.nan
    loss, grad, _ = run(ops.prediction_loss, prediction, target, upstream, None)
    assert loss.isnan().nonzero().flatten().tolist() == [2, 4]
    assert grad.isnan().any(1).nonzero().flatten().tolist() == [2, 4]


def test_the_way_that_is_meant(way, monkeypatch):
    native, called = pytest.importorskip("matpac_fast._C", reason="needs the native extension"), []
    monkeypatch.setattr(native, "prediction_loss_cpu", lambda *_: called.append(way))
    ops.prediction_loss(torch.ones(3, 5), torch.ones(3, 5))
    assert len(called) == (way != "reference")


def test_another_layout_gives_the_same():
    prediction, target, upstream = problem((14, 4, 33), torch.float32)
    apart = torch.stack([prediction, prediction], -1)[..., 0], torch.stack([target, target], -1)[..., 1]
    want, out = (run(ops.prediction_loss, *pair, upstream, 0.3) for pair in ((prediction, target), apart))
    for value, same in zip(out, want, strict=True):
        torch.testing.assert_close(value, same)


def test_same_bits_for_any_number_of_threads(monkeypatch):
    tensors, found = problem((700, 3, 401), torch.float32), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(run(ops.prediction_loss, *tensors, 0.3))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("way", ["portable"], indirect=True)
def test_opcheck(way):
    for shape, dtype in (((5, 3, 7), torch.float32), ((5, 7), torch.float64), ((5, 7), torch.bfloat16)):
        prediction, target, _ = problem(shape, dtype)
        arguments = prediction.requires_grad_(), target.float().repeat(1, 2)[:, ::2][:, : shape[-1]]
        torch.library.opcheck(torch.ops.matpac_fast.prediction_distance.default, arguments)
        made = torch.ops.matpac_fast.prediction_distance(*arguments)
        torch.library.opcheck(
            torch.ops.matpac_fast.prediction_distance_backward.default,
            (torch.ones_like(made[0]), *(t.detach() for t in (*arguments, made[1]))),
        )


def test_autocast_does_not_reach_inside():
    tensors = problem((9, 3, 8), torch.float32)
    want = run(ops.prediction_loss, *tensors, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(run(ops.prediction_loss, *tensors, 0.2), want, strict=True))


def test_the_reference_where_it_is_forced_or_the_target_learns(way, monkeypatch):
    prediction, target, _ = problem((4, 3))
    monkeypatch.setattr(reference, "prediction_loss", lambda *_: ("reference", None))
    with use_backend("reference"):
        assert ops.prediction_loss(prediction, target)[0] == "reference"
    assert ops.prediction_loss(prediction, target.requires_grad_())[0] == "reference"
    with torch.no_grad():
        assert (ops.prediction_loss(prediction, target)[0] == "reference") == (way == "reference")


def test_compiles_whole_with_a_dynamic_batch():
    torch._dynamo.reset()
    compiled = torch.compile(ops.prediction_loss, fullgraph=True, dynamic=True, backend=aot_eager)
    for n, temperature in ((5, 0.3), (8, 0.25)):
        tensors = problem((n, 3, 7), torch.float32)
        for value, want in zip(
            run(compiled, *tensors, temperature), run(ops.prediction_loss, *tensors, temperature), strict=True
        ):
            torch.testing.assert_close(value, want)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.zeros(1, 1)), TypeError, "prediction is a list"),
        ((torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)), TypeError, r"prediction is \(2, 3\) int64"),
        ((torch.zeros(2, 4, 3), torch.zeros(2, 3)), ValueError, r"expected \(N, D\) without a temperature"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), 0.1), ValueError, r"expected \(N, H, D\) of H heads with a temp"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), ValueError, r"target is \(3, 3\).*expected \(2, 3\)"),
        ((torch.zeros(2, 0, 3), torch.zeros(2, 3), 0.1), ValueError, "no heads"),
        ((torch.zeros(2, 3), torch.zeros(2, 3, device="meta")), ValueError, "target is on meta"),
        ((torch.zeros(2, 1, 3), torch.zeros(2, 3), -1.0), ValueError, "temperature is -1.0"),
        ((torch.zeros(2, 1, 3), torch.zeros(2, 3), float("nan")), ValueError, "temperature is nan"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.prediction_loss(*arguments)
