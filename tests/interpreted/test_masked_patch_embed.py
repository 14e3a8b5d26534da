"""masked_patch_embed's Triton kernels under Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from patch_problem import PatchProblem, official

from matpac_fast import ops, use_backend
from matpac_fast.kernels import masked_patch_embed as kernels

embed = ops.masked_patch_embed
SHAPES = {
    "model": (1, 5, 38, 16, 96, 57),
    "odd everything": (3, 3, 7, 5, 13, 6),
    "one patch": (2, 1, 1, 4, 3, 1),
    "patches in parts": (1, 2, 1, 18, 8, 1),
    "nothing visible": (2, 2, 3, 4, 8, 0),
    "all visible": (2, 2, 3, 4, 8, 6),
    "empty batch": (0, 2, 3, 4, 8, 2),
}


@pytest.fixture(autouse=True)
def triton_on_poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_no_further_from_float64_than_the_reference(shape, dtype):
    PatchProblem(*shape, dtype=dtype).check(embed)


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


def test_several_launches_and_splits_are_one(monkeypatch):
    problem = PatchProblem(5, 3, 5, 4, 72, 6)
    monkeypatch.setattr(kernels, "FWD_PROGRAMS", 1)  # all columns, two blocks of them
    monkeypatch.setattr(kernels, "BWD_PROGRAMS", 2)
    monkeypatch.setattr(kernels, "MAX_OFFSET", 2 * 3 * 5 * 16)
    problem.check(embed)


def test_a_crop_and_permuted_parameters():
    problem = PatchProblem(2, 2, 3, 4, 8, 2)
    want = problem.run(embed)
    longer = torch.full((2, 11, 17), float("nan"))
    longer[:, 2:10, 4:16] = problem.spec
    problem.spec = longer[:, 2:10, 4:16]
    problem.weight = problem.weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    problem.pos = problem.pos.transpose(1, 2).contiguous().transpose(1, 2)
    visible, masked = embed(*problem.arguments, 2)
    assert torch.equal(visible, want["visible"])
    assert torch.equal(masked, want["masked"])


def test_inputs_stay_and_bits_repeat():
    problem = PatchProblem(2, 3, 7, 5, 13, 6)
    before = [t.clone() for t in problem.arguments]
    first, second = problem.run(embed), problem.run(embed)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.arguments, strict=True))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bad", [-1, 6, 2**31, -(2**40)])
def test_an_id_that_names_no_patch_gives_nan_and_reads_nothing(bad):
    problem = PatchProblem(2, 2, 3, 4, 8, 2)
    want = embed(*problem.arguments, 2)
    problem.ids[0, 1], problem.ids[1, 4] = bad, bad
    visible, masked = embed(*problem.arguments, 2)
    assert visible[0, 2].isnan().all()
    assert masked[1, 3].isnan().all()
    visible[0, 2], masked[1, 3] = want[0][0, 2], want[1][1, 3]
    assert torch.equal(visible, want[0])
    assert torch.equal(masked, want[1])
