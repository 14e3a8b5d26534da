"""What a run would cost: the activations are counted rightly, and follow batch, precision and crop."""

from __future__ import annotations

import types

import torch
from torch import nn

from matpac_fast.model import Matpac
from matpac_fast.train.estimate import activation_bytes

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
