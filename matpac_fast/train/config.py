"""TrainConfig: how a model is trained; what it is stands in MatpacConfig."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import MatpacConfig
from ..errors import ConfigError
from ..fields import convert, made_of
from .sampler import Short
from .schedule import OFFICIAL_STEPS, OFFICIAL_TEACHER_TEMP_WARMUP, OFFICIAL_WARMUP, share_of_run

Precision = Literal["auto", "float32", "bf16"]


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser, the batches and the bookkeeping of one run; the defaults are the official recipe on one device.

    Nothing here says on how many processes: the batches are the same on any number.

    Args:
        steps: optimiser steps.
        batch_size: crops an optimiser step, over all processes (official: 2048, as 8 GPUs x 256).
        grad_accumulation: pieces that a process computes its part of a batch in, one after the other: less memory, the
            same step. Teachers and centre move once a step.
        lr: peak learning rate.
        warmup: steps from 0 to the peak; None takes the official share of the run, 1/15.
        stretch_decays: stretch the decays of averages and MCL temperature to the run (see `fit_to_run`); False keeps
            the official decays a step, by which a teacher hardly moves in a short run.
        weight_decay, betas, eps: AdamW's; the decay falls on every parameter, biases and tokens too, as official.
            fairseq's Adam in Python, which serves where apex is missing, adds eps before the second moment's bias is
            corrected: of gradients near 1e-5 the first fifty updates differ, while the rate is still near 0.
        clip_norm: largest norm of the whole gradient.
        precision: "float32", "bf16" (autocast; weights, losses and averages stay float32), or "auto": bf16 where the
            device computes in it natively.
        seed: determines the initial weights, the order of the clips, the crops and the masks.
        crop_frames: frames of a crop; of several lengths each step draws one. None takes the model's `n_frames`.
        visits: how often an epoch visits each clip of each folder that the corpus is of, such as (1, 4): the clips of
            the second four times, at other places; None: each once.
        pad_short: clips shorter than a crop are left out ("drop", as official), repeated up to its length ("repeat"),
            or followed by silence ("zeros").
        log_every: steps between two lines of the log; statistics are computed for these only.
        save_every: steps between two checkpoints.
        keep_last: newest checkpoints that stay on disk.
        keep_every: checkpoints of steps that this divides stay too; None: none of them.
        probe_every: steps between two calls of the probe that `pretrain` is given; None: save_every.
        max_bad_steps: stop after this many steps in a row whose loss or gradient was not finite.
        compile: run the transformer blocks through torch.compile, on a GPU in place of the package's fused blocks;
            nothing changes but rounding and speed.
        cuda_graph: launch each step as one CUDA graph, whose memory is its own; None: where one process trains on a
            GPU, which alone can, and a step of the longest crops takes less than half of its memory.
        shard: on several processes, cut weights, gradients and Adam's moments into one part each (FSDP2), and let
            each write its part of a checkpoint: for models that do not fit on one GPU; by default each holds all of
            them (DDP). On a CPU from torch 2.8 on.

    Raises:
        ConfigError: a value that cannot be.
    """

    steps: int = OFFICIAL_STEPS
    batch_size: int = 256
    grad_accumulation: int = 1
    lr: float = 3e-4
    warmup: int | None = None
    stretch_decays: bool = True
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-6
    clip_norm: float = 3.0
    precision: Precision = "auto"
    seed: int = 0
    crop_frames: tuple[int, ...] | None = None
    visits: tuple[int, ...] | None = None
    pad_short: Short = "drop"
    log_every: int = 20
    save_every: int = 500
    keep_last: int = 3
    keep_every: int | None = None
    probe_every: int | None = None
    max_bad_steps: int = 10
    compile: bool = False
    cuda_graph: bool | None = None
    shard: bool = False

    def __post_init__(self) -> None:
        convert(self)
        for name in (
            "steps",
            "batch_size",
            "grad_accumulation",
            "log_every",
            "save_every",
            "keep_last",
            "max_bad_steps",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.batch_size % self.grad_accumulation:
            raise ConfigError(
                f"batch_size is {self.batch_size}, which grad_accumulation, {self.grad_accumulation}, does not divide"
            )
        for name in ("lr", "eps", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigError(f"weight_decay is {self.weight_decay}; expected 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {self.betas}; expected two numbers from 0 to below 1")
        if self.warmup is not None and not 0 <= self.warmup <= self.steps:
            raise ConfigError(f"warmup is {self.warmup}; expected 0 to {self.steps}, the steps of the run")
        if self.probe_every is not None and self.probe_every < 1:
            raise ConfigError(f"probe_every is {self.probe_every}; expected at least 1")
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.save_every):
            raise ConfigError(f"keep_every is {self.keep_every}; expected a multiple of save_every, {self.save_every}")
        if self.crop_frames is not None and not self.crop_frames:
            raise ConfigError("crop_frames is empty; expected one length or more")
        if self.visits is not None and (not self.visits or min(self.visits) < 1):
            raise ConfigError(f"visits is {self.visits}; expected a number from 1 for each folder of the corpus")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}; expected 0 to 2**63 - 1")

    @property
    def warmup_steps(self) -> int:
        return share_of_run(OFFICIAL_WARMUP, self.steps) if self.warmup is None else self.warmup

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`; what is none of its, ConfigError."""
        return made_of(fields, cls, "the training configuration")


def fit_to_run(model: MatpacConfig, train: TrainConfig) -> MatpacConfig:
    """The model's schedules, stretched to the run: each keeps the share of the run that it has officially.

    Teacher temperature: 1/30 of the run. Averages: annealed over all of it, the encoder's time constant 1 / (1 - decay)
    from 1/15 to 1/3 of it, or a short run would end with the teacher it began with; the head's starts as official, at
    500 steps, but never longer than the encoder's. MCL's temperature falls as far as it does officially.
    A run of the official length gets the official numbers.
    """
    stretch = OFFICIAL_STEPS / train.steps if train.stretch_decays else 1.0
    ema_start = _faster(model.ema_start, stretch)
    return model.replace(
        max_steps=train.steps,
        teacher_temp_warmup=share_of_run(OFFICIAL_TEACHER_TEMP_WARMUP, train.steps),
        ema_start=ema_start,
        ema_end=_faster(model.ema_end, stretch),
        head_ema_start=min(model.head_ema_start, ema_start),
        mcl_temp_decay=model.mcl_temp_decay**stretch,
        seed=train.seed,
    )


def _faster(decay: float, stretch: float) -> float:
    """The decay whose time constant is `stretch` times shorter."""
    return decay if stretch == 1 else max(0.0, 1 - (1 - decay) * stretch)


def resolve_precision(precision: Precision, device: torch.device) -> Literal["float32", "bf16"]:
    """What "auto" means on `device`: bf16 where its arithmetic units have it, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    return "bf16" if cpu_has_bf16() else "float32"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bf16 (AMX or AVX-512 BF16); where it does not, bf16 is emulated and slow."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
