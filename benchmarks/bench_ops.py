"""The op table: every launcher that runs here against the reference, torch.compile of it, and what others would use.

pytest benchmarks/bench_ops.py --benchmark-only --benchmark-quiet

All that computes one op at one size takes turns, and a ratio is the median of the turns' ratios, so that a machine
that slows down slows all of them. Peers: the official model's chain of operations, and of log_mel librosa and
torchaudio where they are installed.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import _timing
import floors
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _timing import DEVICE, Case, run, variants
from torch import Tensor

from matpac_fast import ops, reference
from matpac_fast.reference import LogMelConfig

GPU = DEVICE.type == "cuda"
Op = Callable[..., Any]


def log_mel_cases() -> list[Case]:
    config, samples, cases = LogMelConfig(), 160_000, []
    for clips in (256, 2048) if GPU else (1, 32):

        def make(function: Op, clips: int = clips) -> Callable[[], Any]:
            wave = 0.1 * torch.randn(clips, samples, device=DEVICE)
            return lambda: function(wave)

        size = f"{clips} x 10 s"
        work = floors.log_mel(clips, samples, config.n_mels, config.n_frames(samples))
        cases += variants("log_mel", size, make, ops.log_mel, reference.log_mel, work)
        for name, peer in (("librosa", librosa_log_mel), ("torchaudio", torchaudio_log_mel)):
            if _timing.installed(name) and not (GPU and name == "librosa"):
                cases.append(Case("log_mel", size, name, lambda make=make, peer=peer: make(peer(config)), work))
    return cases


def librosa_log_mel(config: LogMelConfig) -> Op:
    librosa = importlib.import_module("librosa")
    options = {"sr": config.sample_rate, "n_fft": config.n_fft, "hop_length": config.hop, "center": False}
    bands = {"n_mels": config.n_mels, "fmin": config.f_min, "fmax": config.f_max}

    def log_mel(wave: Tensor) -> Any:
        mel = librosa.feature.melspectrogram(y=wave.numpy(), **options, **bands)
        return (np.log(mel + np.float32(config.log_offset)) - config.mean) / config.std

    return log_mel


def torchaudio_log_mel(config: LogMelConfig) -> Op:
    options = {"n_fft": config.n_fft, "win_length": config.win_length, "hop_length": config.hop, "center": False}
    bands = {"n_mels": config.n_mels, "f_min": config.f_min, "f_max": config.f_max}
    scale = {"norm": "slaney", "mel_scale": "slaney"}
    transforms = importlib.import_module("torchaudio.transforms")
    mel = transforms.MelSpectrogram(config.sample_rate, **options, **bands, **scale).to(DEVICE)
    return lambda wave: ((mel(wave) + config.log_offset).log() - config.mean) / config.std


def mask_shuffle_cases() -> list[Case]:
    def make(function: Op) -> Callable[[], Any]:
        index = torch.arange(256, device=DEVICE)
        return lambda: function(7, 1234, index, 190)

    work = floors.mask_shuffle(256, 190)
    return variants("mask_shuffle", "256 x 190", make, ops.mask_shuffle, reference.mask_shuffle, work)


def official_patch_embed(
    spec: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor, ids_shuffle: Tensor, n_visible: int
) -> tuple[Tensor, Tensor]:
    """The official model's own steps, once for each encoder."""
    tokens = F.conv2d(spec[:, None], weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2) + pos[:, 1:]
    parts = []
    for ids in (ids_shuffle[:, :n_visible], ids_shuffle[:, n_visible:]):
        part = tokens.gather(1, ids[:, :, None].repeat(1, 1, tokens.shape[-1]))
        parts.append(torch.cat(((cls + pos[:, :1]).expand(spec.shape[0], -1, -1), part), dim=1))
    return parts[0], parts[1].detach()


def gathered_patch_embed(
    spec: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor, ids_shuffle: Tensor, n_visible: int
) -> tuple[Tensor, Tensor]:
    """The rival of the fused kernel: gather the patches and positions, then torch's own product."""
    patches = reference.patches(spec, weight.shape[-1])
    table = (bias + pos[0, 1:])[ids_shuffle]  # (B, N, D)
    rows = patches.gather(1, ids_shuffle[:, :, None].expand(-1, -1, patches.shape[-1])).flatten(0, 1)
    tokens = (table.flatten(0, 1) + rows @ weight.flatten(1).T).view_as(table)
    head = (cls + pos[:, :1]).expand(spec.shape[0], -1, -1)
    return torch.cat([head, tokens[:, :n_visible]], 1), torch.cat([head, tokens[:, n_visible:]], 1).detach()


def masked_patch_embed_cases() -> list[Case]:
    """ViT-B on 608 frames: 57 of 190 patches visible. On a GPU under bfloat16 autocast, as the model runs there."""
    n, width, n_visible, cases = 190, 768, 57, []
    dtype = torch.bfloat16 if GPU else torch.float32
    for batch in (256,) if GPU else (8, 64):
        for backward in (False, True):

            def make(function: Op, batch: int = batch, backward: bool = backward) -> Callable[[], Any]:
                generator = torch.Generator().manual_seed(0)

                def randn(*shape: int) -> Tensor:
                    return torch.randn(*shape, generator=generator).to(DEVICE)

                spec, pos, upstream = randn(batch, 80, 608), randn(1, 1 + n, width), randn(batch, 1 + n_visible, width)
                weight, bias, cls = randn(width, 1, 16, 16) / 16, randn(width), randn(1, 1, width)
                parameters = [t.requires_grad_(backward) for t in (weight, bias, cls)]
                ids = ops.mask_shuffle(0, 0, torch.arange(batch, device=DEVICE), n)

                def call() -> Any:
                    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
                        visible, masked = function(spec, weight, bias, pos, cls, ids, n_visible)
                    return torch.autograd.grad(visible, parameters, upstream) if backward else (visible, masked)

                return call

            work = floors.masked_patch_embed(batch, 80, 608, width, n_visible, backward=backward)
            size = f"{batch} x 190 x 768, {'forward + backward' if backward else 'forward'}"
            op = "masked_patch_embed"
            cases += variants(op, size, make, ops.masked_patch_embed, reference.masked_patch_embed, work, dtype)
            for name, rival in (("official chain", official_patch_embed), ("gather + product", gathered_patch_embed)):
                cases.append(Case(op, size, name, lambda make=make, rival=rival: make(rival), work, dtype))
    return cases


def prototype_loss_cases() -> list[Case]:
    """Forward and backward from features, 256 wide. On a GPU features and prototypes are bfloat16."""
    d, cases = 256, []
    dtype = torch.bfloat16 if GPU else torch.float32
    for n, k in ((34_048, 2048), (34_048, 65_536)) if GPU else ((2128, 2048),):

        def make(function: Op, n: int = n, k: int = k) -> Callable[[], Any]:
            generator = torch.Generator().manual_seed(0)

            def unit(rows: int) -> Tensor:
                return F.normalize(torch.randn(rows, d, generator=generator), dim=1).to(DEVICE, dtype)

            sides = [unit(rows) for rows in (n, k, n, k)]
            leaves = [t.requires_grad_() for t in sides[:2]]
            center, upstream = torch.zeros(k, device=DEVICE), torch.full((n,), 1 / n, device=DEVICE)

            def call() -> Any:
                loss, _ = function(*sides, center, 0.1, 0.04)
                return torch.autograd.grad(loss, leaves, upstream)

            return call

        work = floors.prototype_loss(n, k, d, dtype.itemsize)
        size = f"{n} x {k}, forward + backward"
        found = variants("prototype_loss", size, make, ops.prototype_loss, reference.prototype_loss, work, dtype)
        # The reference keeps several N x K matrices in float32: 9 GB each at the larger size.
        cases += found if k < 10_000 else [case for case in found if "reference" not in case.variant]
    return cases


def prediction_loss_cases() -> list[Case]:
    """Forward and backward."""
    cases = []
    for heads in (0, 5):
        rows, width = (34_048, 768) if GPU else (1064, 768)

        def make(function: Op, heads: int = heads, rows: int = rows, width: int = width) -> Callable[[], Any]:
            generator = torch.Generator().manual_seed(0)
            shape = (rows, heads, width) if heads else (rows, width)
            prediction = torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()
            target = torch.randn(rows, width, generator=generator).to(DEVICE)
            upstream = torch.full((rows,), 1 / rows, device=DEVICE)

            def call() -> Any:
                loss, _ = function(prediction, target, 0.1 if heads else None)
                return torch.autograd.grad(loss, prediction, upstream)

            return call

        work = floors.prediction_loss(rows, width, max(1, heads), backward=True)
        size = f"{rows} x {heads} x {width}, forward + backward" if heads else f"{rows} x {width}, forward + backward"
        cases += variants("prediction_loss", size, make, ops.prediction_loss, reference.prediction_loss, work)
    return cases


def transformer_cases() -> list[Case]:
    """What a GPU computes between the products of a transformer, forward and backward, at the sizes of a step of ViT-B.
    On a CPU these are torch's own functions."""
    cases, dtype = [], torch.bfloat16
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)

    def gradients(function: Callable[[], Tensor], leaves: list[Tensor], upstream: Tensor) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(), leaves, upstream)

    for tokens, heads, width, hidden in ((58, 12, 64, 3072), (191, 16, 32, 2048)) if GPU else ():
        rows, channels = 256 * tokens, heads * width

        def attention(function: Op, tokens: int = tokens, heads: int = heads, width: int = width) -> Callable[[], Any]:
            qkv = randn(256, tokens, 3, heads, width).requires_grad_()
            return gradients(lambda: function(qkv), [qkv], randn(256, tokens, heads, width))

        def bias_gelu(function: Op, rows: int = rows, hidden: int = hidden) -> Callable[[], Any]:
            leaves = [randn(rows, hidden).requires_grad_(), randn(hidden, dtype=torch.float32).requires_grad_()]
            return gradients(lambda: function(*leaves), leaves, randn(rows, hidden))

        def add_layer_norm(function: Op, rows: int = rows, channels: int = channels) -> Callable[[], Any]:
            norm = torch.nn.LayerNorm(channels, 1e-6, device=DEVICE)
            x, bias = randn(rows, channels, dtype=torch.float32), randn(channels, dtype=torch.float32)
            leaves = [t.requires_grad_() for t in (x, randn(rows, channels), bias)]
            upstream = (randn(rows, channels, dtype=torch.float32), randn(rows, channels))
            return lambda: torch.autograd.grad(
                function(*leaves, norm, dtype), [*leaves, norm.weight, norm.bias], upstream
            )

        name = "forward + backward"
        size = f"256 x {tokens} x {heads} x {width}, {name}"
        work = floors.attention(256, tokens, heads, width)
        cases += variants("attention", size, attention, ops.attention, reference.attention, work, dtype)
        work, size = floors.bias_gelu(rows, hidden), f"{rows} x {hidden}, {name}"
        cases += variants("bias_gelu", size, bias_gelu, ops.bias_gelu, reference.bias_gelu, work, dtype)
        work, size = floors.add_layer_norm(rows, channels), f"{rows} x {channels}, {name}"
        fast, plain = ops.add_layer_norm, reference.add_layer_norm
        cases += variants("add_layer_norm", size, add_layer_norm, fast, plain, work, dtype)
    return cases


CASES = (
    log_mel_cases()
    + mask_shuffle_cases()
    + masked_patch_embed_cases()
    + prototype_loss_cases()
    + prediction_loss_cases()
    + transformer_cases()
)


GROUPS = [list(group) for _, group in itertools.groupby(CASES, lambda case: (case.op, case.size))]


@pytest.mark.parametrize("cases", GROUPS, ids=lambda cases: f"{cases[0].op}-{cases[0].size}")
def test_op(benchmark: Any, cases: list[Case]) -> None:
    run(benchmark, cases, seconds=0.5 if GPU else 1.0)


if __name__ == "__main__":
    raise SystemExit(__doc__)  # it is pytest that runs it
