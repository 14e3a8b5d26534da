"""An encoder as a layer that is fine-tuned: its forward pass, whose autocast it obeys, DDP, and what it refuses."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn

from matpac_fast import AudioEncoder, load_encoder, use_backend
from matpac_fast.errors import AudioError, ConfigError
from matpac_fast.vit_encoder import Encoder

SECOND = 16_000


def make() -> Encoder:
    torch.manual_seed(0)
    return Encoder(n_frames=64, width=32, depth=2, num_heads=2)


@pytest.fixture
def encoder() -> Encoder:
    return make()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 10


def gradients(module: nn.Module, waves: Tensor, autocasts: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """What comes out, and the gradients of a loss that weighs every number of it differently."""
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        out = module(waves)
    (out * noise(*out.shape, seed=1)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_the_forward_pass_is_embed_windows(encoder):
    waves = noise(3, 9_000)
    want = encoder.embed_windows(waves)
    assert want.shape == (3, 160)
    assert torch.equal(encoder(waves), want)
    assert torch.equal(want, encoder.embed(waves, SECOND).values[:, 0])
    head = nn.Linear(160, 5)
    assert torch.equal(nn.Sequential(encoder, head).train()(waves), head(want))


@pytest.mark.parametrize(
    ("pool", "layers", "shape"),
    [("mean", "all", (3, 2, 160)), ("none", "last", (3, 4, 160)), ("none", "all", (3, 2, 4, 160))],
)
def test_windows_by_frames_and_layers_are_those_of_embed(encoder, pool, layers, shape):
    waves = noise(3, 9_000)  # four frames, and two layers
    found = encoder.embed_windows(waves, pool=pool, layers=layers)
    assert found.shape == shape
    want = encoder.embed(waves, SECOND, pool=pool, layers=layers).values  # (N, T, [L,] E)
    assert torch.equal(found, want.transpose(1, 2).reshape(shape) if layers == "all" else want)


def test_windows_go_through_the_network_as_many_at_a_time_as_is_said(encoder, monkeypatch):
    sizes, forward = [], Encoder.forward_groups

    def counted(self: Encoder, groups: list[Tensor], *options: str) -> list[Tensor]:
        sizes.append(sum(map(len, groups)))
        return forward(self, groups, *options)

    monkeypatch.setattr(Encoder, "forward_groups", counted)
    encoder.embed_windows(noise(5, 1_600), batch_size=2)
    assert sizes == [2, 2, 1]


def test_gradients_are_off_until_they_are_asked_for(encoder, tmp_path):
    encoder.save(tmp_path / "e.safetensors")
    loaded = load_encoder(tmp_path / "e.safetensors", "cpu")
    assert not loaded(noise(1, 9_000)).requires_grad
    _, found = gradients(loaded.requires_grad_(), noise(1, 9_000), False)
    assert found.keys() == dict(loaded.named_parameters()).keys()
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    waves = noise(1, 9_000).requires_grad_()
    encoder(waves).sum().backward()
    assert waves.grad is not None
    assert waves.grad.abs().max() > 0


def test_a_copy_is_trained_alone(encoder):
    waves = noise(2, 9_000)
    want = encoder.requires_grad_()(waves)
    other = copy.deepcopy(encoder)
    assert torch.equal(other(waves), want)
    gradients(other, waves, False)
    with torch.no_grad():
        for p in other.parameters():
            p -= 0.1 * p.grad
    assert (other(waves) - want).abs().max() > 1e-3
    assert torch.equal(encoder(waves), want)


def test_products_are_the_callers_and_the_log_mel_is_exact(encoder):
    waves = noise(3, 9_000)
    plain, exact = gradients(encoder.requires_grad_(), waves, False)
    near, found = gradients(encoder, waves, True)
    assert near.dtype == torch.float32
    assert 1e-4 < (near - plain).abs().max() / plain.std() < 0.1
    assert found.keys() == exact.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact[name]).norm() < 0.05 * exact[name].norm(), name
    assert not torch.equal(found["student.blocks.0.mlp.fc1.weight"], exact["student.blocks.0.mlp.fc1.weight"])

    specs, products = [], []
    encoder.frontend.register_forward_pre_hook(lambda _, inputs: specs.append(inputs[0]))
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda *args: products.append(args[2].dtype))
    with use_backend("reference"):  # a kernel's log-mel would be exact anyway
        gradients(encoder, waves, False)
        assert set(products) == {torch.float32}
        products.clear()
        gradients(encoder, waves, True)
    assert products == [torch.bfloat16] * 8
    assert specs[1].dtype == torch.float32
    assert torch.equal(specs[1], specs[0])


def test_inference_is_out_of_the_callers_autocast(encoder):
    encoder.requires_grad_()
    waves = noise(3, 9_000)

    def inferred() -> list[Tensor]:
        clips = [encoder.embed(waves, SECOND, 0.3), *encoder.embed_many(waves, SECOND, 0.3, pool="none")]
        streams = [encoder.stream(SECOND, support).over(waves.flatten().split(5_000)) for support in (0.3, None)]
        with torch.no_grad():
            return [*(found.values for found in [*clips, *streams[0], *streams[1]]), encoder(waves)]

    want = inferred()
    with torch.autocast("cpu", torch.bfloat16):
        found = inferred()
        assert not torch.equal(encoder(waves), want[-1])
    assert len(found) == len(want) > 8
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "prepare"])
def test_other_weights_than_float32_keep_their_products(encoder, change):
    encoder = encoder.prepare(torch.bfloat16) if change == "prepare" else getattr(encoder, change)()
    waves = noise(3, 9_000)
    want = encoder(waves)
    with torch.autocast("cpu", torch.float16 if change == "prepare" else torch.bfloat16):
        assert torch.equal(encoder(waves), want)


class Products(AudioEncoder):
    """One that is written without a thought of autocast."""

    name, embedding_dim, settings = "products", 4, {"kind": "products"}

    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        return (pieces @ torch.ones(pieces.shape[1], 4)).float()[:, None]


@pytest.mark.parametrize("told", [False, True])
def test_an_encoder_of_ones_own_is_autocast_where_it_says_so(told):
    encoder, waves = Products(), noise(2, 100)
    encoder.autocasts = told
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(waves)
        rounded = (waves @ torch.ones(100, 4)).float()
    assert torch.equal(found, rounded if told else waves @ torch.ones(100, 4))


class Own(AudioEncoder):
    """Mean and peak of frames of a tenth of a second."""

    name, sample_rate, embedding_dim, frame_samples, settings = "own", 1_000, 2, 100, {"kind": "own"}

    def columns(self, n_samples: int) -> list[int]:
        return [n_samples // 100]

    def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
        frames = pieces.unfold(1, 100, 100)
        frames = torch.stack([frames.mean(2), frames.amax(2)], 2)[:, None]
        return frames if pool == "none" else frames.sum(2)


@pytest.mark.parametrize(
    ("columns", "pool", "message"),
    [
        ([11], "none", r"own: forward_pieces gave 10 frames for a piece, and columns \(or rows\) says 11"),
        ([9], "none", r"own: forward_pieces gave 10 frames for a piece, and columns \(or rows\) says 9"),
        ([10, 10], "none", r"own: pieces gave 3 for 3 windows, and columns \(or rows\) lists 6"),
        ([10, 10], "mean", r"own: pieces gave 3 for 3 windows, and columns \(or rows\) lists 6"),
        ([], "none", r"own: pieces gave 3 for 3 windows, and columns \(or rows\) lists 0"),
        ([], "mean", r"own: pieces gave 3 for 3 windows, and columns \(or rows\) lists 0"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 16])
def test_pieces_and_frames_are_as_many_as_columns_says(monkeypatch, columns, pool, message, batch_size):
    monkeypatch.setattr(Own, "columns", lambda self, n_samples: columns)
    with pytest.raises(ConfigError, match=message):
        Own().embed(noise(3_000), 1_000, 1.0, pool=pool, batch_size=batch_size)


def test_a_window_without_pieces_is_told(monkeypatch):
    monkeypatch.setattr(Own, "columns", lambda self, n_samples: [])
    monkeypatch.setattr(Own, "pieces", lambda self, clip, spans: iter(()))
    with pytest.raises(ConfigError, match="own: pieces gave 0 for 1 windows, .* expected of each window a piece"):
        Own().embed(noise(1_000), 1_000)


def test_a_window_too_short_for_a_frame_has_none():
    class Short(Own):
        def forward_pieces(self, pieces: Tensor, pool: str, layers: str) -> Tensor:
            if pieces.shape[1] < 100:
                return pieces.new_zeros(len(pieces), 1, 0, 2)
            return super().forward_pieces(pieces, pool, layers)

    assert Short().embed(noise(1_050), 1_000, 0.5, pool="none", batch_size=1).values.shape == (10, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_are_float32_whatever_the_network_gives(monkeypatch, dtype):
    want, forward = Own().embed(noise(3_000), 1_000).values, Own.forward_pieces
    monkeypatch.setattr(Own, "forward_pieces", lambda self, *given: forward(self, *given).to(dtype))
    torch.testing.assert_close(Own().embed(noise(3_000), 1_000).values, want, rtol=0.01, atol=0)
    assert Own()(noise(2, 1_000)).dtype == torch.float32


@pytest.mark.parametrize(
    ("gives", "named"),
    [
        (lambda found: None, "a NoneType"),
        (lambda found: found.numpy(), "a ndarray"),
        (lambda found: found.long(), "torch.int64"),
    ],
)
def test_what_is_no_embedding_is_named(monkeypatch, gives, named):
    forward = Own.forward_pieces
    monkeypatch.setattr(Own, "forward_pieces", lambda self, *given: gives(forward(self, *given)))
    with pytest.raises(ConfigError, match=f"own: forward_pieces gave {named}; expected a floating-point tensor"):
        Own().embed(noise(3_000), 1_000)


@pytest.mark.parametrize("settings", [None, [1], {"bands": {"low", "high"}}, {"by": object()}, {1: 0, "a": 0}])
def test_settings_are_the_same_in_every_process(settings):
    encoder = Own()
    assert len(encoder.id) == 64
    encoder.settings = settings
    with pytest.raises(ConfigError, match="own: settings is .*; expected a dict, which JSON can hold"):
        _ = encoder.id


def test_an_encoder_without_settings_has_no_id():
    class Bare(AudioEncoder):
        embedding_dim = 1

    with pytest.raises(ConfigError, match="encoder: settings is None; expected a dict"):
        _ = Bare().id


@pytest.mark.parametrize(
    "given",
    [
        lambda pcm: pcm,
        lambda pcm: pcm.numpy(),
        lambda pcm: pcm.numpy().astype(">i2"),
        lambda pcm: (pcm / 32768).double().numpy(),
        lambda pcm: (pcm / 32768).half(),
    ],
)
def test_windows_of_any_dtype_that_embed_takes(encoder, given):
    pcm = (noise(2, 9_000) * 2048).to(torch.int16)  # of few enough bits for any
    want = encoder.embed(pcm, SECOND).values[:, 0]
    assert torch.equal(encoder(given(pcm)), want)


@pytest.mark.parametrize(
    ("waves", "message"),
    [
        (torch.zeros(800), r"embed_windows: waves is \(800,\); expected \(B, S\), mono: give wave\[None\]"),
        (np.zeros(800), r"embed_windows: waves is \(800,\); expected \(B, S\), mono: give wave\[None\]"),
        (torch.tensor(0.0), r"embed_windows: waves is \(\); expected \(B, S\)"),
        (torch.zeros(2, 2, 800), r"waves is \(2, 2, 800\); expected \(B, S\), mono: mix channels down first"),
        (torch.zeros(800, 2), r"waves is \(800, 2\), which looks like samples by channels"),
        (torch.zeros(0, 800), r"waves is \(0, 800\): no audio"),
        (torch.zeros(2, 800, dtype=torch.int64), r"waves is torch.int64; expected float or int16"),
        (np.zeros((2, 800), np.uint8), r"waves is uint8; expected float or int16"),
        ([0.0, 0.1], "waves is a list; expected a tensor or array"),
        ("clip.flac", "waves is a str; expected a tensor or array"),
    ],
)
def test_what_is_no_windows_is_named(encoder, waves, message):
    for call in (encoder, encoder.embed_windows):
        with pytest.raises(AudioError, match=message):
            call(waves)


def test_options_that_cannot_be(encoder):
    with pytest.raises(ConfigError, match="pool is 'max'; expected 'mean' or 'none'"):
        encoder.embed_windows(noise(1, 800), pool="max")


def in_ddp(rank: int) -> list[float]:
    """The largest error of each step's gradients against those of one process with all the windows."""
    dist.init_process_group("gloo")
    encoder, waves = make().requires_grad_(), noise(4, 9_000)
    ddp, alone = nn.parallel.DistributedDataParallel(encoder), copy.deepcopy(encoder)
    errors = []
    for autocasts in (False, True, True):  # what has no gradient in one step is an error in the next
        for module, mine in ((ddp, waves[rank::2]), (alone, waves)):
            module.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
                out = module(mine)
            out.square().mean().backward()
        pairs = zip(encoder.parameters(), alone.parameters(), strict=True)
        errors.append(max(float((p.grad - q.grad).abs().max() / q.grad.abs().max()) for p, q in pairs))
    dist.destroy_process_group()
    return errors


def test_two_ranks_have_the_gradients_of_one():
    answers = on_ranks(2, in_ddp)
    assert answers[0] == answers[1]
    assert answers[0][0] < 1e-4, answers
    assert max(answers[0][1:]) < 0.05, answers
