"""CNN14 against the method written out anew: Fourier transform as convolutions, librosa's mel formula, plain layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from matpac_fast import load_encoder
from matpac_fast.errors import CheckpointError
from matpac_fast.zoo import cnn14
from tests.zoo.official import noise

CHANNELS = (4, 4, 6, 6, 8, 16)


def mel_filters(n_fft: int = 1024, n_mels: int = 64, rate: int = 32_000, low: float = 50, high: float = 14_000):
    """Slaney's mel filters of unit area, bin by bin: (n_fft // 2 + 1, n_mels)."""

    def to_mel(hz: float) -> float:
        return hz / (200 / 3) if hz < 1000 else 15 + math.log(hz / 1000) / (math.log(6.4) / 27)

    def to_hz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

    edges = [to_hz(m) for m in np.linspace(to_mel(low), to_mel(high), n_mels + 2)]
    filters = np.zeros((n_fft // 2 + 1, n_mels))
    for k in range(n_fft // 2 + 1):
        hz = k * rate / n_fft
        for m in range(n_mels):
            left, middle, right = edges[m : m + 3]
            height = min((hz - left) / (middle - left), (right - hz) / (right - middle))
            filters[k, m] = max(0.0, height) * 2 / (right - left)
    return torch.from_numpy(filters).float()


def official_state(channels: tuple[int, ...] = CHANNELS, n_fft: int = 1024) -> dict[str, Tensor]:
    """Names and shapes of Cnn14_mAP=0.431.pth, at random."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def norm(name: str, n: int) -> dict[str, Tensor]:
        return {
            f"{name}.weight": 1 + random(n, scale=0.1),
            f"{name}.bias": random(n, scale=0.1),
            f"{name}.running_mean": random(n, scale=0.1),
            f"{name}.running_var": 1 + random(n, scale=0.1).abs(),
            f"{name}.num_batches_tracked": torch.tensor(7),
        }

    time, bins = torch.arange(n_fft, dtype=torch.float64), torch.arange(n_fft // 2 + 1, dtype=torch.float64)
    window = 0.5 - 0.5 * torch.cos(2 * torch.pi * time / n_fft)
    angle = 2 * torch.pi * bins[:, None] * time / n_fft
    state = {
        "spectrogram_extractor.stft.conv_real.weight": (angle.cos() * window)[:, None].float(),
        "spectrogram_extractor.stft.conv_imag.weight": (-angle.sin() * window)[:, None].float(),
        "logmel_extractor.melW": mel_filters(n_fft),
        **norm("bn0", 64),
    }
    state["bn0.running_mean"] -= 20  # decibels
    state["bn0.running_var"] *= 100
    for i, (a, b) in enumerate(zip((1, *channels), channels, strict=False)):
        block = f"conv_block{i + 1}"
        state[f"{block}.conv1.weight"] = random(b, a, 3, 3, scale=(2 / 9 / a) ** 0.5)
        state[f"{block}.conv2.weight"] = random(b, b, 3, 3, scale=(2 / 9 / b) ** 0.5)
        state |= norm(f"{block}.bn1", b) | norm(f"{block}.bn2", b)
    c = channels[-1]
    state |= {"fc1.weight": random(c, c, scale=c**-0.5), "fc1.bias": random(c, scale=0.1)}
    return state | {"fc_audioset.weight": random(527, c), "fc_audioset.bias": random(527)}


def slow(state: dict[str, Tensor], waves: Tensor) -> Tensor:
    """(N, S) -> (N, E) as the official forward pass does it."""

    def norm(x: Tensor, name: str) -> Tensor:
        w = [state[f"{name}.{part}"].double() for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *w)

    x = F.pad(waves.double()[:, None], (512, 512), mode="reflect")
    parts = [state[f"spectrogram_extractor.stft.conv_{part}.weight"].double() for part in ("real", "imag")]
    power = sum(F.conv1d(x, kernel, stride=320).square() for kernel in parts)  # (N, bins, T)
    mel = 10 * torch.log10(torch.clamp(power.transpose(1, 2) @ state["logmel_extractor.melW"].double(), min=1e-10))
    x = norm(mel.transpose(1, 2), "bn0").transpose(1, 2)[:, None]
    for i in range(6):
        for j in (1, 2):
            block = f"conv_block{i + 1}"
            x = F.relu(norm(F.conv2d(x, state[f"{block}.conv{j}.weight"].double(), padding=1), f"{block}.bn{j}"))
        x = F.avg_pool2d(x, 2) if i < 5 else x
    x = x.mean(3)
    x = x.max(2).values + x.mean(2)
    return F.relu(F.linear(x, state["fc1.weight"].double(), state["fc1.bias"].double()))


@pytest.fixture
def file(tmp_path):
    # The official file has the sampler's numpy arrays beside the model.
    sampler = {"pointers": np.arange(5), "random_state": np.float64(0.5), "queue": [np.int64(3)]}
    path = tmp_path / "Cnn14.pth"
    torch.save({"iteration": 600_000, "model": official_state(), "sampler": sampler}, path)
    return path


def test_embeddings_are_those_of_the_method(file):
    encoder = load_encoder(f"cnn14:{file}", "cpu")
    assert isinstance(encoder, cnn14.Cnn14)
    assert load_encoder(file, "cpu").id == encoder.id
    for seconds in (0.31, 1.0, 2.345):
        waves = noise(2, round(seconds * 32_000))
        waves[1, 5_000:] = 0  # silence is at the floor
        want = slow(official_state(), waves)
        assert want.std() > 0.1
        torch.testing.assert_close(encoder.embed(waves, 32_000).values[:, 0].double(), want, rtol=0, atol=5e-6)


def test_filters_are_librosas(file):
    encoder = load_encoder("cnn14", "cpu")
    torch.testing.assert_close(encoder.logmel_extractor.melW, mel_filters(), rtol=0, atol=1e-7)


def test_names_and_shapes_are_the_official_ones():
    state = {k: v for k, v in official_state().items() if not k.startswith(("spectrogram_extractor", "fc_audioset"))}
    with torch.device("meta"):
        full = cnn14.Cnn14()
    assert set(full.state_dict()) == set(state)
    assert full.state_dict()["conv_block6.conv2.weight"].shape == (2048, 2048, 3, 3)
    assert full.state_dict()["fc1.weight"].shape == (2048, 2048)
    assert full.embedding_dim == 2048


def test_files_that_do_not_fit_are_refused():
    good = official_state()
    stft = "spectrogram_extractor.stft.conv_real.weight"
    for state, line in (
        ({k: v for k, v in good.items() if k != "fc1.bias"}, r"1 missing: fc1\.bias"),
        ({k: v for k, v in good.items() if k != stft}, "1 missing: spectrogram_extractor"),
        (good | {"att.weight": torch.zeros(1)}, r"1 unexpected: att\.weight"),
        (good | {stft: good[stft] * 0.9}, "is not the Fourier transform of 1024 samples under a Hann"),
        (official_state(n_fft=512), r"\(257, 1, 512\) is not the Fourier .*only CNN14 at 32 kHz is supported"),
        ({"x": torch.zeros(1)}, r"f: not a CNN14 checkpoint \('conv_block1.conv1.weight'\); its first names are x"),
    ):
        with pytest.raises(CheckpointError, match=line):
            cnn14.from_official(state, "f")


def test_a_module_around_it_that_trains_leaves_it_as_it_is(file):
    encoder = load_encoder(f"cnn14:{file}", "cpu")
    waves = noise(2, 20_000) * torch.tensor([[1.0], [0.1]])
    want, known = encoder.embed(waves, 32_000).values, encoder.id
    probe = torch.nn.Sequential(encoder, torch.nn.Dropout()).train()
    assert probe[1].training
    assert torch.equal(encoder.embed(waves, 32_000).values, want)
    assert encoder.id == known
    # Fine-tuned, its batch norm has gradients, and the statistics that it had.
    encoder.requires_grad_()
    encoder.train().embed_windows(waves).sum().backward()
    assert encoder.bn0.weight.grad.abs().max() > 0
    assert torch.equal(encoder.embed(waves, 32_000).values, want)
