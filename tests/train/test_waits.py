"""A whole optimiser step never makes the host wait for the device, with statistics and without."""

from __future__ import annotations

import pytest
import torch
from recorded import NoWait

from matpac_fast import ops
from matpac_fast.config import MatpacConfig
from matpac_fast.model import Matpac
from matpac_fast.train.config import TrainConfig
from matpac_fast.train.feed import Feed
from matpac_fast.train.sampler import Sampler
from matpac_fast.train.step import make_optimizer, train_step


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("mcl_heads", [0, 3])
def test_a_step_as_a_gpu_would_see_it(model_config, train_config, monkeypatch, mcl_heads, statistics):
    model = Matpac(model_config.replace(mcl_heads=mcl_heads))
    optimizer = make_optimizer(model, train_config)
    spec = torch.randn(4, model_config.n_mels, model_config.n_frames)
    ids_shuffle = ops.mask_shuffle(0, 0, torch.arange(4), model_config.n_tokens)
    pieces = list(zip(spec.chunk(2), ids_shuffle.chunk(2), strict=True))
    train_step(model, optimizer, pieces, 0, lr=1e-3, clip_norm=3.0)  # makes Adam's moments
    update, skips = model.update_teachers, []

    def noted(step, skip, schedule):
        skips.append(skip)
        update(step, skip, schedule)

    monkeypatch.setattr(model, "update_teachers", noted)
    with NoWait():
        measured = train_step(model, optimizer, pieces, 1, lr=1e-3, clip_norm=3.0, statistics=statistics)
    assert not measured.bad
    assert [skip.dtype for skip in skips] == [torch.bool]


@pytest.mark.gpu
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("mcl_heads", [0, 3])
def test_a_step_on_a_gpu(corpus, mcl_heads, precision, statistics):
    """From crops in pinned memory to new weights and teachers, under torch's own watch."""
    device = torch.device("cuda")
    config = MatpacConfig.preset("tiny", n_frames=32, depth=2, predictor_depth=2, mcl_heads=mcl_heads)
    model = Matpac(config).to(device).train()
    optimizer = make_optimizer(model, TrainConfig())
    feed = Feed(corpus, Sampler(corpus.frames, [5_360], 4, seed=0), device, 0, 4)
    try:
        for batch in feed:
            torch.cuda.set_sync_debug_mode("error" if batch.plan.step > 1 else "default")  # the first ones compile
            spec = ops.log_mel(batch.wave)
            ids_shuffle = ops.mask_shuffle(0, batch.plan.step, batch.index, config.n_tokens)
            pieces = list(zip(spec.chunk(2), ids_shuffle.chunk(2), strict=True))
            step = train_step(model, optimizer, pieces, batch.plan.step, 1e-3, 3.0, precision, statistics)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        feed.close()
    assert not step.bad
