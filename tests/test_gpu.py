"""Every op on a GPU: right, on the caller's stream and device, in a CUDA graph, and without waiting for the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from patch_problem import PatchProblem, official
from torch import Tensor

from matpac_fast import backend, ops, reference, use_backend

pytestmark = pytest.mark.gpu

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """An op with its inputs in float64 (integers as they are) and, where it has them, its gradients."""

    name: str
    inputs: Callable[[torch.Generator], Tensors]
    run: Callable[[object, Tensors], Tensors]  # (ops or reference, inputs) -> outputs and gradients
    slack: float | None = None  # beyond twice the reference's own error; by default some roundings of the largest value


def log_mel_inputs(generator: torch.Generator) -> Tensors:
    return (0.1 * torch.randn(5, 12_345, generator=generator, dtype=torch.float64),)


def run_log_mel(source, inputs: Tensors) -> Tensors:
    return (source.log_mel(*inputs),)


def mask_shuffle_inputs(generator: torch.Generator) -> Tensors:
    return (torch.randint(-(2**40), 2**40, (33,), generator=generator),)


def run_mask_shuffle(source, inputs: Tensors) -> Tensors:
    return (source.mask_shuffle(7, 123_456, inputs[0], 190),)


def masked_patch_embed_inputs(generator: torch.Generator) -> Tensors:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.rand(3, 190, generator=generator).argsort(1)
    return (
        randn(3, 80, 608),
        randn(96, 1, 16, 16) / 16,
        randn(96),
        randn(1, 191, 96),
        randn(1, 1, 96),
        ids,
        randn(58, 96),
    )


def run_masked_patch_embed(source, inputs: Tensors) -> Tensors:
    spec, weight, bias, pos, cls, ids, upstream = inputs
    leaves = tuple(t.detach().requires_grad_() for t in (weight, bias, cls))
    visible, masked = source.masked_patch_embed(spec, leaves[0], leaves[1], pos, leaves[2], ids, 57)
    return visible.detach(), masked, *torch.autograd.grad(visible, leaves, upstream.expand_as(visible))


def prototype_loss_inputs(generator: torch.Generator) -> Tensors:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sides = [F.normalize(randn(rows, 64), dim=1) for rows in (300, 521, 300, 521)]
    return *sides, 0.1 * randn(521), randn(300)


def run_prototype_loss(source, inputs: Tensors) -> Tensors:
    student, student_weight, teacher, teacher_weight, center, upstream = inputs
    leaves = (student.detach().requires_grad_(), student_weight.detach().requires_grad_())
    loss, mean = source.prototype_loss(*leaves, teacher, teacher_weight, center, 0.1, 0.05)
    return loss.detach(), mean, *torch.autograd.grad(loss, leaves, upstream)


def attention_inputs(generator: torch.Generator) -> Tensors:
    shapes = ((3, 58, 3, 4, 64), (2, 134, 3, 2, 64), (2, 191, 3, 4, 32))
    qkvs = [torch.randn(*shape, generator=generator) for shape in shapes]
    grads = [torch.randn(*shape[:2], *shape[3:], generator=generator) for shape in shapes]
    return tuple(t.bfloat16().double() for t in (*qkvs, *grads))


def narrow(tensor: Tensor) -> Tensor:
    """In the 16 bits that some kernels are for, which lose nothing of what was drawn for them; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.bfloat16()


def run_attention(source, inputs: Tensors) -> Tensors:
    outputs: list[Tensor] = []
    for qkv, grad in zip(inputs[:3], inputs[3:], strict=True):
        leaf = narrow(qkv).detach().requires_grad_()
        out = source.attention(leaf)
        outputs += [out.detach(), *torch.autograd.grad(out, leaf, narrow(grad))]
    return tuple(outputs)


def rows_inputs(generator: torch.Generator) -> Tensors:
    """Two matrices and two rows, the first of each as 16 bits hold them."""
    matrices = [torch.randn(515, 768, generator=generator).bfloat16().double() for _ in range(2)]
    return (*matrices, *(torch.randn(768, generator=generator).double() for _ in range(3)))


def run_bias_gelu(source, inputs: Tensors) -> Tensors:
    leaves = (narrow(inputs[0]).detach().requires_grad_(), inputs[2].detach().requires_grad_())
    out = source.bias_gelu(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, narrow(inputs[1]))


def run_add_layer_norm(source, inputs: Tensors) -> Tensors:
    x, delta, bias, gamma, beta = inputs
    norm = torch.nn.LayerNorm(x.shape[1], 1e-6, device=x.device, dtype=x.dtype)
    norm.weight, norm.bias = torch.nn.Parameter(gamma.clone()), torch.nn.Parameter(beta.clone())
    leaves = (x.detach().requires_grad_(), narrow(delta).detach().requires_grad_(), bias.detach().requires_grad_())
    total, normed = source.add_layer_norm(*leaves, norm, narrow(x).dtype)
    again = source.add_layer_norm(total, None, None, norm, x.dtype)[1]
    out = (normed * narrow(delta)).sum(dtype=x.dtype) + (again * x).sum()
    return total.detach(), normed.detach(), *torch.autograd.grad(out, (*leaves, norm.weight, norm.bias))


def prediction_loss_inputs(generator: torch.Generator) -> Tensors:
    return tuple(torch.randn(*shape, generator=generator).double() for shape in ((515, 3, 96), (515, 96), (515,)))


def run_prediction_loss(source, inputs: Tensors) -> Tensors:
    prediction, target, upstream = inputs
    leaf = prediction.detach().requires_grad_()
    loss, best = source.prediction_loss(leaf, target, 0.3)
    return loss.detach(), best, *torch.autograd.grad(loss, leaf, upstream)


CASES = [
    Case("log_mel", log_mel_inputs, run_log_mel),
    Case("mask_shuffle", mask_shuffle_inputs, run_mask_shuffle),
    Case("masked_patch_embed", masked_patch_embed_inputs, run_masked_patch_embed),
    Case("prototype_loss", prototype_loss_inputs, run_prototype_loss),
    Case("prediction_loss", prediction_loss_inputs, run_prediction_loss),
    Case("attention", attention_inputs, run_attention),
    Case("bias_gelu", rows_inputs, run_bias_gelu),
    Case("add_layer_norm", rows_inputs, run_add_layer_norm),
]
# It multiplies sums of two float16 terms and leaves out the smallest product; the interpreted tests allow as much.
SLACK = {("log_mel", "triton"): 5e-6}
LAUNCHED = [(case, launcher) for case in CASES for launcher in backend.LAUNCHERS[case.name]["cuda"]]


@pytest.fixture(params=LAUNCHED, ids=lambda pair: f"{pair[0].name}-{pair[1]}")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    """Every op on every launcher that it has on a GPU; one that cannot run here is skipped with its reason."""
    found, launcher = request.param
    reason = backend.unavailable(launcher)
    if reason is not None:
        pytest.skip(f"{launcher}: {reason}")
    with use_backend(launcher):
        yield replace(found, slack=SLACK.get((found.name, launcher)))


def inputs_of(case: Case, seed: int = 0, device: str = "cuda") -> Tensors:
    drawn = case.inputs(torch.Generator().manual_seed(seed))
    return tuple((t.float() if t.is_floating_point() else t).to(device) for t in drawn)


def same(first: Tensors, second: Tensors) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


def test_every_op_is_here():
    assert {case.name for case in CASES} == set(backend.LAUNCHERS)


def test_as_exact_as_the_reference(case):
    inputs = inputs_of(case)
    before = [t.clone() for t in inputs]
    exact = case.run(reference, tuple(t.double() if t.is_floating_point() else t for t in inputs))
    own, got = case.run(reference, inputs), case.run(ops, inputs)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
    for i, (value, plain, best) in enumerate(zip(got, own, exact, strict=True)):
        assert (value.dtype, value.shape, value.device) == (plain.dtype, plain.shape, plain.device)
        if not value.is_floating_point():
            assert torch.equal(value, best)
            continue
        error, allowed = ((t.double() - best).abs().max() for t in (value, plain))
        rounding = 4 * torch.finfo(value.dtype).eps * best.abs().max() if case.slack is None else case.slack
        assert error <= 2 * allowed + rounding, f"output {i}: error {error:.3g}, the reference {allowed:.3g}"


def test_same_bits_twice(case):
    inputs = inputs_of(case)
    assert same(case.run(ops, inputs), case.run(ops, inputs))


def test_side_stream(case):
    """The kernels must run after what the caller's stream still has to do, which the default stream does not know."""
    want = case.run(ops, inputs_of(case))
    late = inputs_of(case, seed=1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    fresh = inputs_of(case)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some ten milliseconds
        for old, new in zip(late, fresh, strict=True):
            old.copy_(new)
        got = case.run(ops, late)
    stream.synchronize()
    assert same(got, want)


def test_cuda_graph(case):
    static = inputs_of(case)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and fills what is cached by configuration
            case.run(ops, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = case.run(ops, static)
    for seed in (1, 2):
        fresh = inputs_of(case, seed)
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert same(outputs, case.run(ops, fresh))


def test_never_waits_for_the_device(case):
    inputs = inputs_of(case)
    case.run(ops, inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(ops, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_second_device(case):
    want = case.run(ops, inputs_of(case))
    got = case.run(ops, inputs_of(case, device="cuda:1"))
    assert torch.cuda.current_device() == 0
    assert {t.device for t in got} == {torch.device("cuda:1")}
    for a, b in zip(got, want, strict=True):  # another model of GPU may round otherwise
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-4)


def test_compiles_whole(case):
    torch._dynamo.reset()
    inputs = inputs_of(case)
    norm = torch.nn.LayerNorm(768, 1e-6, device="cuda")
    forward = {
        "log_mel": lambda t: ops.log_mel(*t),
        "mask_shuffle": lambda t: ops.mask_shuffle(7, 123_456, t[0], 190),
        "masked_patch_embed": lambda t: ops.masked_patch_embed(*t[:6], 57),
        "prototype_loss": lambda t: ops.prototype_loss(*t[:5], 0.1, 0.05),
        # The least of the heads; their soft minimum is torch's to sum, in an order of its own.
        "prediction_loss": lambda t: ops.prediction_loss(t[0], t[1], 0.0),
        "attention": lambda t: ops.attention(t[0].bfloat16()),
        "bias_gelu": lambda t: ops.bias_gelu(t[0].bfloat16(), t[2]),
        "add_layer_norm": lambda t: ops.add_layer_norm(t[0], t[1].bfloat16(), t[2], norm, torch.bfloat16),
    }[case.name]
    want, got = forward(inputs), torch.compile(forward, fullgraph=True)(inputs)
    want, got = (result if isinstance(result, tuple) else (result,) for result in (want, got))
    assert same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 38, 16, 768, 57), (3, 3, 7, 5, 13, 6), (2, 2, 3, 4, 8, 0)], ids=str)
def test_masked_patch_embed_in_every_dtype(shape, dtype):
    PatchProblem(*shape, dtype=dtype, device="cuda").check(ops.masked_patch_embed)


def test_masked_patch_embed_under_autocast():
    def autocast(fn):
        def run(spec, *arguments):
            # The oracle runs in float64, which autocast leaves alone.
            with torch.autocast("cuda", torch.bfloat16, enabled=spec.dtype != torch.float64):
                return fn(spec, *arguments)

        return run

    problem = PatchProblem(2, 5, 38, 16, 96, 57, device="cuda")
    problem.check(autocast(ops.masked_patch_embed), plain=autocast(official))


@pytest.mark.parametrize("bad", [-1, 6, 2**31, -(2**40)])
def test_masked_patch_embed_marks_an_id_that_names_no_patch(bad):
    problem = PatchProblem(2, 2, 3, 4, 8, 2, device="cuda")
    problem.ids[1, 4] = bad
    visible, masked = ops.masked_patch_embed(*problem.arguments, 2)
    assert not visible.isnan().any()
    assert masked.isnan().any(dim=2).nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (-1, 2**63), (2**64 + 5, -(2**63))])
@pytest.mark.parametrize("n_tokens", [1, 2, 190, 1250])
def test_mask_shuffle_has_the_bits_of_the_cpu(seed, step, n_tokens):
    index = torch.tensor([0, 1, -1, 2**62, -(2**63)])
    want = reference.mask_shuffle(seed, step, index, n_tokens)
    assert torch.equal(ops.mask_shuffle(seed, step, index.cuda(), n_tokens).cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prediction_loss_of_a_vector_with_a_nan(dtype):
    """The whole of its gradient is NaN, and no other row's: a GPU's maximum of NaN and a number is the number."""
    prediction = torch.randn(4, 8, dtype=dtype, device="cuda", requires_grad=True)
    target = torch.randn(4, 8, dtype=dtype, device="cuda")
    with torch.no_grad():
        prediction[1, 3] = torch.nan
    loss = ops.prediction_loss(prediction, target)
    loss.sum().backward()
    assert loss.isnan().nonzero().tolist() == [[1]]
    assert prediction.grad.isnan().all(1).tolist() == [False, True, False, False]
    assert prediction.grad.isnan().any(1).tolist() == [False, True, False, False]
