"""`matpac-fast bench`: what the fused kernels gain on this machine, and where a training step's time goes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F

from .. import __version__, backend, ops, use_backend
from ..config import MatpacConfig
from ..encoder import load_encoder
from ..errors import ConfigError
from ..model import Matpac
from ..reference import LogMelConfig
from ..spans import span
from ..train.config import TrainConfig, resolve_precision
from ..train.distributed import pick_device
from ..train.memory import freed_memory_kept
from ..train.step import make_optimizer, train_step

Call: TypeAlias = Callable[[], Any]
STEP = 7  # past step 0, which moves no average


def main(
    preset: Literal["nano", "tiny", "small", "base", "large"] = "small",
    batch_size: int = 8,
    seconds: float = 60.0,
    device: str = "auto",
    profile: Path | None = None,
) -> int:
    """Time ops, a training step and embedding here, with the fused kernels and with the plain PyTorch formulas.

    Example: matpac-fast bench --preset base --profile profile/

    The two are called turn by turn; times are medians, and a gain is their ratio. The repository's benchmarks/ has the
    long version, with peers.

    Args:
        preset: the model's size.
        batch_size: crops of 6.08 s a step.
        seconds: how long to measure, over all rows.
        device: auto, cpu, cuda or cuda:1.
        profile: also take a training step apart: a table of its parts, and trace.json for https://ui.perfetto.dev, with
            the memory allocated over time, in this folder; on a GPU memory.pickle too, for
            https://docs.pytorch.org/memory_viz.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size is {batch_size}; expected at least 1")
    if not seconds > 0:
        raise ConfigError(f"--seconds is {seconds:g}; expected a positive number")
    if profile is not None:
        _check_folder(profile)
    target = pick_device(device)
    where = torch.cuda.get_device_name(target) if target.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, matpac_fast {__version__}, preset {preset}, batch {batch_size}\n")
    config = MatpacConfig.preset(preset)
    with freed_memory_kept(target):  # as pretrain does
        cases = make_cases(config, batch_size, preset, target)
        print(f"{'':<36}{'plain ms':>10}{'fused ms':>10}{'gain':>8}   by")
        for name, op, call in cases:
            plain, fused = compare(call, seconds / len(cases), target)
            found = backend.choose(op, target) if op else ""
            print(f"{name:<36}{plain:>10.2f}{fused:>10.2f}{plain / fused:>7.2f}x   {found}", flush=True)
        if profile is not None:
            from ._bench_profile import take_apart

            print("\n" + "\n".join(take_apart(config, batch_size, target, profile)))
    return 0


def _check_folder(folder: Path) -> None:
    """Make it and try a file in it: what cannot be written is said before minutes are measured."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--profile {folder} is a file; expected a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--profile {folder} cannot be written ({error.strerror}); give another folder") from None


def make_cases(config: MatpacConfig, batch: int, preset: str, device: torch.device) -> list[tuple[str, str, Call]]:
    """(what, its op or "", the call), each forward and backward where it has a backward."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    wave = randn(batch, LogMelConfig().n_samples(config.n_frames)) / 10
    index = torch.arange(batch, device=device)
    spec, ids = ops.log_mel(wave), ops.mask_shuffle(0, STEP, index, config.n_tokens)
    visible, masked = config.n_visible(), config.n_tokens - config.n_visible()
    size = config.patch_size
    weight, bias, cls = randn(config.width, 1, size, size) / size, randn(config.width), randn(1, 1, config.width)
    pos, upstream = randn(1, 1 + config.n_tokens, config.width), randn(batch, 1 + visible, config.width)
    leaves = [t.requires_grad_() for t in (weight, bias, cls)]

    def patch_embed() -> Any:
        out, _ = ops.masked_patch_embed(spec, weight, bias, pos, cls, ids, visible)
        return torch.autograd.grad(out, leaves, upstream)

    rows, width = batch * masked, config.head_bottleneck
    student, student_matrix, teacher, teacher_matrix = (
        F.normalize(randn(n, width), dim=1) for n in (rows, config.prototypes) * 2
    )
    trained = [t.requires_grad_() for t in (student, student_matrix)]
    center, mean = torch.zeros(config.prototypes, device=device), torch.full((rows,), 1 / rows, device=device)

    def loss() -> Any:
        out, _ = ops.prototype_loss(student, student_matrix, teacher, teacher_matrix, center, 0.1, 0.04)
        return torch.autograd.grad(out, trained, mean)

    encoder = load_encoder(f"untrained-{preset}", device)
    clips = randn(2, 160_000) / 10
    return [
        (f"log_mel, {batch} x 6.08 s", "log_mel", lambda: ops.log_mel(wave)),
        (
            f"mask_shuffle, {batch} x {config.n_tokens}",
            "mask_shuffle",
            lambda: ops.mask_shuffle(0, 0, index, config.n_tokens),
        ),
        ("masked_patch_embed", "masked_patch_embed", patch_embed),
        (f"prototype_loss, {rows} x {config.prototypes}", "prototype_loss", loss),
        ("training step", "", training_step(config, batch, device)),
        ("embedding, 2 x 10 s", "", lambda: encoder.embed(clips, 16_000)),
    ]


def training_step(config: MatpacConfig, batch: int, device: torch.device) -> Call:
    """One step from int16 crops on the device, in the precision that the device has."""
    model = Matpac(config).to(device).train()
    optimizer = make_optimizer(model, TrainConfig())
    precision = resolve_precision("auto", device)
    shape = (batch, LogMelConfig().n_samples(config.n_frames))
    wave = torch.randint(-8_000, 8_000, shape, generator=torch.Generator().manual_seed(0)).to(device, torch.int16)
    index = torch.arange(batch, device=device)

    def step() -> None:
        with span("front end"):
            spec, ids = ops.log_mel(wave), ops.mask_shuffle(0, STEP, index, config.n_tokens)
        train_step(model, optimizer, [(spec, ids)], STEP, 3e-4, 3.0, precision)

    return step


def compare(call: Call, seconds: float, device: torch.device) -> tuple[float, float]:
    """Median milliseconds on the reference and on the kernels, called turn by turn."""

    def once(name: str) -> float:
        with use_backend(name):
            return 1e3 * seconds_of(call, device)

    names = ("reference", "auto")
    for name in names:
        once(name)  # warms up
    times: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 1_000):
        times.append((once("reference"), once("auto")))
    plain, fused = (statistics.median(t) for t in zip(*times, strict=True))
    return plain, fused


def seconds_of(call: Call, device: torch.device) -> float:
    """Until the device is through with it."""
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
