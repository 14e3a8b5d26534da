"""The blocks through torch.compile: the same curve to rounding, and really compiled."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from matpac_fast.model import Matpac
from matpac_fast.nn.vit import Block
from matpac_fast.train import loop, pretrain, read_log
from matpac_fast.train.compiled import compile_blocks


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_the_compiled_curve_is_that_of_the_plain_run(tmp_path, corpus, model_config, train_config, monkeypatch):
    """Traced and differentiated ahead of time, as always; without inductor's C++, which takes a minute to build."""
    monkeypatch.setattr(loop, "compile_blocks", functools.partial(compile_blocks, backend="aot_eager"))
    pretrain(corpus, tmp_path / "plain", model_config, train_config, "cpu")
    pretrain(corpus, tmp_path / "compiled", model_config, dataclasses.replace(train_config, compile=True), "cpu")
    # The student's block, the teacher's without gradient, and the predictor's last, with queries of its own.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    curves = [[r for r in read_log(tmp_path / name / "log.jsonl") if "loss" in r] for name in ("plain", "compiled")]
    assert len(curves[0]) == 6
    for plain, compiled in zip(*curves, strict=True):
        for key in ("step", "loss", "grad_norm", "teacher_entropy", "effective_rank"):
            assert compiled[key] == pytest.approx(plain[key], rel=1e-4)


def test_inductor_computes_a_block_and_its_gradients():
    torch.manual_seed(0)
    block = Block(16, 2, 4)
    x, upstream = torch.randn(3, 9, 16, requires_grad=True), torch.randn(3, 5, 16)

    def run():
        block.zero_grad()
        out = block(x, first_query=4)
        return out, *torch.autograd.grad(out, [x, *block.parameters()], upstream)

    want = run()
    block.compile(fullgraph=True, dynamic=False)
    got = run()
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] > 0
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_kind_of_block_is_compiled_for_every_crop(model_config):
    """More graphs than dynamo allows by itself, past which it would go on uncompiled."""
    model = Matpac(model_config.replace(n_frames=96, depth=2, predictor_depth=2)).train()
    names = set(model.state_dict())
    compiled = []

    def count(graph, _):
        compiled.append(graph)
        return graph

    compile_blocks(model, count)
    for n_frames in (32, 64, 96, 64):
        model(torch.randn(2, 80, n_frames), step=1).loss.backward()
    # Student, teacher, predictor and its last block, for each length.
    assert len(compiled) == 4 * 3
    assert set(model.state_dict()) == names
