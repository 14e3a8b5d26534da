"""ops.prototype_loss on the CPU and, emulated block by block, on CUDA; the oracle is the reference in float64."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from prototype_problem import SHAPES, TEMPS, Problem, assert_close
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from matpac_fast import ops, reference, use_backend
from matpac_fast.ops import _prototype_launchers

_C = pytest.importorskip("matpac_fast._C", reason="needs the native extension: pip install . with a C++17 compiler")
# ops.prototype_loss is the function; this is the module it lives in.
op_module = importlib.import_module("matpac_fast.ops.prototype_loss")
opcheck = torch.library.opcheck

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ISAS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, instruction_set) -> Iterator[str]:
    with instruction_set(request.param):
        yield request.param


@pytest.fixture
def recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a large N x K: nothing kept for the backward pass, and several chunks of rows."""
    monkeypatch.setattr(op_module, "_KEEP_BYTES", 0)
    monkeypatch.setattr(_prototype_launchers, "_CHUNK_BYTES", {"cpu": 1})


@pytest.mark.parametrize("mean_of", ["probabilities", "logits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_near_to_float64_as_the_reference(shape, dtype, mean_of, poisoned):
    problem = Problem(*shape, dtype)
    exact = problem.run(reference.prototype_loss, mean_of, torch.float64)
    plain = problem.run(reference.prototype_loss, mean_of)
    with use_backend("cpp"):
        assert_close(problem.run(ops.prototype_loss, mean_of), exact, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(isa, shape, dtype, poisoned, recompute):
    problem = Problem(*shape, dtype)
    exact = problem.run(reference.prototype_loss, dtype=torch.float64)
    assert_close(problem.run(ops.prototype_loss), exact, problem.run(reference.prototype_loss))


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_huge_and_tiny_logits(isa, scale):
    problem = Problem(40, 333, 8, scale=scale)
    exact = problem.run(reference.prototype_loss, dtype=torch.float64)
    out = problem.run(ops.prototype_loss)
    assert_close(out, exact, problem.run(reference.prototype_loss))
    assert out["loss"].isfinite().all()


def test_exp_is_good_to_the_rounding_of_its_argument(isa):
    """Two prototypes: the teacher's probabilities are (e^-x, 1) / (1 + e^-x), the student's (0, 1)."""
    x = torch.linspace(0, 86, 20_001)
    zero = torch.zeros_like(x)
    teacher, student = torch.stack([-x, zero], 1), torch.stack([zero - 1e4, zero], 1)
    p = -rows(student, teacher, torch.zeros(2), (1.0, 1.0))["delta"][:, 0].double()
    exact = torch.exp(-x.double()) / (1 + torch.exp(-x.double()))
    assert ((p / exact - 1).abs() <= (3 + 2 * x) * 2**-24).all()  # log2(e) and its product with x are rounded


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
def test_gradcheck(backend, keep, monkeypatch):
    if not keep:
        monkeypatch.setattr(op_module, "_KEEP_BYTES", 0)
    problem = Problem(4, 6, 3, torch.float64)
    student, weight = problem.student.requires_grad_(), problem.student_weight.requires_grad_()

    def loss(student: Tensor, weight: Tensor) -> Tensor:
        return ops.prototype_loss(student, weight, problem.teacher, problem.teacher_weight, problem.center, 0.5, 0.3)[0]

    with use_backend(backend):
        assert torch.autograd.gradcheck(loss, (student, weight))


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
def test_opcheck(keep):
    problem = Problem(5, 11, 4)
    plain = [t.clone() for t in problem.sides]
    permuted = [t.T.contiguous().T.requires_grad_(i < 2) if t.ndim == 2 else t for i, t in enumerate(plain)]
    op = torch.ops.matpac_fast.prototype_loss.default
    temps = torch.tensor(TEMPS, dtype=torch.float64)
    opcheck(op, (*plain, temps, "probabilities", keep, "cpp"))
    opcheck(op, (*permuted, temps, "logits", keep, "cpp"))
    _, _, stats, delta = op(*(t.detach() for t in permuted), temps, "logits", keep, "cpp")
    backward = torch.ops.matpac_fast.prototype_loss_backward.default
    student, weight, *rest = (t.detach() for t in permuted)
    for wanted in ((True, True), (True, False), (False, True)):
        teacher = (None, None, None) if keep else rest
        opcheck(backward, (problem.upstream.float(), student, weight, *teacher, stats, delta, temps, *wanted, "cpp"))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_compiles_into_one_graph_for_any_rows_and_temperature(backend):
    torch._dynamo.reset()  # it remembers what varied before
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    with use_backend(backend):
        compiled = torch.compile(ops.prototype_loss, fullgraph=True, dynamic=True, backend=count)
        for n, temp in ((9, 0.04), (14, 0.0401), (13, 0.05), (8, 0.07)):
            problem = Problem(n, 12, 4)
            expected, out = problem.run(ops.prototype_loss, temps=(0.1, temp)), problem.run(compiled, temps=(0.1, temp))
            assert_close(out, {name: value.double() for name, value in expected.items()}, expected)
    assert len(graphs) <= 2  # torch 2.6 makes one for the first temperature alone


def test_temperatures_may_be_tensors():
    problem = Problem(6, 9, 4)
    expected = problem.run(ops.prototype_loss)
    out = problem.run(ops.prototype_loss, temps=tuple(torch.tensor(temp, dtype=torch.float64) for temp in TEMPS))
    assert all(torch.equal(out[name], expected[name]) for name in out)


def test_inputs_stay_and_bits_repeat(recompute):
    problem = Problem(150, 77, 9)
    before = [t.clone() for t in problem.sides]
    first, second = problem.run(ops.prototype_loss), problem.run(ops.prototype_loss)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.sides, strict=True))
    assert all(torch.equal(first[name], second[name]) for name in first)


def rows(student: Tensor, teacher: Tensor, center: Tensor, temps: tuple[float, float], **how: Any) -> dict[str, Tensor]:
    """The native kernels on given logits: loss, column_sum, delta of the forward and delta of the statistics.

    how: threads=n on the CPU, or blocks=n for the emulated CUDA kernels. All memory is poisoned first.
    """
    n, k = student.shape
    nan = float("nan")
    loss, stats = student.new_full((n,), nan), student.new_full((n, 4), nan)
    delta, again = student.new_full((n, k), nan), student.new_full((n, k), nan)
    column_sum = torch.zeros(k, dtype=torch.float64)
    scales = math.log2(math.e) / torch.tensor(temps, dtype=torch.float64)
    code = 1 if student.dtype == torch.float64 else 0

    def args(loss: int, delta: Tensor, column_sum: int) -> Any:
        pointers = (student.data_ptr(), teacher.data_ptr(), center.data_ptr())
        return _C.PrototypeLossArgs(
            *pointers, code, n, k, scales.data_ptr(), loss, stats.data_ptr(), delta.data_ptr(), code, column_sum
        )

    forward, backward = args(loss.data_ptr(), delta, column_sum.data_ptr()), args(0, again, 0)
    if "blocks" in how:
        columns = student.new_full((how["blocks"], k), nan)
        _C.prototype_loss_forward_emulated(forward, columns.data_ptr(), how["blocks"])
        _C.prototype_loss_delta_emulated(backward)
    else:
        _C.prototype_loss_forward_cpu(forward, how.get("threads", 1))
        _C.prototype_loss_delta_cpu(backward, how.get("threads", 1))
    return {"loss": loss, "column_sum": column_sum, "delta": delta, "again": again}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_for_any_number_of_threads(isa, dtype):
    logits = torch.randn(2, 1030, 515, dtype=dtype, generator=torch.Generator().manual_seed(0))
    outs = [rows(*logits, torch.zeros(515, dtype=dtype), TEMPS, threads=threads) for threads in (1, 2, 3, 64)]
    for out in outs[1:]:
        assert all(torch.equal(out[name], outs[0][name]) for name in out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 6, 1024, 1027, 2048, 4100, 8192, 8195, 9000])
def test_cuda_kernels_emulated(k, dtype):
    """Every launch configuration, in and past registers, aligned rows and others, more rows than blocks."""
    logits = torch.randn(2, 7, k, dtype=dtype, generator=torch.Generator().manual_seed(k))
    center = torch.randn(k, dtype=dtype, generator=torch.Generator().manual_seed(1))
    out = rows(*logits, center, TEMPS, blocks=3)
    student, teacher = (logits.double() - torch.stack([torch.zeros(k), center.double()])[:, None]).unbind()
    p = torch.softmax(teacher / TEMPS[1], 1)
    log_q = torch.log_softmax(student / TEMPS[0], 1)
    exact = {"loss": -(p * log_q).sum(1), "column_sum": p.sum(0), "delta": log_q.exp() - p}
    exact["again"] = exact["delta"]
    eps = torch.finfo(dtype).eps
    for name, value in out.items():
        # An exponent of up to 200 makes 100 roundings of a probability.
        torch.testing.assert_close(value.double(), exact[name], rtol=200 * eps, atol=100 * eps)
    assert all(torch.equal(value, rows(*logits, center, TEMPS, blocks=3)[name]) for name, value in out.items())


def test_no_rows():
    problem = Problem(0, 5, 3)
    for backend in ("reference", "cpp"):
        with use_backend(backend):
            out = problem.run(ops.prototype_loss)
        assert out["loss"].shape == (0,)
        assert out["mean"].isnan().all()
        assert out["student"].shape == (0, 3)
        assert torch.equal(out["student_weight"], torch.zeros(5, 3))


def test_one_prototype_is_certain():
    out = Problem(9, 1, 3).run(ops.prototype_loss)
    assert torch.equal(out["loss"], torch.zeros(9))
    assert torch.equal(out["mean"], torch.ones(1))
    assert torch.equal(out["student_weight"], torch.zeros(1, 3))


def test_nan_stays_in_its_row(isa):
    problem = Problem(40, 50, 6)
    problem.student[3, 0] = float("nan")
    problem.teacher[7, 5] = float("nan")
    out = problem.run(ops.prototype_loss)
    assert out["loss"].isnan().nonzero().flatten().tolist() == [3, 7]
    assert out["student"].isnan().any(1).nonzero().flatten().tolist() == [3, 7]
    assert out["mean"].isnan().all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_autocast_does_not_reach_inside(backend, recompute):
    problem = Problem(30, 40, 8)
    with use_backend(backend):
        expected = problem.run(ops.prototype_loss)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = problem.run(ops.prototype_loss)
    for name in ("loss", "mean", "student", "student_weight") if backend == "cpp" else ("loss", "mean"):
        assert torch.equal(out[name], expected[name]), name


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64], ids=str)
def test_mixed_dtypes_compute_in_the_widest(other, recompute):
    problem = Problem(30, 40, 8)
    problem.student, problem.teacher = problem.student.bfloat16(), problem.teacher.to(other)
    exact = problem.run(reference.prototype_loss, dtype=torch.float64)
    out, plain = problem.run(ops.prototype_loss), problem.run(reference.prototype_loss)
    assert (out["student"].dtype, out["student_weight"].dtype) == (torch.bfloat16, torch.float32)
    assert out["loss"].dtype == torch.promote_types(other, torch.float32)
    assert_close(out, exact, plain)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_only_the_student_learns(backend):
    problem = Problem(6, 9, 4)
    sides = [t.clone().requires_grad_() for t in problem.sides]
    with use_backend(backend):
        loss, mean = ops.prototype_loss(*sides, *TEMPS)
    assert not mean.requires_grad
    loss.sum().backward()
    assert [t.grad is not None for t in sides] == [True, True, False, False, False]


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
def test_teacher_and_centre_may_move_before_backward(backend, keep, monkeypatch):
    """As in the official step, where the forward pass updates them."""
    if not keep:
        monkeypatch.setattr(op_module, "_KEEP_BYTES", 0)
    problem = Problem(6, 9, 4)
    with use_backend(backend):
        expected = problem.run(ops.prototype_loss)
        student = problem.student.clone().requires_grad_()
        rest = [t.clone() for t in problem.sides[1:]]
        loss, _ = ops.prototype_loss(student, *rest, *TEMPS)
        for teacher_side in rest[1:]:
            teacher_side.zero_()
        (grad,) = torch.autograd.grad(loss, student, problem.upstream.float())
    assert torch.equal(grad, expected["student"])


@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_without_the_other(which):
    problem = Problem(6, 9, 4)
    both = problem.run(ops.prototype_loss)
    sides = [t.clone().requires_grad_(i == which) for i, t in enumerate(problem.sides)]
    loss, _ = ops.prototype_loss(*sides, *TEMPS)
    (grad,) = torch.autograd.grad(loss, sides[which], problem.upstream.float())
    assert torch.equal(grad, both[("student", "student_weight")[which]])


@pytest.mark.parametrize(("n", "k"), [(768, 65_536), (384, 131_072)])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
def test_so_many_prototypes_in_bounded_memory(grad, n, k, monkeypatch, peak_growth):
    """A stored N x K matrix would take 192 MiB; half of it is more than anything here may need."""
    monkeypatch.setattr(op_module, "_KEEP_BYTES", 0)
    problem, found = Problem(n, k, 4), []
    student = problem.student.requires_grad_(grad)

    def call() -> None:
        loss, _ = ops.prototype_loss(student, *problem.sides[1:], *TEMPS)
        if grad:
            loss.sum().backward()
        found.append(loss)

    assert peak_growth(call) < 96
    assert found[0].isfinite().all()


def bad(**changes: Any) -> dict[str, Any]:
    names = ("student", "student_weight", "teacher", "teacher_weight", "center")
    return dict(zip(names, Problem(4, 6, 3).sides, strict=True)) | {"student_temp": 0.1, "teacher_temp": 0.04} | changes


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(student=[1.0]), TypeError, "student is a list; expected a torch.Tensor"),
        (bad(student=torch.zeros(4, 3, dtype=torch.int64)), TypeError, r"student is \(4, 3\) int64.*float32"),
        (bad(student=torch.zeros(4)), ValueError, r"student is \(4,\) float32 on cpu; expected 2 dimensions"),
        (bad(student_weight=torch.zeros(6, 5)), ValueError, r"student_weight is \(6, 5\).*expected \(6, 3\)"),
        (bad(student_weight=torch.zeros(0, 3)), ValueError, "0 prototypes for 3 features"),
        (bad(teacher=torch.zeros(5, 3)), ValueError, r"teacher is \(5, 3\).*expected \(4, 3\)"),
        (bad(teacher=torch.zeros(4, 3, dtype=torch.complex64)), TypeError, "teacher is .* complex64"),
        (bad(teacher_weight=torch.zeros(7, 3)), ValueError, r"teacher_weight is \(7, 3\).*expected \(6, 3\)"),
        (bad(teacher_weight=torch.zeros(6, 3, device="meta")), ValueError, "teacher_weight is on meta"),
        (bad(center=torch.zeros(5)), ValueError, r"center is \(5,\).*expected \(6,\)"),
        (bad(center=torch.zeros(1, 6)), ValueError, r"center is \(1, 6\).*expected 1 dim"),
        (bad(student_temp=0.0), ValueError, "student_temp is 0.0; expected a positive number"),
        (bad(teacher_temp=float("nan")), ValueError, "teacher_temp is nan; expected a positive number"),
        (bad(teacher_temp=float("inf")), ValueError, "teacher_temp is inf"),
        (bad(teacher_temp=torch.ones(1)), ValueError, r"teacher_temp is \(1,\) float32.*expected 0 dimensions"),
        (bad(mean_of="centre"), ValueError, "mean_of is 'centre'; expected one of probabilities, logits"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.prototype_loss(**arguments)


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7F800001, 0x7FC000FF, -0x3FFFFF])
def test_any_nan_is_a_nan(bits):
    """Not only the one that arithmetic makes, which has no payload."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert nan.isnan()
    sides = [torch.randn(shape) for shape in ((4, 8), (37, 8), (4, 8), (37, 8))]
    center = torch.zeros(37)
    center[3] = nan[0]
    loss, mean = ops.prototype_loss(*sides, center, 0.1, 0.04)
    assert loss.isnan().all()
    assert mean.isnan().any()
