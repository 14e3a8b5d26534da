"""How a model is made: of its seed and configuration alone, and as the official one is."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch

from matpac_fast.config import PRESETS, MatpacConfig
from matpac_fast.errors import ConfigError
from matpac_fast.model import Matpac
from matpac_fast.vit_encoder import Encoder
from tests.test_model import GOLDEN_OPTIONS, TINY, weights


def test_the_mask_is_a_function_of_seed_step_and_index():
    model = Matpac(MatpacConfig(seed=5, **TINY))
    spec = torch.randn(4, 80, 64)
    index = torch.tensor([9, 4, 7, 1])
    whole = model(spec, step=11, index=index)
    halves = [model(spec[i : i + 2], step=11, index=index[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(whole.loss_pred, torch.cat([h.loss_pred for h in halves]), rtol=1e-5, atol=1e-6)
    other = model(spec, step=12, index=index)
    assert not torch.allclose(whole.loss_pred, other.loss_pred)


def test_initial_weights_depend_on_the_seed_alone():
    before = torch.random.get_rng_state()
    torch.manual_seed(1)
    a = Matpac(MatpacConfig(seed=2, **TINY)).state_dict()
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    b = Matpac(MatpacConfig(seed=2, **TINY)).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.random.set_rng_state(before)
    assert all(torch.equal(a[k], b[k]) for k in a)
    c = Matpac(MatpacConfig(seed=3, **TINY)).state_dict()
    assert not torch.equal(a["student.blocks.0.attn.qkv.weight"], c["student.blocks.0.attn.qkv.weight"])


def test_models_made_in_several_threads_have_the_weights_of_their_seeds():
    def made(seed):
        return Matpac(MatpacConfig(seed=seed, **TINY)).state_dict()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(made, range(8)))
    for seed, state in enumerate(found):
        torch.testing.assert_close(state, made(seed), rtol=0, atol=0)


def test_a_model_that_is_made_seeds_no_gpu(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)  # which torch.manual_seed calls
    Matpac(MatpacConfig(seed=2, **TINY))
    assert seeded == []


@pytest.mark.parametrize("name", ["train_matpac", "train_mcl"])
def test_positions_that_are_made_are_the_official_ones(golden, name):
    """To the bit: a model that is trained here keeps those it was made with, and official weights bring their own."""
    g = golden(name)
    made = Matpac(Matpac.from_official(weights(g), **GOLDEN_OPTIONS).config)
    assert torch.equal(made.frontend.pos_embed, g["w/pos_embed"])
    assert torch.equal(made.predictor.pos_embed, g["w/decoder.decoder_pos_embed"])


def test_tokens_patches_and_prototypes_start_as_official():
    model = Matpac(MatpacConfig(**TINY | dict(width=256, predictor_width=256)))
    assert model.frontend.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.predictor.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    # Uniform: of the patches' projection as a matrix, Xavier's; of the prototypes, as torch's linear layers.
    projection, directions = model.frontend.patch_embed.proj.weight, model.head.last_layer.weight_v
    for weight, bound in ((projection, (6 / (256 + 256)) ** 0.5), (directions, directions.shape[1] ** -0.5)):
        assert bound * 0.98 < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert (model.head.last_layer.weight_g == 1).all()


def test_linear_layers_start_as_official():
    """Xavier-uniform, and the teacher's head normal; biases at zero."""
    model = Matpac(MatpacConfig(**TINY))
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            assert not layer.bias.any(), name
            bound = (6 / sum(layer.weight.shape)) ** 0.5
            spread = 0.02 if name.startswith("teacher_head") else bound / 3**0.5
            assert layer.weight.std().item() == pytest.approx(spread, rel=0.15), name


def test_teachers_start_as_official_or_as_copies():
    official = Matpac(MatpacConfig(**TINY))
    a, b = official.student.blocks[0].attn.qkv.weight, official.teacher.blocks[0].attn.qkv.weight
    assert not torch.equal(a, b)
    assert torch.equal(official.head.last_layer.weight_v, official.teacher_head.last_layer.weight_v)
    assert not torch.equal(official.head.mlp[0].weight, official.teacher_head.mlp[0].weight)
    copied = Matpac(MatpacConfig(teacher_init="copy", **TINY))
    assert all(torch.equal(p, q) for p, q in zip(copied.student.parameters(), copied.teacher.parameters(), strict=True))
    assert all(
        torch.equal(p, q) for p, q in zip(copied.head.parameters(), copied.teacher_head.parameters(), strict=True)
    )


def test_a_model_made_where_float64_is_the_default_is_of_float64():
    plain = Matpac(MatpacConfig(**TINY)).double()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = Matpac(MatpacConfig(**TINY))
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float64}
        model.load_state_dict(plain.state_dict())
        spec = torch.randn(2, 80, 64)
        out = model(spec, step=1)
        out.loss.backward()
        model.update_teachers(1)
    finally:
        torch.set_default_dtype(before)
    assert out.loss.dtype == torch.float64
    torch.testing.assert_close(out.loss, plain(spec, step=1).loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_made_where_16_bits_are_the_default_computes_in_them(dtype):
    """Its positions are made in float32, for a checkpoint would keep their rounding."""
    plain, spec = Matpac(MatpacConfig(**TINY)), torch.randn(2, 80, 64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model, encoder = Matpac(MatpacConfig(**TINY)), Encoder(n_frames=64, width=32, depth=1, num_heads=2)
        model.load_state_dict(plain.state_dict())
        out = model(spec.to(dtype), step=1)
        out.loss.backward()
        assert encoder(torch.randn(2, 9_000) / 10).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
    assert model.frontend.cls_token.dtype == dtype
    assert model.frontend.pos_embed.dtype == torch.float32
    torch.testing.assert_close(out.loss, plain(spec, step=1).loss, rtol=0.02, atol=0.0, check_dtype=False)


def test_annealing_ends_as_official_unless_asked_otherwise():
    official = Matpac(MatpacConfig(max_steps=10, **TINY))
    assert official.ema_decay(10) == official.ema_decay(99) == 0.99999
    assert official.head_ema_decay(10) == 0.99999
    better = Matpac(MatpacConfig(max_steps=10, head_ema_past_end="head", **TINY))
    assert better.head_ema_decay(10) == 1.0
    mcl = Matpac(MatpacConfig(mcl_heads=2, mcl_temp_decay=0.5, mcl_temp_end=0.02, **TINY))
    assert mcl.mcl_temperature(2) == 0.025
    assert mcl.mcl_temperature(3) == 0.0


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
    config = MatpacConfig.preset(name, mcl_heads=5)
    assert MatpacConfig.from_dict(config.to_dict()) == config
    assert asdict(config)["mcl_heads"] == 5


@pytest.mark.parametrize(("name", "millions"), [("base", (118.1, 91.9)), ("large", (336.2, 309.7))])
def test_presets_have_the_size_they_should(name, millions):
    with torch.device("meta"):
        model = Matpac(MatpacConfig.preset(name))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    teachers = sum(p.numel() for m in (model.teacher, model.teacher_head) for p in m.parameters())
    assert (round(trained / 1e6, 1), round(teachers / 1e6, 1)) == millions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(n_frames=600), "n_frames is 600; expected a multiple of the patch size, 16"),
        (dict(num_heads=7), "num_heads is 7, which does not divide width, 768"),
        (dict(predictor_heads=0), "predictor_heads is 0"),
        (dict(mask_ratio=0.999), "leaves 0 visible"),
        (dict(mask_ratio=1.0), "mask_ratio is 1.0; expected a share above 0 and below 1"),
        (dict(mask_ratio=0.01, n_mels=16, n_frames=16), "of 1 patches it leaves 0 visible, expected at least one"),
        (dict(width=66, num_heads=1), "width is 66; expected a multiple of 4"),
        (dict(teacher_temp=0.0), "teacher_temp is 0.0; expected a positive temperature"),
        (dict(center_of="means"), "center_of is 'means'; expected 'probabilities' or 'logits'"),
        (dict(prototypes=0), "prototypes is 0; expected at least 1"),
        (dict(patch_size=0), "patch_size is 0; expected at least 1"),
        (dict(mcl_heads=-3), "mcl_heads is -3; expected 0 or more"),
        (dict(mcl_temp_end=-1e-4), "mcl_temp_end is -0.0001; expected 0 or more"),
        (dict(mean=math.nan), "mean is nan; expected a finite number"),
        (dict(student_temp=math.inf), "student_temp is inf; expected a finite number"),
        (dict(log_floor=1e300), "log_floor is 1e[+]300; expected a finite number, to 3.40282e[+]38"),
        (dict(seed=2**63), "seed is 9223372036854775808; expected a finite number"),
        (dict(mask_ratio=1.5), "mask_ratio is 1.5; expected a share above 0 and below 1"),
        (dict(mask_ratio=float("nan")), "mask_ratio is nan; expected a share above 0 and below 1"),
        (dict(ema_start=1.1), "ema_start is 1.1; expected 0 to 1"),
        (dict(teacher_temp=float("nan")), "teacher_temp is nan; expected a positive temperature"),
        (dict(patch_size=(16, 4)), r"patch_size is \(16, 4\); expected a whole number"),
        (dict(depth=1.5), "depth is 1.5; expected a whole number"),
        (dict(width=192.5), "width is 192.5; expected a whole number"),
        (dict(mcl_heads=True), "mcl_heads is True; expected a whole number"),
        (dict(mask_ratio="most"), "mask_ratio is 'most'; expected a number"),
    ],
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        MatpacConfig(**fields)


def test_numbers_of_any_kind_are_pythons_in_a_configuration():
    config = MatpacConfig(width=192.0, num_heads=np.int64(3), std=np.float32(4), mean=-7)
    assert [type(value) for value in (config.width, config.num_heads, config.std)] == [int, int, float]
    assert repr(config.mean) == "-7.0"  # the ids of encoders are made of it


def test_unknown_names_are_errors():
    with pytest.raises(ConfigError, match="no preset 'huge'; expected one of nano, tiny, small, base, large"):
        MatpacConfig.preset("huge")
    with pytest.raises(ConfigError, match="unknown fields .*: depht"):
        MatpacConfig.from_dict({"depht": 3})


def test_numbers_may_be_numpys():
    assert MatpacConfig(width=np.int64(192), num_heads=np.int32(3), mask_ratio=np.float32(0.5)).n_visible() == 95
