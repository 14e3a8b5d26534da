"""Counted work: the FLOPs of a training step, and what a device could do at best."""

from __future__ import annotations

import torch

from ..config import MatpacConfig

# Dense matrix peak in FLOP/s by the makers' datasheets: name as torch reports it -> (bf16, float32 without TF32).
_PEAKS = {
    "A100": (312e12, 19.5e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "L40S": (362e12, 91.6e12),
    "RTX 4090": (165e12, 82.6e12),
}


def step_flops(config: MatpacConfig, n_frames: int | None = None) -> float:
    """FLOPs of one training step for one crop of `n_frames`: the matrix products of the official step.

    A forward product counts once for the teacher and three times where it has a backward pass; the exact savings of
    this package are not taken off, so that the figure compares with others'. ViT-B at 608 frames: 91.8 GFLOP.
    """
    return sum(part_flops(config, n_frames).values())


def part_flops(config: MatpacConfig, n_frames: int | None = None) -> dict[str, float]:
    """`step_flops` by the parts of `matpac_fast.spans` that have matrix products."""
    c = config
    tokens = c.freq * ((n_frames or c.n_frames) // c.patch_size)
    visible = c.n_visible(tokens)
    masked = tokens - visible

    embed = 2 * tokens * c.patch_size**2 * c.width
    student = c.depth * _block(1 + visible, c.width, c.mlp_ratio)
    teacher = c.depth * _block(1 + masked, c.width, c.mlp_ratio)
    predictor = c.predictor_depth * _block(1 + tokens, c.predictor_width, c.mlp_ratio)
    predictor += 2 * c.width * c.predictor_width * (1 + visible + masked * max(1, c.mcl_heads))
    mlp = 2 * masked * c.head_hidden * (c.width + c.head_hidden + c.head_bottleneck)
    prototypes = 2 * masked * c.head_bottleneck * c.prototypes
    return {
        "patch embedding": embed,
        "student": student,
        "predictor": predictor,
        "teacher": teacher,
        "heads": 2 * mlp,
        "losses": 2 * prototypes,
        # The patch embedding needs no gradient of its input.
        "backward": embed + 2 * (student + predictor + mlp + prototypes),
    }


def _block(tokens: int, width: int, mlp_ratio: int) -> int:
    """One transformer block: qkv, projection and MLP, then scores and their product with the values."""
    return 2 * tokens * width * width * (4 + 2 * mlp_ratio) + 4 * tokens * tokens * width


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's dense matrix peak in FLOP/s; None where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for key, (bf16, float32) in _PEAKS.items():
        if key in name:
            return bf16 if precision == "bf16" else float32
    return None
