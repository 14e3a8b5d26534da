"""reference.log_mel and its banks against what others publish.

golden/log_mel.npz and, in golden/front_ends.npz, `passt/*` and `beats/*` are outputs of the official code of MATPAC,
PaSST and BEATs in float32. `bank/slaney` and `bank/htk` are librosa 0.11's (librosa.filters.mel in float64),
`bank/kaldi` is torchaudio 2.11's (compliance.kaldi.get_mel_banks, float32, without the Nyquist bin).
"""

from __future__ import annotations

import pytest
import torch

from matpac_fast.errors import ConfigError
from matpac_fast.reference import (
    LogMelConfig,
    hz_to_mel,
    log_mel,
    mel_bank,
    mel_to_hz,
    mel_window,
)
from matpac_fast.zoo.beats import BEATS_LOG_MEL
from matpac_fast.zoo.passt import PASST_LOG_MEL


@pytest.mark.parametrize("entry", ["noise", "chirp", "silence", "quiet", "loud", "one_frame", "odd"])
def test_float64_is_exact_and_float32_near_the_official(golden, entry):
    arrays = golden("log_mel")
    wave, exact, official = (arrays[f"{entry}/{name}"] for name in ("wave", "exact_fp64", "official_fp32"))
    assert (log_mel(wave.double()) - exact).abs().max() < 1e-11
    error = (official - exact).abs().max()
    assert (log_mel(wave) - exact).abs().max() < 2 * error


@pytest.mark.parametrize(
    ("bank", "config", "atol"),
    [
        ("slaney", LogMelConfig(), 1e-15),
        (
            "htk",
            LogMelConfig(sample_rate=22_050, n_fft=1024, win_length=1024, n_mels=40, f_min=0, f_max=11_025, bank="htk"),
            1e-13,
        ),
        ("kaldi", BEATS_LOG_MEL, 2e-5),  # torchaudio's is rounded to float32 in between
    ],
)
def test_bank_is_the_published_one(golden, bank, config, atol):
    published = golden("front_ends")[f"bank/{bank}"]
    ours = mel_bank(config)
    torch.testing.assert_close(ours[:, : published.shape[1]], published.double(), rtol=0, atol=atol)
    assert not ours[:, published.shape[1] :].any()


@pytest.mark.parametrize(
    ("entry", "name", "config"), [("passt", "mel", PASST_LOG_MEL), ("beats", "fbank", BEATS_LOG_MEL)]
)
def test_other_encoders_front_ends(golden, entry, name, config):
    arrays = golden("front_ends")
    official = arrays[f"{entry}/{name}"]
    if entry == "beats":
        official = official.transpose(1, 2)  # (B, T, n_mels) -> (B, n_mels, T)
    wave = arrays[f"{entry}/wave"]
    assert config.n_frames(wave.shape[1]) == official.shape[2]
    # Their float32 banks are 1e-5 off, ours is float64's.
    torch.testing.assert_close(log_mel(wave, config), official, rtol=0, atol=5e-5)
    torch.testing.assert_close(log_mel(wave.double(), config), official.double(), rtol=0, atol=5e-5)


def test_mel_scales():
    # librosa's documentation: hz_to_mel([110, 220, 440]), and mel_frequencies(n_mels=40)[-3:]
    hz = torch.tensor([110.0, 220.0, 440.0], dtype=torch.float64)
    torch.testing.assert_close(hz_to_mel(hz), torch.tensor([1.65, 3.3, 6.6], dtype=torch.float64))
    top = hz_to_mel(torch.tensor(11_025.0, dtype=torch.float64))
    ladder = mel_to_hz(torch.linspace(0, float(top), 40, dtype=torch.float64))[-3:]
    torch.testing.assert_close(ladder, torch.tensor([9246.028, 10096.408, 11025.0]).double(), rtol=0, atol=1e-3)
    for scale in ("slaney", "htk"):
        hz = torch.linspace(0, 16_000, 101, dtype=torch.float64)
        torch.testing.assert_close(mel_to_hz(hz_to_mel(hz, scale), scale), hz, rtol=0, atol=1e-9)
    # HTK's scale is made so that 1000 Hz are 1000 mel.
    assert float(hz_to_mel(torch.tensor(1000.0, dtype=torch.float64), "htk")) == pytest.approx(1000, abs=0.02)


@pytest.mark.parametrize("config", [LogMelConfig(), LogMelConfig(hop=37), PASST_LOG_MEL, BEATS_LOG_MEL])
def test_frames_and_samples_agree(config):
    for frames in (1, 2, 7):
        samples = config.n_samples(frames)
        assert log_mel(torch.zeros(1, samples), config).shape == (1, config.n_mels, config.n_frames(samples))
        assert config.n_frames(samples) >= frames
        assert config.n_frames(config.n_samples(1) - 1) == 0
    assert config.n_frames(config.n_samples(9)) == 9


@pytest.mark.parametrize("n_fft", [16, 17])
@pytest.mark.parametrize("framing", ["valid", "center", "kaldi"])
def test_every_length_has_the_frames_that_are_told(framing, n_fft):
    for hop in (4, 5):
        config = LogMelConfig(n_fft=n_fft, win_length=n_fft, hop=hop, n_mels=2, framing=framing)
        for samples in range(1, 60):
            if (n := config.n_frames(samples)) > 0:
                assert log_mel(torch.zeros(1, samples), config).shape[2] == n, (hop, samples)
        assert all(config.n_frames(config.n_samples(n)) >= n for n in range(1, 9))
        assert all(config.n_frames(config.n_samples(n) - 1) < n for n in range(1, 9))


def test_windows():
    assert torch.equal(mel_window(LogMelConfig()), torch.hann_window(400, dtype=torch.float64))
    passt = mel_window(PASST_LOG_MEL)
    torch.testing.assert_close(passt, passt.flip(0), rtol=0, atol=1e-15)
    assert torch.equal(passt[112:912], torch.hann_window(800, periodic=False, dtype=torch.float64))
    assert not mel_window(BEATS_LOG_MEL)[400:].any()


@pytest.mark.parametrize("config", [LogMelConfig(bank="htk"), PASST_LOG_MEL, BEATS_LOG_MEL])
def test_banks_and_windows_lie_on_the_cpu_whatever_torchs_default(config):
    bank, window = mel_bank(config), mel_window(config)
    with torch.device("meta"):
        assert torch.equal(mel_bank(config), bank)
        assert torch.equal(mel_window(config), window)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bank": "bark"},
        {"window": "hamming"},
        {"framing": "same"},
        {"win_length": 401},
        {"hop": 0},
        {"f_max": 8001.0},
        {"f_min": 9000.0},
        {"std": 0.0},
        {"hop": 160.5},
        {"n_mels": True},
        {"sample_rate": 16_000.5},
        {"gain": "x"},
        {"log_offset": None},
    ],
)
def test_a_configuration_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match="expected"):
        LogMelConfig(**wrong)


@pytest.mark.parametrize("framing", ["valid", "center", "kaldi"])
def test_gradient(framing):
    config = LogMelConfig(n_fft=32, win_length=24, hop=10, n_mels=3, framing=framing, preemphasis=0.9, gain=3.0)
    wave = torch.randn(1, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: log_mel(x, config), wave)
