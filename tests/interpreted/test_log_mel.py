"""log_mel's Triton kernel under Triton's interpreter, on the model's shapes and odd ones."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from matpac_fast import ops, reference, use_backend
from matpac_fast.errors import BackendError
from matpac_fast.reference import LogMelConfig


def run(wave: Tensor, config: LogMelConfig = LogMelConfig(), dtype: torch.dtype | None = None) -> Tensor:
    with use_backend("triton"):
        return ops.log_mel(wave, config, dtype)


def noise(batch: int, samples: int) -> Tensor:
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples))


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).abs().max())


@pytest.mark.parametrize("entry", ["chirp", "silence", "quiet", "loud", "one_frame", "odd"])
def test_near_float32_on_the_official_examples(golden, entry):
    arrays = golden("log_mel")
    exact = arrays[f"{entry}/exact_fp64"]
    float32 = error(reference.log_mel(arrays[f"{entry}/wave"]), exact)
    assert error(run(arrays[f"{entry}/wave"]), exact) <= 2 * float32 + 5e-6


@pytest.mark.parametrize(
    ("batch", "samples", "config"),
    [
        (2, 97_520 // 8, LogMelConfig()),
        (1, 400, LogMelConfig(n_mels=1, hop=7)),
        (3, 1_234, LogMelConfig(hop=523, n_mels=17)),
        (1, 11_000, LogMelConfig(n_mels=128, bank="htk")),
        (1, 400 + 126 * 160, LogMelConfig()),  # a frame less than a tile
        (1, 400 + 127 * 160, LogMelConfig()),  # a tile
        (2, 401 + 128 * 160, LogMelConfig(n_mels=128)),  # a frame more, and a sample
        (1, 2_000, LogMelConfig(n_mels=65, bank="kaldi", window="povey", gain=32768.0, mean=15.4, std=13.1)),
    ],
)
def test_against_the_reference(batch, samples, config):
    wave = noise(batch, samples)
    wave[:, samples // 2 :] *= 1e-4  # frames of very different levels side by side
    exact = reference.log_mel(wave.double(), config)
    before = wave.clone()
    out = run(wave, config)
    assert error(out, exact) <= 2 * error(reference.log_mel(wave, config), exact) + 5e-6 * float(exact.abs().max())
    assert torch.equal(wave, before)
    # The interpreter truncates where a GPU rounds.
    torch.testing.assert_close(run(wave, config, torch.bfloat16).float(), out, rtol=2**-7, atol=1e-3)


def test_int16_strided_and_empty():
    wave = (noise(2, 3_000) * 32768).round()
    want = run(wave / 32768)
    assert error(run(wave.to(torch.int16)), want) < 1e-6
    assert torch.equal(run((wave / 32768)[::2]), want[::2])
    assert torch.equal(run((wave / 32768).T.contiguous().T), want)
    assert run(torch.empty(0, 1_000)).shape == (0, 80, 4)


def test_more_clips_than_one_launch_takes(monkeypatch):
    wave = noise(5, 1_000)
    want = run(wave)
    monkeypatch.setattr("matpac_fast.kernels.log_mel.CLIPS", 2)
    assert torch.equal(run(wave), want)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 1e15])
def test_constant(value):
    wave = torch.full((1, 1_000), value)
    exact = reference.log_mel(wave.double())
    assert error(run(wave), exact) <= 2 * error(reference.log_mel(wave), exact) + 3e-6


def test_nan_stays_in_the_frames_that_hold_it():
    wave = noise(1, 4_000)
    clean = run(wave)
    wave[0, 1_000] = torch.nan
    out = run(wave)
    start = 160 * torch.arange(out.shape[2])
    holds = (start <= 1_000) & (start + 400 > 1_000)
    assert out[0][:, holds].isnan().all()
    assert torch.equal(out[0][:, ~holds], clean[0][:, ~holds])


def test_a_quiet_tone_is_as_exact_as_a_loud_one():
    tone = torch.sin(2 * math.pi * 3_011 / 16_000 * torch.arange(4_000, dtype=torch.float64)).float()[None]
    config = LogMelConfig(log_offset=1e-20)
    for amplitude in (2.0**-12, 1.0, 2.0**14):
        exact = reference.log_mel(amplitude * tone.double(), config)
        peak = exact.amax(1, keepdim=True)
        near = exact > peak - 60 / (10 * math.log10(math.e)) / config.std  # within 60 dB of the frame's loudest band
        assert ((run(amplitude * tone, config) - exact).abs() * near).max() < 2e-5


def test_the_applications_default_device_changes_no_tables():
    tables = importlib.import_module("matpac_fast.kernels.log_mel")._tables.__wrapped__
    with torch.device("meta"):  # as torch.set_default_device("cuda")
        found = tables(LogMelConfig(), 80, torch.device("cpu"), 1.0)
    want = tables(LogMelConfig(), 80, torch.device("cpu"), 1.0)
    assert all(map(torch.equal, found[:3], want[:3]))


def test_no_kernel_for_float64_or_many_mels():
    with pytest.raises(BackendError, match="float64"):
        run(noise(1, 1_000).double())
    with pytest.raises(BackendError, match="128 mels"):
        run(noise(1, 1_000), LogMelConfig(n_mels=129))
