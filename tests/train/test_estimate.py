"""What a run would cost: the activations are counted rightly, and follow batch, precision and crop."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from torch import nn

from matpac_fast.model import Matpac
from matpac_fast.train import estimate as module
from matpac_fast.train.estimate import activation_bytes, estimate
from matpac_fast.train.flops import step_flops
from matpac_fast.train.watch import TrainingError

CPU = torch.device("cpu")


class Known(nn.Module):
    """Keeps for its backward pass: the input, once for two products, the result of exp, and a weight."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.ones(config.n_mels, 1))
        self.center_sum = self.center_count = torch.zeros(1)

    def forward(self, spec):
        return (spec * self.weight).exp().sum() + (spec[:, :, 1:] * self.weight).sum()


def test_activations_are_counted_once_and_weights_never():
    module = Known(types.SimpleNamespace(n_mels=80))
    assert activation_bytes(module, 32, "float32", CPU) == 2 * 80 * 32 * 4


def test_activations_follow_precision_and_crop(model_config):
    model = Matpac(model_config.replace(n_frames=64)).train()
    short, long = (activation_bytes(model, n_frames, "float32", CPU) for n_frames in (32, 64))
    assert 1.8 * short < long < 2.2 * short
    assert 0.3 * long < activation_bytes(model, 64, "bf16", CPU) < 0.9 * long
    assert model.center_count == 0


def rows_of(text):
    return {name: value.strip() for name, value in (line.split("  ", 1) for line in text.splitlines())}


def test_it_times_the_pieces_that_would_be_computed(corpus, model_config, train_config, monkeypatch):
    timed = []
    honest = module.train_step

    def train_step(model, optimizer, pieces, *args):
        timed.append(pieces[0][0].shape[0])
        return honest(model, optimizer, pieces, *args)

    monkeypatch.setattr(module, "train_step", train_step)
    monkeypatch.setitem(module._SAMPLE, "cpu", 8)
    config = dataclasses.replace(train_config, batch_size=24, grad_accumulation=2)
    for world, rows in ((1, 8), (2, 6), (4, 3)):
        timed.clear()
        estimate(corpus, model_config, config, CPU, world)
        assert timed == [rows, rows]


def test_crops_of_several_lengths_cost_their_mean(corpus, model_config, train_config, monkeypatch):
    monkeypatch.setattr(module, "_speed", lambda *_: 10.0)  # crops a second, of the longest
    config = dataclasses.replace(train_config, steps=1_000, crop_frames=(16, 32))
    told = rows_of(estimate(corpus, model_config, config, CPU, done=200))
    short, long = (step_flops(model_config, n) for n in (16, 32))
    speed = 10.0 * long / ((short + long) / 2)
    assert told["speed"].startswith(f"about {speed:.1f} crops/s")
    seconds = round(800 * config.batch_size / speed)
    assert told["time"] == f"about 0:{seconds // 60:02d}:{seconds % 60:02d} for the 800 steps that are left"


def test_whether_a_step_fits_is_said(corpus, model_config, train_config, monkeypatch):
    monkeypatch.setattr(module, "_speed", lambda *_: 1.0)
    monkeypatch.setattr(module, "activation_bytes", lambda *_: 2.0**40)  # of a crop
    config = dataclasses.replace(train_config, batch_size=12)

    def told(free, world=1):
        monkeypatch.setattr(module, "free_memory", lambda device: free)
        return rows_of(estimate(corpus, model_config, config, CPU, world))["memory"].partition("in passing; ")[2]

    assert told(13 * 2.0**40) == "13631488 MiB are free"
    assert told(5 * 2.0**40).endswith("5242880 MiB that are free: --grad-accumulation 3 would fit")
    assert told(5 * 2.0**40, 2).endswith("--grad-accumulation 2 would fit")
    assert told(2.0**40).endswith("that are free: choose a smaller preset or a shorter crop")
    assert told(float("inf")) == "how much is free is not known"


def test_what_is_free_here():
    assert 2**20 < module.free_memory(CPU) < 2**50


def test_what_does_not_fit_is_said_and_the_rest_is_told(corpus, model_config, train_config, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "train_step", full)
    told = rows_of(estimate(corpus, model_config, train_config, CPU))
    assert told["time"] == "not known: 4 crops at a time do not fit into the memory of cpu"
    assert told["steps"].startswith("12, ")
    monkeypatch.setattr(module, "train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        estimate(corpus, model_config, train_config, CPU)
    monkeypatch.setattr(module, "activation_bytes", full)
    with pytest.raises(TrainingError, match="two of its crops do not fit into the memory of cpu: choose a smaller"):
        estimate(corpus, model_config, train_config, CPU)
