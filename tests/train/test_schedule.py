"""The learning rate and the stretched schedules against the official numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from stops import after

from matpac_fast.config import MatpacConfig
from matpac_fast.errors import ConfigError
from matpac_fast.train import pretrain
from matpac_fast.train.config import TrainConfig, fit_to_run, resolve_precision
from matpac_fast.train.flops import step_flops
from matpac_fast.train.schedule import learning_rate


def test_learning_rate_is_fairseqs_cosine():
    def rate(step):
        return learning_rate(step, 3e-4, 19_654, 294_816)

    assert rate(0) == 0.0
    assert rate(9_827) == pytest.approx(1.5e-4)
    assert rate(19_654) == 3e-4
    assert rate(19_654 + (294_816 - 19_654) // 2) == pytest.approx(1.5e-4)
    quarter = 19_654 + (294_816 - 19_654) / 4
    assert rate(quarter) == pytest.approx(3e-4 * (1 + math.cos(math.pi / 4)) / 2)
    assert 0 < rate(294_815) < 1e-13
    assert rate(294_816) == rate(400_000) == 0.0


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert learning_rate(0, 1.0, 0, 10) == 1.0
    assert learning_rate(10, 1.0, 10, 10) == 1.0  # nothing is left for the cosine


def test_a_run_of_the_official_length_is_the_official_one():
    train = TrainConfig()
    assert train.warmup_steps == 19_654
    assert (train.lr, train.weight_decay, train.betas, train.eps, train.clip_norm) == (
        3e-4,
        0.05,
        (0.9, 0.95),
        1e-6,
        3.0,
    )
    assert fit_to_run(MatpacConfig(mcl_heads=5), train) == MatpacConfig(mcl_heads=5)


@pytest.mark.parametrize("steps", [1, 30, 2_000, 100_000])
def test_a_shorter_run_keeps_the_shares_of_the_official_one(steps):
    official, short = MatpacConfig(mcl_heads=5), fit_to_run(MatpacConfig(mcl_heads=5), TrainConfig(steps=steps, seed=9))
    assert short.max_steps == steps
    assert short.seed == 9
    assert TrainConfig(steps=steps).warmup_steps == max(1, round(steps / 15))
    assert short.teacher_temp_warmup == max(1, round(steps / 30))
    assert 0 <= short.ema_start <= short.ema_end < 1
    assert short.head_ema_start <= min(short.ema_start, official.head_ema_start)
    assert short.head_ema_end == 1.0
    if steps >= 2_000:  # time constants, as shares of the run
        assert 1 / (1 - short.ema_start) / steps == pytest.approx(20_000 / 294_816)
        assert 1 / (1 - short.ema_end) / steps == pytest.approx(100_000 / 294_816)
    assert short.mcl_temp_decay**steps == pytest.approx(official.mcl_temp_decay**294_816)


def test_official_decays_can_be_kept():
    kept = fit_to_run(MatpacConfig(), TrainConfig(steps=2_000, stretch_decays=False))
    assert (kept.ema_start, kept.ema_end, kept.head_ema_start) == (0.99995, 0.99999, 0.998)
    assert kept.max_steps == 2_000


def test_flops_are_the_counted_ones():
    assert step_flops(MatpacConfig()) / 1e9 == pytest.approx(91.8, abs=0.05)
    assert step_flops(MatpacConfig(), 304) < 0.5 * step_flops(MatpacConfig())
    more = step_flops(MatpacConfig(mcl_heads=5)) - step_flops(MatpacConfig())
    assert more == 3 * 4 * 133 * 2 * 512 * 768


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"batch_size": 6, "grad_accumulation": 4}, "grad_accumulation, 4, does not divide"),
        ({"lr": float("nan")}, "lr is nan; expected a positive"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"steps": 10, "warmup": 11}, "warmup is 11; expected 0 to 10"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"pad_short": "no"}, "pad_short is 'no'"),
        ({"seed": -1}, "seed is -1"),
        ({"keep_every": 700}, "keep_every is 700; expected a multiple of save_every, 500"),
        ({"crop_frames": ()}, "crop_frames is empty"),
        ({"steps": 2.5}, "steps is 2.5; expected a whole number$"),
        ({"steps": True}, "steps is True; expected a whole number$"),
        ({"steps": float("inf")}, "steps is inf; expected a whole number$"),
        ({"batch_size": "8"}, "batch_size is '8'; expected a whole number$"),
        ({"lr": None}, "lr is None; expected a number$"),
        ({"lr": 10**400}, "lr is 10+; expected a number$"),
        ({"warmup": "1"}, "warmup is '1'; expected a whole number or None$"),
        ({"crop_frames": 96}, "crop_frames is 96; expected a tuple of whole numbers or None$"),
        ({"crop_frames": (32, 64.5)}, r"crop_frames is \(32, 64.5\); expected a tuple of whole numbers or None$"),
        ({"betas": 0.9}, "betas is 0.9; expected a tuple of numbers$"),
        ({"compile": "no"}, "compile is 'no'; expected True or False$"),
        ({"cuda_graph": 1}, "cuda_graph is 1; expected True or False or None$"),
    ],
)
def test_a_config_that_cannot_be_says_what_was_expected(change, says):
    with pytest.raises(ConfigError, match=says):
        TrainConfig(**change)


def test_numbers_may_be_of_any_kind_and_are_pythons():
    given = TrainConfig(
        steps=1e1,
        log_every=2.0,
        seed=np.int64(3),
        lr=np.float32(0.5),
        weight_decay=Fraction(1, 4),
        clip_norm=3,
        crop_frames=[np.int32(32), 64.0],
        betas=[0, np.float64(0.5)],
        warmup=np.float32(1),
        compile=np.bool_(True),
    )
    made = dict(steps=10, log_every=2, seed=3, lr=0.5, weight_decay=0.25, clip_norm=3.0, crop_frames=(32, 64))
    assert repr(given) == repr(TrainConfig(**made, betas=(0.0, 0.5), warmup=1, compile=True))
    assert json.dumps(given.to_dict())


def test_config_survives_json():
    config = TrainConfig(steps=5, betas=(0.8, 0.9), crop_frames=(32, 64))
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="unknown fields in the training configuration, .*: colour"):
        TrainConfig.from_dict({"colour": "red"})


def test_precision():
    cpu = torch.device("cpu")
    assert resolve_precision("bf16", cpu) == "bf16"
    assert resolve_precision("float32", cpu) == "float32"


@pytest.mark.parametrize("begun", ["bf16", "float32"])
def test_a_run_keeps_the_precision_that_it_has_begun_with(tmp_path, corpus, model_config, train_config, begun):
    """Whatever "auto" is on the device that it goes on on."""
    for precision in (begun, "auto"):
        config = dataclasses.replace(train_config, precision=precision)
        result = pretrain(corpus, tmp_path / "run", model_config, config, "cpu", stop=after(1))
    assert result.step == 2
