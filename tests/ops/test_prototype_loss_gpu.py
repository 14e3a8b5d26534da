"""ops.prototype_loss on a GPU: every launcher, streams, a second device and CUDA graphs."""

from __future__ import annotations

import importlib

import pytest
import torch
from prototype_problem import SHAPES, TEMPS, Problem, assert_close
from torch import Tensor

from matpac_fast import backend, ops, reference, use_backend

op_module = importlib.import_module("matpac_fast.ops.prototype_loss")
pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def launcher(request: pytest.FixtureRequest) -> str:
    reason = backend.unavailable(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


def on_gpu(problem: Problem, device: str = "cuda") -> Problem:
    for name in ("student", "student_weight", "teacher", "teacher_weight", "center", "upstream"):
        setattr(problem, name, getattr(problem, name).to(device))
    return problem


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (700, 9000, 64), (2100, 8192, 33)], ids=str)
def test_as_near_to_float64_as_the_reference(launcher, shape, dtype, keep, monkeypatch):
    if not keep:
        monkeypatch.setattr(op_module, "_KEEP_BYTES", 0)
    problem = on_gpu(Problem(*shape, dtype))
    exact = problem.run(reference.prototype_loss, dtype=torch.float64)
    plain = problem.run(reference.prototype_loss)
    with use_backend(launcher):
        out, again = problem.run(ops.prototype_loss), problem.run(ops.prototype_loss)
    for name, value in out.items():
        assert torch.equal(value, again[name]), name
    # Three products of TF32 for float32; for 16 bits, that the gradients' products round their factors to them.
    assert_close(out, exact, plain, roundings={torch.float32: 64})


def test_float64_natively():
    if backend.unavailable("cuda"):
        pytest.skip(str(backend.unavailable("cuda")))
    problem = on_gpu(Problem(50, 70, 9, torch.float64))
    with use_backend("cuda"):
        out = problem.run(ops.prototype_loss)
    for name, value in problem.run(reference.prototype_loss).items():
        torch.testing.assert_close(out[name], value, rtol=1e-12, atol=1e-13)


def test_65536_prototypes_under_a_gigabyte(launcher):
    n, k, d = 34_048, 65_536, 256
    student, teacher = (torch.randn(n, d, device="cuda", dtype=torch.bfloat16) / 16 for _ in range(2))
    weights = [torch.randn(k, d, device="cuda", dtype=torch.bfloat16) / 16 for _ in range(2)]
    student.requires_grad_(), weights[0].requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with use_backend(launcher):
        loss, _ = ops.prototype_loss(student, weights[0], teacher, weights[1], torch.zeros(k, device="cuda"), *TEMPS)
        loss.mean().backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30
    assert loss.isfinite().all()


def test_side_stream(launcher):
    problem = on_gpu(Problem(300, 500, 64))
    with use_backend(launcher):
        expected = problem.run(ops.prototype_loss)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # what runs on another stream would overtake this
            problem.student = problem.student * 1.0
            out = problem.run(ops.prototype_loss)
        torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(out[name], expected[name]) for name in out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_second_device(launcher):
    problem = Problem(30, 50, 16)
    with use_backend(launcher):
        first = on_gpu(problem, "cuda:0").run(ops.prototype_loss)
        second = on_gpu(problem, "cuda:1").run(ops.prototype_loss)
    assert all(torch.equal(first[name], second[name].to("cuda:0")) for name in first)


def test_captured_in_a_cuda_graph(launcher):
    """The graph reads features and temperature anew at every replay."""
    problem = on_gpu(Problem(130, 300, 32))
    student = problem.student.clone().requires_grad_()
    temp = torch.tensor(0.04, device="cuda", dtype=torch.float64)

    def step() -> tuple[Tensor, Tensor]:
        loss, mean = ops.prototype_loss(student, *problem.sides[1:], 0.1, temp)
        return torch.autograd.grad(loss.sum(), student)[0], mean

    with use_backend(launcher):
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            student.copy_(student.flip(0))
        temp.fill_(0.07)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
