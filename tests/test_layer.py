"""Names that end in a layer: "runs/a@layer6" is the network up to its sixth block, and costs no more than that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from matpac_fast import Matpac, MatpacConfig, get_matpac, load_encoder
from matpac_fast.errors import ConfigError
from matpac_fast.export import Exportable
from matpac_fast.train.weights import load_weights, weights_sizes
from matpac_fast.vit_encoder import Encoder

DEEP = dict(n_frames=32, width=16, depth=3, num_heads=2, predictor_width=12, predictor_depth=1, predictor_heads=2)
DEEP |= dict(head_hidden=16, head_bottleneck=8, prototypes=12)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("layers") / "a"
    model = Matpac(MatpacConfig(**DEEP))
    with torch.no_grad():  # a final norm that does something
        model.student.norm.weight.uniform_(0.5, 2)
    model.save(run / "checkpoints" / "step-00000004" / "model.safetensors")
    return run


@pytest.fixture(scope="module")
def wave() -> torch.Tensor:
    return torch.randn(16_000, generator=torch.Generator().manual_seed(0)) / 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ending", ["@layer{}", "@layer{}@teacher@4"])
def test_it_is_that_layer_of_all(run, wave, ending, dtype):
    whole = load_encoder(f"{run}{ending.format(3).removeprefix('@layer3')}", "cpu", dtype=dtype)
    every = whole.embed(wave, 16_000, 0.32, layers="all").values  # (windows, 3, E)
    for layer in (1, 2, 3):
        one = load_encoder(f"{run}{ending.format(layer)}", "cpu", dtype=dtype)
        assert one.name == "a" + ending.format(layer)
        assert one.facts()["layers"] == one.n_layers == len(one.student.blocks) == layer
        assert torch.equal(one.embed(wave, 16_000, 0.32).values, every[:, layer - 1])
        assert torch.equal(one.embed(wave, 16_000, 0.32, layers="all").values[:, -1], every[:, layer - 1])
        assert (one.id == whole.id) == (layer == 3)


def test_each_layer_has_an_id_of_its_own(run):
    parts = [load_encoder(f"{run}@layer{layer}", "cpu") for layer in (1, 2, 3)]
    small = Encoder(n_frames=32, width=16, depth=2, num_heads=2)  # of two layers, the second one normalised
    small.load_state_dict({k: v for k, v in parts[2].state_dict().items() if "blocks.2." not in k})
    assert len({encoder.id for encoder in (*parts, small)}) == 4


def test_the_packaged_and_untrained_ones_have_layers(wave):
    for name in ("matpac-nano", "untrained-nano"):
        every = load_encoder(name, "cpu").embed(wave, 16_000, layers="all").values
        assert torch.equal(load_encoder(f"{name}@layer2", "cpu").embed(wave, 16_000).values, every[:, 1])


def test_what_becomes_of_a_part(run, wave, tmp_path):
    part = load_encoder(f"{run}@layer2", "cpu")
    graph = Exportable(part)(wave[None])
    torch.testing.assert_close(graph, part.embed(wave, 16_000).values, rtol=1e-4, atol=1e-5)
    official = get_matpac(f"{run}@layer2", device="cpu")(wave[None])[0]
    torch.testing.assert_close(official, part.embed(wave, 16_000).values, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"up to layer 2 of 3; save the whole one, and load FILE@layer2 of it"):
        part.save(tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match=r"AudioSet head is of the last layer, and this is a@layer2; leave it out"):
        get_matpac(f"{run}@layer2", as_class_head=True, device="cpu")
    for take in (weights_sizes, lambda source: load_weights(Matpac(MatpacConfig(**DEEP)), source)):
        with pytest.raises(ConfigError, match="a new run begins with the whole .* leave @layer2 out"):
            take(f"{run}@layer2")
