"""Encoder: windows, pooling, layers, batching, loading; and the official package's outputs."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from matpac_fast import checkpoint, get_matpac, list_encoders, load_encoder
from matpac_fast.errors import AudioError, CheckpointError, ConfigError
from matpac_fast.model import Matpac, MatpacConfig
from matpac_fast.vit_encoder import Encoder

TINY = dict(n_frames=64, width=32, depth=2, num_heads=2, predictor_width=24, predictor_depth=1, predictor_heads=2)
TINY |= dict(head_hidden=40, head_bottleneck=16, prototypes=24)
SECOND = 16_000


@pytest.fixture(scope="module")
def model() -> Matpac:
    return Matpac(MatpacConfig(**TINY))


@pytest.fixture
def encoder(model: Matpac, tmp_path) -> Encoder:
    model.save(tmp_path / "model.safetensors")
    return load_encoder(tmp_path / "model.safetensors", "cpu")


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="module")
def released(golden, tmp_path_factory) -> str:
    """The golden encoder as the official project releases its files: a torch file of plain tensors."""
    path = tmp_path_factory.mktemp("released") / "a_file_whose_name_says_nothing.pt"
    torch.save({name[2:]: value for name, value in golden("infer").items() if name.startswith("w/")}, path)
    return str(path)


@pytest.mark.parametrize("layout", ["concat", "sequence"])
@pytest.mark.parametrize("pool", ["pooled", "frames"])
@pytest.mark.parametrize("kind", ["precise", "fast"])
@pytest.mark.parametrize("clip", ["short", "exact", "odd", "long"])
def test_equals_the_official_package(golden, released, clip, kind, pool, layout):
    g = golden("infer")
    model = get_matpac(released, kind, pool == "pooled", layout == "concat", num_heads=2, device="cpu")
    emb, layers = model(g[f"{clip}/wave"])
    for got, name in ((emb, "emb"), (layers, "layers")):
        want = g[f"{clip}/{kind}/{pool}/{layout}/{name}"]
        if (kind, pool) == ("fast", "frames"):
            # The official fast path interleaves the chunks; ours is in time order.
            tokens = 6 if layout == "concat" else 30
            want = want.unflatten(-2, (tokens, -1)).transpose(-3, -2).flatten(-3, -2)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-6)


def test_one_embedding_a_clip_is_the_official_precise_one(golden, released):
    g = golden("infer")
    encoder = load_encoder(released, "cpu", num_heads=2)
    got = encoder.embed(g["long/wave"], SECOND)
    torch.testing.assert_close(got.values[:, 0], g["long/precise/pooled/concat/emb"], rtol=1e-5, atol=5e-6)
    every = encoder.embed(g["long/wave"], SECOND, layers="all")
    torch.testing.assert_close(every.values[:, 0], g["long/precise/pooled/concat/layers"], rtol=1e-5, atol=5e-6)
    frames = encoder.embed(g["long/wave"], SECOND, pool="none")
    torch.testing.assert_close(frames.values, g["long/precise/frames/concat/emb"], rtol=1e-5, atol=5e-6)
    assert len(frames) == frames.values.shape[1] == 19


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("pool", ["mean", "none"])
def test_a_window_is_the_clip_cut_to_it(encoder, pool, layers):
    wave = noise(int(2.7 * SECOND))
    got = encoder.embed(wave, SECOND, temporal_support=0.5, hop=0.4, pool=pool, layers=layers, batch_size=3)
    spans = [(0.4 * i, 0.4 * i + 0.5) for i in range(6)] + [(2.4, 2.7)]
    cut = [
        encoder.embed(wave[round(a * SECOND) : round(b * SECOND)], SECOND, pool=pool, layers=layers) for a, b in spans
    ]
    torch.testing.assert_close(got.values, torch.cat([c.values for c in cut]), rtol=1e-5, atol=1e-6)
    assert got.values.shape[1:] == ((2, 160) if layers == "all" else (160,))
    if pool == "mean":
        np.testing.assert_allclose(got.start, [a for a, _ in spans])
        np.testing.assert_allclose(got.end, [b for _, b in spans])
    else:
        assert len(got) == got.values.shape[0]
        np.testing.assert_allclose(got.start[:4], [0.0, 0.16, 0.32, 0.4])
        np.testing.assert_allclose(got.end[[2, -1]], [0.48, 2.7])  # its third frame does not reach 0.5


def test_batches_and_batch_sizes_change_nothing(encoder):
    clips = torch.stack([noise(20_000, seed) for seed in range(3)])
    together = encoder.embed(clips, SECOND, temporal_support=0.3, batch_size=64)
    alone = [encoder.embed(clip, SECOND, temporal_support=0.3, batch_size=1).values for clip in clips]
    torch.testing.assert_close(together.values, torch.stack(alone), rtol=1e-5, atol=1e-6)


def test_on_a_cpu_few_tokens_go_through_the_network_at_a_time(encoder, monkeypatch):
    groups = [torch.randn(n, 80, frames) for n, frames in ((5, 64), (1, 16), (7, 48))]
    tokens = [1 + encoder.freq * spec.shape[-1] // 16 for spec in groups]
    hidden = 4 * encoder.sizes["width"] * encoder.sizes["mlp_ratio"]
    whole = encoder.forward_groups(groups, "mean", "all")
    for most in (1, 40, 100, 1000):
        monkeypatch.setattr("matpac_fast.vit_encoder._HIDDEN_BYTES", most * hidden)
        portions = list(encoder._portions(groups, 4))
        sizes = [sum(tokens[i] * (some.stop - some.start) for i, some in portion) for portion in portions]
        assert max(sizes) < most + max(tokens)
        assert (len(sizes) == 1) == (most == 1000)
        pieces = [(i, n) for portion in portions for i, some in portion for n in range(some.start, some.stop)]
        assert pieces == [(i, n) for i, spec in enumerate(groups) for n in range(len(spec))]
        for parts, found in zip(whole, encoder.forward_groups(groups, "mean", "all"), strict=True):
            torch.testing.assert_close(found, parts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("remainder", "ends"), [("keep", 1.25), ("pad", 1.25), ("merge", 1.25), ("drop", 1.0)])
def test_remainders(encoder, remainder, ends):
    wave = noise(20_000)
    got = encoder.embed(wave, SECOND, temporal_support=0.5, remainder=remainder)
    assert float(got.end[-1]) == ends
    if remainder == "pad":
        padded = torch.cat([wave[16_000:], torch.zeros(4_000)])
        torch.testing.assert_close(got.values[-1], encoder.embed(padded, SECOND).values[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 48, 399, 400, 401])
def test_the_shortest_audio_is_padded_with_zeros(encoder, n):
    wave = noise(n)
    got = encoder.embed(wave, SECOND, temporal_support=2.0)
    whole = torch.cat([wave, torch.zeros(max(0, 400 - n))])
    assert torch.equal(got.values, encoder.embed(whole, SECOND).values)
    assert float(got.end[0]) == n / SECOND


def test_inputs_of_every_kind_agree(encoder):
    wave = (noise(9_000) * 32768).round().clamp(-32768, 32767)
    pcm = wave.to(torch.int16)
    want = encoder.embed(wave / 32768, SECOND).values
    assert torch.equal(encoder.embed(pcm, SECOND).values, want)
    assert torch.equal(encoder.embed(pcm.numpy(), SECOND).values, want)
    assert torch.equal(encoder.embed((wave / 32768).double().numpy(), SECOND).values, want)


def test_hooked_and_wrapped_blocks_are_called(encoder):
    waves = [noise(40_000), noise(23_456)]
    plain = encoder.embed(waves, 16_000, layers="all")
    seen = []
    blocks = encoder.student.blocks
    hook = blocks[0].register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    blocks[1].forward = lambda x, first_query=0, forward=blocks[1].forward: forward(x, first_query)
    blocks[-1] = torch.nn.Sequential(blocks[-1])
    for got, want in zip(encoder.embed(waves, 16_000, layers="all"), plain, strict=True):
        np.testing.assert_allclose(got.values, want.values, rtol=1e-4, atol=1e-5)
    assert {len(shape) for shape in seen} == {3}  # (B, N, D)
    hook.remove()


@pytest.mark.parametrize("cast", [lambda e: e.half(), lambda e: e.to(torch.bfloat16), lambda e: e.double()])
def test_casts_of_the_weights_compute(encoder, cast):
    wave = noise(40_000)
    want = encoder.embed(wave, 16_000).values
    got = cast(encoder).embed(wave, 16_000).values
    assert np.abs(got - want).max() < 0.03 * np.abs(want).max()


def test_other_sample_rates_are_resampled(encoder):
    def tone(rate: int) -> np.ndarray:
        return np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)

    got = encoder.embed(tone(44_100), 44_100).values
    want = encoder.embed(tone(SECOND), SECOND).values
    # Resampling is not exact at the edges; the embeddings point the same way.
    assert torch.nn.functional.cosine_similarity(got, want).item() > 0.999


@pytest.mark.parametrize(
    ("wave", "options", "error", "message"),
    [
        (torch.zeros(0), {}, AudioError, "no audio"),
        (torch.full((800,), float("nan")), {}, AudioError, "NaN or infinite"),
        (torch.zeros(2, 2, 800), {}, AudioError, "mix channels down first"),
        (torch.zeros(800, dtype=torch.int64), {}, AudioError, "float or int16"),
        (torch.zeros(800), {"pool": "max"}, ConfigError, "pool is 'max'; expected 'mean' or 'none'"),
        (torch.zeros(800), {"layers": "first"}, ConfigError, "expected 'last' or 'all'"),
        (torch.zeros(800), {"temporal_support": 0.0}, ConfigError, "temporal_support is 0.0 s"),
        (torch.zeros(800), {"temporal_support": float("nan")}, ConfigError, "temporal_support is nan s"),
        (torch.zeros(800), {"hop": -1.0}, ConfigError, "hop is -1.0 s"),
        (torch.zeros(800), {"remainder": "lose"}, ConfigError, "remainder is 'lose'"),
    ],
)
def test_bad_input_is_named(encoder, wave, options, error, message):
    with pytest.raises(error, match=message):
        encoder.embed(wave, SECOND, **options)


def test_saved_encoders_are_the_same(encoder, model, tmp_path):
    encoder.save(tmp_path / "e.safetensors")
    again = load_encoder(tmp_path / "e.safetensors", "cpu")
    assert again.id == encoder.id
    teacher = load_encoder(tmp_path / "model.safetensors", "cpu", weights="teacher")
    assert teacher.id != encoder.id
    assert torch.equal(teacher.student.norm.weight, model.teacher.norm.weight)


def test_encoders_load_from_official_training_checkpoints(model, tmp_path):
    torch.save({"args": None, "model": model.official_state_dict(), "extra_state": {"epoch": 3}}, tmp_path / "x.pt")
    encoder = load_encoder(tmp_path / "x.pt", "cpu", num_heads=2)
    assert torch.equal(encoder.student.blocks[1].mlp.fc2.weight, model.student.blocks[1].mlp.fc2.weight)


def test_untrained_encoders_have_names():
    known = {"untrained-tiny", "untrained-small", "untrained-base", "untrained-large"}
    assert known <= set(list_encoders("untrained-*"))
    assert list_encoders("*tiny") == ["untrained-tiny"]
    assert load_encoder("random-init", "cpu").embedding_dim == 960
    encoder = load_encoder("untrained-tiny", "cpu")
    assert encoder.embedding_dim == 960
    assert encoder.embed(noise(8_000), SECOND).values.shape == (1, 960)


def test_what_is_no_encoder_says_so(tmp_path):
    with pytest.raises(
        CheckpointError, match="no encoder 'nothing': neither a file nor one of matpac-nano, untrained-nano"
    ):
        load_encoder("nothing")
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"not a checkpoint of MATPAC or M2D; its first names are a\.weight"):
        load_encoder(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="a folder without a checkpoint"):
        load_encoder(tmp_path)


def test_the_official_head_and_probes(golden, released, tmp_path, monkeypatch):
    g = golden("infer")
    with pytest.raises(CheckpointError, match=r"no AudioSet head: head\.weight"):
        get_matpac(released, as_class_head=True, num_heads=2)

    generator = torch.Generator().manual_seed(0)
    head = {
        "head.weight": torch.randn(527, 32, generator=generator),
        "head.bias": torch.randn(527, generator=generator),
        "head_norm.running_mean": torch.randn(32, generator=generator),
        "head_norm.running_var": torch.rand(32, generator=generator) + 0.5,
    }
    torch.save({**checkpoint.load(released)[0], **head}, tmp_path / "with_head.pt")
    read, load = [], checkpoint.load
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "load", lambda path: read.append(path) or load(path))
        model = get_matpac(tmp_path / "with_head.pt", as_class_head=True, num_heads=2, device="cpu")
    assert len(read) == 1  # for the encoder and the head
    probs, labels = model.probe_forward(g["odd/wave"])
    # Padding is averaged in, as in the sequence layout: every piece's tokens weigh the same.
    emb = g["odd/precise/pooled/sequence/emb"]
    norm = (emb - head["head_norm.running_mean"]) / torch.sqrt(head["head_norm.running_var"] + 1e-5)
    logits = norm @ head["head.weight"].T + head["head.bias"]
    torch.testing.assert_close(probs, logits.sigmoid(), rtol=1e-4, atol=1e-5)
    assert labels[0][0] == f"{int(probs[0].argmax())} ({float(probs[0].max()):.2f})"

    single = get_matpac(tmp_path / "with_head.pt", as_class_head=True, num_heads=2, device="cpu", multi_label=False)
    torch.testing.assert_close(single.probe_forward(g["odd/wave"])[0], logits.softmax(-1), rtol=1e-4, atol=1e-5)

    again = get_matpac(f"matpac:{tmp_path}/with_head.pt", as_class_head=True, num_heads=2, device="cpu")
    assert torch.equal(again.probe_forward(g["odd/wave"].double())[0], probs)
    with pytest.raises(CheckpointError, match=r"matpac-nano: no AudioSet head: head\.weight"):
        get_matpac("matpac-nano", as_class_head=True, device="cpu")
    with pytest.raises(ConfigError, match="are two heads; expected one"):
        get_matpac(released, as_class_head=True, probe_checkpoint_paths="probe.pth")
    for told in ({"class_names": ["a"]}, {"multi_label": False}):
        with pytest.raises(ConfigError, match=f"{next(iter(told))} without a head"):
            get_matpac(released, **told)

    probe = {"weight": torch.randn(50, 160, generator=generator), "bias": torch.zeros(50)}
    torch.save(probe, tmp_path / "probe.pth")
    with pytest.raises(ConfigError, match="50 classes do not tell"):
        get_matpac(released, probe_checkpoint_paths=tmp_path / "probe.pth", num_heads=2)
    names = np.array([f"class {i}" for i in range(50)])
    model = get_matpac(
        released, probe_checkpoint_paths=tmp_path / "probe.pth", num_heads=2, multi_label=False, class_names=names
    )
    probs, labels = model.probe_forward(g["odd/wave"])
    want = (g["odd/precise/pooled/concat/emb"] @ probe["weight"].T).softmax(-1)
    torch.testing.assert_close(probs, want, rtol=1e-4, atol=1e-6)
    assert labels[1][0].startswith(f"class {int(want[1].argmax())} (")


@pytest.mark.parametrize(
    ("task", "classes", "several"),
    [
        ("openmic", 20, True),
        ("fsd50k", 200, True),
        ("jamendo instrument", 40, True),
        ("jamendo mood/theme", 56, True),
        ("jamendo genre", 87, True),
        ("jamendo top 50", 50, True),
        ("magnatagatune", 50, True),
        ("esc-50", 50, False),
        ("gtzan", 10, False),
        ("urbansound8k", 10, False),
        ("nsynth", 11, False),
    ],
)
def test_all_eleven_released_probes_load(golden, released, tmp_path, task, classes, several):
    generator = torch.Generator().manual_seed(classes)
    weight, bias = torch.randn(classes, 160, generator=generator), torch.randn(classes, generator=generator)
    torch.save({"0.weight": weight, "0.bias": bias}, tmp_path / "probe.pth")
    told = {"multi_label": several} if classes == 50 else {}  # two kinds of task have 50
    model = get_matpac(released, probe_checkpoint_paths=tmp_path / "probe.pth", num_heads=2, device="cpu", **told)
    g = golden("infer")
    probs, _ = model.probe_forward(g["odd/wave"])
    logits = g["odd/precise/pooled/concat/emb"] @ weight.T + bias
    want = logits.sigmoid() if several else logits.softmax(-1)
    torch.testing.assert_close(probs, want, rtol=1e-4, atol=1e-6)


def test_an_encoder_that_cannot_be_reached_is_not_called_unknown(tmp_path, monkeypatch):
    honest, run = os.stat, str(tmp_path / "run")

    def guarded(path, *args, **rest):
        if path == run:
            raise PermissionError(13, "Permission denied")
        return honest(path, *args, **rest)

    monkeypatch.setattr(os, "stat", guarded)  # file modes do not stop root
    with pytest.raises(CheckpointError, match="run: cannot be read: Permission denied"):
        load_encoder(run)
