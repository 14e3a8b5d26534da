"""log_mel on one CPU thread: 10 s clips by instruction set, input and content, beside the peers that are installed.

pytest benchmarks/bench_log_mel.py --benchmark-only --benchmark-columns=min,median --benchmark-sort=min

The op table of all launchers and devices is bench_ops.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from matpac_fast import ops, reference, use_backend
from matpac_fast.reference import LogMelConfig

_C = pytest.importorskip("matpac_fast._C")

SAMPLES = 160_000
CONFIG = LogMelConfig()


def noise(batch: int) -> Tensor:
    return 0.1 * torch.randn(batch, SAMPLES, generator=torch.Generator().manual_seed(0))


def tone() -> Tensor:
    """Every frame has bands far below its energy, so every frame is transformed in float64: the slowest content."""
    return 0.9 * torch.sin(2 * math.pi * 443 / 16_000 * torch.arange(SAMPLES, dtype=torch.float64)).float()[None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(benchmark: Any, call: Callable[[], Any], clips: int) -> None:
    """Many calls, for the least of them: other work on the machine only ever adds."""
    call()
    benchmark.extra_info["clips"] = clips
    benchmark.pedantic(call, rounds=max(20, 600 // clips), warmup_rounds=3)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("content", ["noise", "int16", "float64", "tone", "32 clips"])
def test_cpp(benchmark: Any, isa: str, content: str) -> None:
    wave = tone() if content == "tone" else noise(32 if content == "32 clips" else 1)
    if content == "int16":
        wave = (wave * 32_768).clamp(-32_768, 32_767).to(torch.int16)
    elif content == "float64":
        wave = wave.double()
    best = _C.cpu_isa()
    try:
        _C.set_cpu_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        with use_backend("cpp"):
            run(benchmark, lambda: ops.log_mel(wave), wave.shape[0])
    finally:
        _C.set_cpu_isa(best)


@pytest.mark.parametrize("clips", [1, 32])
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
def test_reference(benchmark: Any, compiled: bool, clips: int) -> None:
    wave = noise(clips)
    function = torch.compile(reference.log_mel) if compiled else reference.log_mel
    run(benchmark, lambda: function(wave), clips)


def test_librosa(benchmark: Any) -> None:
    librosa = pytest.importorskip("librosa")
    wave = noise(1)[0].numpy()
    options = {"sr": CONFIG.sample_rate, "n_fft": CONFIG.n_fft, "hop_length": CONFIG.hop, "center": False}
    bands = {"n_mels": CONFIG.n_mels, "fmin": CONFIG.f_min, "fmax": CONFIG.f_max}
    run(benchmark, lambda: librosa.feature.melspectrogram(y=wave, **options, **bands), 1)  # no logarithm


def test_torchaudio(benchmark: Any) -> None:
    torchaudio = pytest.importorskip("torchaudio", exc_type=ImportError)
    mel = torchaudio.transforms.MelSpectrogram(
        CONFIG.sample_rate,
        CONFIG.n_fft,
        CONFIG.win_length,
        CONFIG.hop,
        CONFIG.f_min,
        CONFIG.f_max,
        n_mels=CONFIG.n_mels,
        center=False,
        norm="slaney",
        mel_scale="slaney",
    )
    wave = noise(1)
    run(benchmark, lambda: mel(wave), 1)  # no logarithm


if __name__ == "__main__":
    raise SystemExit(__doc__)  # it is pytest that runs it
