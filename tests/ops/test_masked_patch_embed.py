"""ops.masked_patch_embed on the CPU: against the official formulation and the reference in float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from patch_problem import PatchProblem, official
from torch import Tensor

from matpac_fast import ops, reference, use_backend
from matpac_fast.model import Matpac

# ops.masked_patch_embed is the function; this is the module it lives in.
op_module = importlib.import_module("matpac_fast.ops.masked_patch_embed")

embed = ops.masked_patch_embed
SHAPES = {
    "model": (3, 5, 38, 16, 96, 57),
    "one sample": (1, 5, 6, 16, 32, 9),
    "odd everything": (3, 3, 7, 5, 13, 6),
    "patch of 8": (2, 2, 3, 8, 4, 3),
    "one patch": (2, 1, 1, 4, 3, 1),
    "one pixel": (2, 2, 3, 1, 2, 2),
    "nothing visible": (2, 2, 3, 4, 8, 0),
    "all visible": (2, 2, 3, 4, 8, 6),
    "empty batch": (0, 2, 3, 4, 8, 2),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpp", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out is NaN until written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_no_further_from_float64_than_the_reference(shape, dtype, poisoned):
    PatchProblem(*shape, dtype=dtype).check(embed)


def test_many_chunks_are_one(monkeypatch):
    problem = PatchProblem(7, 2, 3, 4, 8, 2)
    monkeypatch.setattr(op_module, "_CHUNK_ROWS", 12)
    problem.check(embed)


@pytest.mark.parametrize("threads", [1, 5])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        PatchProblem(40, 5, 38, 16, 8, 57).check(embed)
    finally:
        torch.set_num_threads(before)


def test_official_step(golden):
    """The official model's own source, mask and weights: its tokens, and what its encoders made of them."""
    g = golden("train_matpac")
    model = Matpac.from_official(
        {name[2:]: value for name, value in g.items() if name.startswith("w/")}, num_heads=2, predictor_heads=4
    )
    weight, bias = g["w/patch_embed.proj.weight"], g["w/patch_embed.proj.bias"]
    arguments = (g["source"], weight, bias, g["w/pos_embed"], g["w/cls_token"], g["ids_shuffle"])
    visible, masked = embed(*arguments, g["z_visible"].shape[1] - 1)
    expected = official(*arguments, g["z_visible"].shape[1] - 1)
    torch.testing.assert_close((visible, masked), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.student(visible), g["z_visible"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.teacher(masked), g["z_target_with_cls"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_no_worse_than_the_official_chain(dtype):
    def autocast(fn):
        def run(spec, *arguments):
            # The oracle runs in float64, which autocast leaves alone.
            with torch.autocast("cpu", dtype, enabled=spec.dtype != torch.float64):
                return fn(spec, *arguments)

        return run

    problem = PatchProblem(2, 5, 6, 16, 32, 9)
    problem.check(autocast(embed), plain=autocast(official))
    tokens = problem.run(autocast(embed))
    assert {name: value.dtype for name, value in tokens.items()} == dict.fromkeys(tokens, torch.float32)


def test_autocast_takes_a_16_bit_spectrogram():
    problem = PatchProblem(2, 2, 3, 4, 8, 2)
    exact = embed(*problem.arguments, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = embed(problem.spec.bfloat16(), *problem.arguments[1:], 2)
    torch.testing.assert_close(got, exact, rtol=0.02, atol=0.02)


def variants(problem: PatchProblem) -> dict[str, tuple[Tensor, ...]]:
    spec, weight, bias, pos, cls, ids = problem.arguments
    b, f, t = spec.shape
    longer = torch.full((b, f + 3, t + 5), float("nan"))
    longer[:, 2 : 2 + f, 4 : 4 + t] = spec
    return {
        "crop": (longer[:, 2 : 2 + f, 4 : 4 + t], weight, bias, pos, cls, ids),
        "time first": (spec.transpose(1, 2).contiguous().transpose(1, 2), weight, bias, pos, cls, ids),
        "batch last": (spec.permute(1, 2, 0).contiguous().permute(2, 0, 1), weight, bias, pos, cls, ids),
        "parameters": (
            spec,
            weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
            bias.repeat_interleave(2)[::2],
            pos.transpose(1, 2).contiguous().transpose(1, 2),
            cls.repeat(1, 1, 2)[:, :, : cls.shape[2]],
            ids,
        ),
        "ids": (spec, weight, bias, pos, cls, ids.T.contiguous().T),
    }


@pytest.mark.parametrize("name", ["crop", "time first", "batch last", "parameters", "ids"])
def test_strides_change_no_bit(name):
    problem = PatchProblem(3, 2, 3, 4, 8, 2)
    expected = problem.run(embed)
    arguments = variants(problem)[name]
    parameters = [arguments[i].requires_grad_() for i in (1, 2, 4)]
    visible, masked = embed(*arguments, 2)
    # An upstream gradient as a slice of a larger one.
    upstream = torch.cat([problem.upstream, problem.upstream], dim=2)[:, :, :8]
    grads = torch.autograd.grad(visible, parameters, upstream)
    for got, want in zip((visible, masked, *grads), expected.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("frames", "copied"), [(27_183_337, False), (27_183_338, True)])
def test_a_crop_from_hours_is_taken_out_where_32_bits_do_not_reach_across_it(frames, copied):
    spec = torch.empty(2, 79, frames, device="meta")[:, :, -608:]
    assert (op_module._laid_out(spec) is not spec) == copied


def test_inputs_stay_and_bits_repeat():
    problem = PatchProblem(5, 5, 38, 16, 24, 57)
    before = [t.clone() for t in problem.arguments]
    first, second = problem.run(embed), problem.run(embed)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.arguments, strict=True))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_sample_does_not_see_its_batch():
    problem = PatchProblem(3, 2, 3, 4, 8, 2)
    problem.spec[1] = float("nan")
    visible, masked = embed(*problem.arguments, 2)
    for tokens in (visible, masked):
        assert tokens[1, 1:].isnan().all()
        assert not tokens[[0, 2]].isnan().any()
        assert not tokens[1, 0].isnan().any(), "the CLS row holds no patch"


def test_masked_has_no_gradient():
    problem = PatchProblem(2, 2, 3, 4, 8, 2)
    problem.weight.requires_grad_()
    _, masked = embed(*problem.arguments, 2)
    assert not masked.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        masked.sum().backward()


@pytest.mark.parametrize("name", ["spec", "pos"])
def test_spec_and_pos_take_their_gradient_from_the_reference(name):
    problem = PatchProblem(2, 2, 3, 4, 8, 2)
    leaf = getattr(problem, name).requires_grad_()
    (got,) = torch.autograd.grad(embed(*problem.arguments, 2)[0], leaf, problem.upstream)
    (want,) = torch.autograd.grad(reference.masked_patch_embed(*problem.arguments, 2)[0], leaf, problem.upstream)
    assert torch.equal(got, want)
    assert got.abs().sum() > 0


def test_gradcheck():
    problem = PatchProblem(2, 2, 3, 2, 3, 4, dtype=torch.float64)
    spec, weight, bias, pos, cls, ids = problem.arguments

    def visible(weight: Tensor, bias: Tensor, cls: Tensor) -> Tensor:
        return embed(spec, weight, bias, pos, cls, ids, 4)[0]

    assert torch.autograd.gradcheck(visible, tuple(t.requires_grad_() for t in (weight, bias, cls)))


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype, permuted):
    problem = PatchProblem(3, 2, 3, 4, 8, 2)
    arguments = list(problem.arguments)
    upstream = problem.upstream
    if permuted:
        arguments = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in arguments]
        upstream = upstream.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for i in (1, 2, 4):
        arguments[i].requires_grad_()
    torch.library.opcheck(torch.ops.matpac_fast.masked_patch_embed.default, (*arguments, 2, dtype))
    backward = torch.ops.matpac_fast.masked_patch_embed_backward.default
    torch.library.opcheck(backward, (upstream, arguments[0], arguments[5], 2, 4, dtype))


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_compiles_whole_with_a_dynamic_batch():
    torch._dynamo.reset()
    compiled = torch.compile(embed, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        problem = PatchProblem(batch, 2, 3, 4, 8, 2)
        want, got = problem.run(embed), problem.run(compiled)
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5)


def changed(**changes: object) -> tuple:
    problem = PatchProblem(2, 2, 3, 4, 8, 2)
    names = ("spec", "weight", "bias", "pos", "cls", "ids_shuffle")
    arguments = {**dict(zip(names, problem.arguments, strict=True)), "n_visible": 2, **changes}
    return tuple(arguments.values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"spec": [1.0]}, TypeError, "spec is a list; expected a torch.Tensor"),
        ({"spec": torch.zeros(2, 8)}, ValueError, r"spec is \(2, 8\) .*expected 3 dimensions"),
        ({"spec": torch.zeros(2, 8, 12, dtype=torch.int16)}, TypeError, "spec .*int16.*expected one of float32"),
        ({"spec": torch.zeros(2, 8, 12).double()}, TypeError, "float64.*float32.*outside of autocast"),
        ({"spec": torch.zeros(2, 8, 13)}, ValueError, r"\(2, 8, 13\).*multiples of the patch size 4"),
        ({"spec": torch.zeros(2, 8, 0)}, ValueError, r"\(2, 8, 0\).*multiples of the patch size 4"),
        ({"weight": torch.zeros(8, 1, 4, 5)}, ValueError, r"weight is \(8, 1, 4, 5\)"),
        ({"weight": torch.zeros(8, 2, 4, 4)}, ValueError, r"weight is \(8, 2, 4, 4\).*expected \(8, 1, 4, 4\)"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias is \(7,\).*expected \(8,\)"),
        ({"bias": torch.zeros(8).double()}, TypeError, "bias is .*float64.*expected one of float32"),
        ({"pos": torch.zeros(1, 6, 8)}, ValueError, r"pos is \(1, 6, 8\).*expected \(1, 7, 8\)"),
        ({"cls": torch.zeros(1, 8)}, ValueError, r"cls is \(1, 8\).*expected \(1, 1, 8\)"),
        ({"ids_shuffle": torch.zeros(2, 6)}, TypeError, "ids_shuffle .*float32.*expected one of int64"),
        ({"ids_shuffle": torch.zeros(3, 6).long()}, ValueError, r"ids_shuffle is \(3, 6\).*expected \(2, 6\)"),
        ({"n_visible": 7}, ValueError, "n_visible is 7; expected 0 to 6"),
        ({"n_visible": -1}, ValueError, "n_visible is -1; expected 0 to 6"),
        ({"n_visible": 2.0}, TypeError, "n_visible is a float"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias is on meta, the other arguments on cpu"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        embed(*changed(**changes))


@pytest.mark.parametrize("bad", [-1, 6, 2**62, -(2**62)])
@pytest.mark.parametrize("place", [0, 5])
def test_an_id_that_names_no_patch_is_an_error(bad, place, backend):
    problem = PatchProblem(2, 2, 3, 4, 8, 2)
    problem.ids[1, place] = bad
    # torch's own gather, in the reference, raises a RuntimeError.
    error, message = (IndexError, f"{bad}.*expected 0 to 5") if backend == "cpp" else (RuntimeError, "out of bounds")
    with pytest.raises(error, match=message):
        embed(*problem.arguments, 2)
