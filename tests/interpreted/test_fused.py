"""Whole transformers on the fused kernels under Triton's interpreter: a training step like that of the plain blocks."""

from __future__ import annotations

import pytest
import torch

from matpac_fast import ops, use_backend
from matpac_fast.config import MatpacConfig
from matpac_fast.model import Matpac
from matpac_fast.nn import fused

CONFIG = MatpacConfig.preset(
    "tiny", n_frames=32, width=64, num_heads=2, depth=2, predictor_width=64, predictor_heads=2, predictor_depth=2
)


def gradients(backend: str, mcl_heads: int, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, torch.Tensor], int]:
    calls = []
    run = fused.run
    monkeypatch.setattr(fused, "run", lambda *args, **options: calls.append(1) or run(*args, **options))
    model = Matpac(CONFIG.replace(mcl_heads=mcl_heads)).train()
    spec = torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(0))
    ids_shuffle = ops.mask_shuffle(0, 0, torch.arange(2), CONFIG.n_tokens)
    with use_backend(backend):
        with torch.autocast("cpu", torch.float16):
            out = model(spec, ids_shuffle, step=3)
        out.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach()[None], **found}, len(calls)


@pytest.mark.parametrize("mcl_heads", [0, 2])
def test_a_step_is_that_of_the_plain_blocks(mcl_heads, monkeypatch):
    ours, fused_runs = gradients("triton", mcl_heads, monkeypatch)
    plain, plain_runs = gradients("reference", mcl_heads, monkeypatch)
    assert (fused_runs, plain_runs) == (3, 0)  # student, teacher and predictor
    assert ours.keys() == plain.keys()
    for name, want in plain.items():
        difference = (ours[name] - want).norm() / want.norm()
        assert difference < 0.02, f"{name}: {difference:.3g}"


def test_who_is_served():
    model = Matpac(CONFIG)
    x = torch.randn(1, 3, 64)
    with use_backend("triton"):
        assert not fused.serves(model.student.blocks, x)  # float32
        with torch.autocast("cpu", torch.bfloat16):
            assert fused.serves(model.student.blocks, x)
            model.student.blocks[0].compile(backend="eager")
            assert not fused.serves(model.student.blocks, x)
            assert not fused.serves(model.teacher.bfloat16().blocks, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.serves(model.predictor.blocks, x)  # a CPU's own way
