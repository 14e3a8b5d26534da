"""`matpac-fast doctor`: what runs here, whether it computes rightly, what is missing for what."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import tempfile
import time
from pathlib import Path

# package -> what it is needed for; all of these come with matpac_fast
_REQUIRED = {
    "soundfile": "reading audio files",
    "soxr": "other sample rates than 16 kHz",
    "safetensors": "checkpoints",
    "pyarrow": "prepare and embed",
    "tyro": "the command line",
    "rich": "progress and tables",
}
# package -> what it is needed for, and the extra that brings it
_OPTIONAL = {
    "triton": ("kernels on a GPU", "matpac_fast[triton]"),
    "av": ("the sound of video files, m4a and aac", "matpac_fast[video]"),
    "ray": ("embedding on a cluster", "matpac_fast[ray]"),
    "matplotlib": ("plots of a study, curves of a run", "matpac_fast[plots]"),
    "tensorboard": ("pretrain --tensorboard", "matpac_fast[tensorboard]"),
    "onnx": ("export --onnx", "matpac_fast[export]"),
    "onnxscript": ("export --onnx", "matpac_fast[export]"),
    "onnxruntime": ("export --onnx", "matpac_fast[export]"),
}
# suffix -> libsndfile's format and subtype
_FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
}


def main() -> int:
    """Print versions, backends, decoders and the result of a self-test; and what is missing for what.

    Example: matpac-fast doctor

    Exits with 0, or with 1 where something that the package needs is missing or computes wrongly.
    """
    from .. import backend

    missing = [name for name in _REQUIRED if _version(name) is None]
    _section("versions", _versions())
    _section("backends", backend.table())
    _section("packages", _packages())
    failed = []
    lines = []
    tests = {"log-mel": _log_mel, "training": _training, "embedding": _embedding, "audio files": _audio}
    for title, test in tests.items():
        try:
            lines.append(f"{title:<12} ok: {test()}")
        except Exception as error:  # whatever is broken here, the rest is still worth knowing
            failed.append(title)
            lines.append(f"{title:<12} FAILED: {type(error).__name__}: {error}")
    _section("self-test", "\n".join(lines))
    if missing or failed:
        print(f"Something is wrong: {', '.join([*(f'{name} is missing' for name in missing), *failed])}")
        return 1
    print("All is well.")
    return 0


def _section(title: str, text: str) -> None:
    print(f"{title}\n" + "\n".join(f"  {line}".rstrip() for line in text.splitlines()) + "\n")


def _version(package: str) -> str | None:
    """The version of an installed package that can be imported, or None."""
    try:
        version = importlib.metadata.version(package)
        importlib.import_module(package)
    except (ImportError, OSError):  # OSError: a shared library is missing
        return None
    return version


def _versions() -> str:
    import torch

    from .. import __version__

    rows = [
        ("matpac_fast", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("numpy", importlib.metadata.version("numpy")),
        ("system", platform.platform()),
        ("cpu", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"),
    ]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"))
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


def _packages() -> str:
    lines = []
    for name, purpose in _REQUIRED.items():
        lines.append(f"{name:<12} {_version(name) or f'MISSING, needed for {purpose}: pip install {name}'}")
    for name, (purpose, extra) in _OPTIONAL.items():
        lines.append(f"{name:<12} {_version(name) or f'not installed; for {purpose}: pip install {extra!r}'}")
    return "\n".join(lines)


def _log_mel() -> str:
    """Every backend that can run here against the reference in float64."""
    import torch

    from .. import backend, ops, reference

    said = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        wave = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0)) / 10
        want = reference.log_mel(wave.double())
        own = float((reference.log_mel(wave) - want).abs().max())
        error = float((ops.log_mel(wave.to(device)).cpu() - want).abs().max())
        name = backend.choose("log_mel", torch.device(device))
        if not error <= 2 * own + 1e-5:
            raise ArithmeticError(f"{name} on {device} is off by {error:.1e}; PyTorch itself by {own:.1e}")
        said.append(f"{name} on {device}, off by {error:.1e} (PyTorch {own:.1e})")
    return "; ".join(said)


def _training() -> str:
    """A small training step on the kernels that pre-training takes here, against one in float64."""
    import torch

    from .. import use_backend
    from ..config import MatpacConfig
    from ..model import Matpac
    from ..train.config import resolve_precision

    config, said = MatpacConfig.preset("tiny", n_frames=64, depth=2, predictor_depth=2), []
    spec = torch.randn(4, config.n_mels, 64, generator=torch.Generator().manual_seed(0))

    def gradient(source: str, device: str, dtype: torch.dtype) -> torch.Tensor:
        model = Matpac(config).to(device, torch.promote_types(dtype, torch.float32)).train()
        with use_backend(source):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(spec.to(device, torch.promote_types(dtype, torch.float32)), step=1).loss
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double().cpu()

    exact = gradient("reference", "cpu", torch.float64)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        bf16 = device == "cuda" and resolve_precision("auto", torch.device(device)) == "bf16"
        dtype = torch.bfloat16 if bf16 else torch.float32
        own, error = (float((gradient(s, device, dtype) - exact).norm() / exact.norm()) for s in ("reference", "auto"))
        if not error <= 2 * own + 1e-5:
            raise ArithmeticError(f"gradients on {device} are off by {error:.1e} of them; PyTorch's own by {own:.1e}")
        kind = "bf16" if bf16 else "float32"
        said.append(f"gradients in {kind} on {device}, off by {error:.1e} of them (PyTorch {own:.1e})")
    return "; ".join(said)


def _embedding() -> str:
    import torch

    from ..encoder import load_encoder

    encoder = load_encoder()  # whose weights are checked against their SHA-256
    wave = torch.randn(32_000, generator=torch.Generator().manual_seed(0)) / 10
    encoder.embed(wave, 16_000)
    clock = time.perf_counter()
    values = encoder.embed(wave, 16_000).values
    seconds = time.perf_counter() - clock
    if not torch.isfinite(values).all():
        raise ArithmeticError("an embedding is not finite")
    return f"{values.shape[1]} finite numbers for 2 s on {encoder.device} in {1000 * seconds:.0f} ms ({encoder.name})"


def _audio() -> str:
    """A tone through every format, decoded and resampled as any file is."""
    import numpy as np
    import soundfile

    from ..audio.decode import decoder_versions, read_audio

    tone = np.sin(2 * np.pi * 440 / 48_000 * np.arange(48_000)).astype(np.float32) / 2
    good, bad = [], []
    with tempfile.TemporaryDirectory() as folder:
        for suffix, (container, subtype) in _FORMATS.items():
            path = Path(folder) / f"tone{suffix}"
            level = 0.0
            if soundfile.check_format(container, subtype):
                soundfile.write(path, tone, 48_000, format=container, subtype=subtype)
                level = float(np.sqrt(np.mean(np.square(read_audio(path)))))
            (good if abs(level - 0.5 / np.sqrt(2)) < 0.02 else bad).append(suffix)
    versions = ", ".join(f"{name} {version}" for name, version in decoder_versions().items())
    if bad:
        raise ArithmeticError(f"{' '.join(bad)} cannot be decoded by {versions}: pip install -U soundfile")
    return f"{' '.join(good)} ({versions})"
