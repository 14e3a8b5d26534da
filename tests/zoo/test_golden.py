"""PaSST and BEATs against the official code's own outputs, and what their files may and may not hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from matpac_fast import checkpoint, load_encoder, ops, reference
from matpac_fast.errors import AudioError, CheckpointError, ConfigError
from matpac_fast.vit_encoder import Encoder
from matpac_fast.zoo import beats, passt
from tests.zoo import official

# Official features from waves: their float32 filterbanks are up to 4e-5 off float64 themselves, and ours are nearer.
FROM_WAVE = 5e-5
ROUNDING = 4e-6


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape
    return (got - want).abs().max().item()


@pytest.mark.parametrize("stride", [10, 16])
@pytest.mark.parametrize("clip", ["ten_seconds", "one_second", "odd", "quarter"])
def test_passt_equals_the_official_features(golden, tmp_path, stride, clip):
    g = golden("passt")
    encoder = load_encoder(f"passt:{official.passt_file(g, tmp_path, stride)}", "cpu", num_heads=2)
    assert (encoder.sample_rate, encoder.embedding_dim, encoder.n_layers, encoder.stride) == (32_000, 32, 2, stride)
    features = encoder.embed(g[f"{clip}/wave"][0], 32_000).values
    assert distance(features, g[f"stride{stride}/{clip}/features"]) < ROUNDING
    # The heads, which embedding leaves out, on top give the official logits.
    w = official.weights(g, f"stride{stride}/w/")
    x = F.layer_norm(features, features.shape[1:], w["head.0.weight"], w["head.0.bias"])
    logits = F.linear(x, w["head.1.weight"], w["head.1.bias"])
    assert distance(logits, g[f"stride{stride}/{clip}/logits"]) < ROUNDING


@pytest.mark.parametrize("clip", ["odd", "quarter"])
def test_passt_mel_is_nearer_to_float64_than_the_official(golden, clip):
    g = golden("passt")
    exact = reference.log_mel(g[f"{clip}/wave"].double(), passt.PASST_LOG_MEL)
    official_error = distance(g[f"{clip}/mel"], exact)
    assert distance(ops.log_mel(g[f"{clip}/wave"], passt.PASST_LOG_MEL), exact) <= 2 * official_error


@pytest.fixture
def tiny_beats(golden, tmp_path) -> beats.Beats:
    encoder = load_encoder(f"beats:{official.beats_file(golden('beats'), tmp_path)}", "cpu")
    assert isinstance(encoder, beats.Beats)
    return encoder


@pytest.mark.parametrize("clip", ["one_second", "odd"])
def test_beats_equals_the_official_features_of_a_filterbank(golden, tiny_beats, clip):
    g = golden("beats")
    with torch.no_grad():
        *_, tokens = tiny_beats.tokens(g[f"{clip}/fbank"].transpose(1, 2))
    assert distance(tokens, g[f"{clip}/features"]) < ROUNDING


@pytest.mark.parametrize("clip", ["ten_seconds", "one_second", "odd"])
def test_beats_equals_the_official_features_of_a_wave(golden, tiny_beats, clip):
    g = golden("beats")
    want = g[f"{clip}/features"].unflatten(1, (-1, 8)).mean(2)[0]  # (T, D), a frame the mean over frequency
    frames = tiny_beats.embed(g[f"{clip}/wave"][0], 16_000, pool="none")
    assert distance(frames.values, want) < FROM_WAVE
    assert frames.start[:2].tolist() == [0.0, 0.16]
    pooled = tiny_beats.embed(g[f"{clip}/wave"][0], 16_000).values
    assert distance(pooled, g[f"{clip}/features"].mean(1)) < FROM_WAVE


def test_beats_equals_the_official_features_of_a_padded_batch(golden, tiny_beats):
    g = golden("beats")
    with torch.no_grad():
        tokens, masked = tiny_beats.features(g["padded/wave"], g["padded/mask"])
    assert torch.equal(masked, g["padded/feature_mask"])
    assert distance(tokens, g["padded/features"]) < FROM_WAVE


def test_beats_padding_that_cannot_be(tiny_beats):
    waves = official.noise(2, 8_000)
    for padding, line in (
        (
            torch.zeros(2, 7_999, dtype=torch.bool),
            r"waves are \(2, 8000\), padding is \(2, 7999\) torch.bool; expected",
        ),
        (torch.zeros(2, 8_000), "torch.float32; expected"),
        (torch.ones(2, 8_000).bool(), "a clip is all padding"),
    ):
        with pytest.raises(AudioError, match=line):
            tiny_beats.features(waves, padding)
    with pytest.raises(AudioError, match="waves of 2799 samples; a patch needs 2800"):
        tiny_beats.features(waves[:, :2_799], torch.zeros(2, 2_799, dtype=torch.bool))


def test_official_files_are_known_by_content(golden, tmp_path):
    path = official.beats_file(golden("beats"), tmp_path)
    found = load_encoder(path, "cpu")
    assert isinstance(found, beats.Beats)
    assert found.name == "beats.pt"
    assert found.id == load_encoder(f"beats:{path}", "cpu").id
    assert isinstance(load_encoder(official.passt_file(golden("passt"), tmp_path), "cpu", num_heads=2), passt.Passt)
    with pytest.raises(CheckpointError, match=r"beats\.pt: not a checkpoint of M2D; its first names are"):
        load_encoder(f"m2d:{path}", "cpu")
    with pytest.raises(CheckpointError, match=r"beats\.pt: not a PaSST checkpoint \('freq_new_pos_embed'\)"):
        load_encoder(f"passt:{path}", "cpu")
    with pytest.raises(CheckpointError, match=r"no\.pt: no such file"):
        load_encoder("beats:no.pt", "cpu")


def test_a_kind_may_be_named(tmp_path):
    encoder = Encoder(n_frames=64, width=64, depth=2, num_heads=1)
    encoder.save(tmp_path / "e.safetensors")
    assert load_encoder(f"matpac:{tmp_path / 'e.safetensors'}", "cpu").id == encoder.id
    with pytest.raises(CheckpointError, match="not a checkpoint of M2D"):
        load_encoder(f"m2d:{tmp_path / 'e.safetensors'}", "cpu")


@pytest.mark.parametrize("kind", ["passt", "beats"])
def test_files_that_do_not_fit_are_refused_by_name(golden, kind):
    g = golden(kind)
    good = official.weights(g, "stride10/w/" if kind == "passt" else "w/")
    module = passt if kind == "passt" else beats
    some = "norm.bias" if kind == "passt" else "layer_norm.bias"
    flat = "time_new_pos_embed" if kind == "passt" else "encoder.pos_conv.0.weight_v"
    sized = "freq_new_pos_embed" if kind == "passt" else "encoder.layers.0.fc1.weight"
    for state, line in (
        ({k: v for k, v in good.items() if k != some}, rf"f does not fit this model; 1 missing: {some}"),
        (good | {"extra.weight": torch.zeros(1)}, r"1 unexpected: extra\.weight"),
        (good | {some: torch.zeros(7)}, rf"1 of another shape: {some} \(7,\) for"),
        ({"x": torch.zeros(1)}, r"f: not a \w+ checkpoint .*; its first names are x"),
        (good | {sized: torch.zeros(1)}, r"f: not a \w+ checkpoint \(not enough values"),
        (good | {flat: torch.zeros(1)}, r"f: not a \w+ checkpoint \((tuple index out of range|not enough values)"),
        (good | {some: 3}, "f: expected a dictionary of tensors"),
    ):
        with pytest.raises(CheckpointError, match=line):
            module.from_official(state, "f", 2)
    with pytest.raises(CheckpointError, match="width of 32 does not divide into heads of 64"):
        module.from_official(good, "f")
    # Half-precision files compute in float32 all the same; heads of fine-tuning are left out, whatever their shape.
    heads = {"head.1.weight": torch.zeros(3, 32)} if kind == "passt" else {"predictor.weight": torch.zeros(9, 32)}
    model = module.from_official({k: v.half() for k, v in (good | heads).items()}, "f", 2)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_beats_of_another_form_is_refused(golden):
    g = golden("beats")
    with pytest.raises(CheckpointError, match="BEATs with deep_norm False; only True is supported"):
        beats.from_official(official.weights(g, "w/"), "f", config=official.beats_config(g) | {"deep_norm": False})


def test_passt_of_an_unknown_stride_is_refused(golden):
    state = official.weights(golden("passt"), "stride10/w/")
    state["freq_new_pos_embed"] = torch.zeros(1, 32, 13, 1)
    with pytest.raises(CheckpointError, match="PaSST with 13 rows of patches; expected one of 12, "):
        passt.from_official(state, "f", 2)


def test_the_names_and_shapes_are_the_official_ones_at_full_size():
    with torch.device("meta"):
        small, large = passt.Passt(), beats.Beats()
    shapes = {name: tuple(t.shape) for name, t in small.state_dict().items()}
    assert shapes["patch_embed.proj.weight"] == (768, 1, 16, 16)
    assert shapes["time_new_pos_embed"] == (1, 768, 1, 99)
    assert shapes["freq_new_pos_embed"] == (1, 768, 12, 1)
    assert shapes["blocks.11.mlp.fc1.weight"] == (3072, 768)
    assert len(shapes) == 5 + 2 + 12 * 12 + 2
    shapes = {name: tuple(t.shape) for name, t in large.state_dict().items()}
    assert shapes["patch_embedding.weight"] == (512, 1, 16, 16)
    assert shapes["encoder.pos_conv.0.weight_v"] == (768, 48, 128)
    assert shapes["encoder.pos_conv.0.weight_g"] == (1, 1, 128)
    assert shapes["encoder.layers.11.self_attn.relative_attention_bias.weight"] == (320, 12)
    assert shapes["encoder.layers.0.self_attn.grep_linear.weight"] == (8, 64)
    # Per layer: attention 8 + gate 3 + table 1, two norms 4, MLP 4.
    assert len(shapes) == 1 + 2 + 2 + 3 + 2 + 12 * 20


def test_options_that_an_encoder_does_not_have(golden, tmp_path):
    path = official.beats_file(golden("beats"), tmp_path)
    with pytest.raises(ConfigError, match="'beats' has no option weights; leave it out"):
        load_encoder(f"beats:{path}", "cpu", weights="teacher")
    with pytest.raises(ConfigError, match="'beats:' ends with its colon"):
        load_encoder("beats:", "cpu")  # not an untrained one, where a shell variable was empty
    with pytest.raises(ConfigError, match="has no option num_heads, compile"):
        load_encoder("logmel-stats", "cpu", num_heads=2, compile=True)
    assert checkpoint.load(path)[1]["cfg"]["max_distance"] == 128
