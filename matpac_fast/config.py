"""MatpacConfig: everything that defines a model and its losses, checked when it is made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import CheckpointError, ConfigError
from .fields import convert, made_of
from .reference import LogMelConfig

# The fields that make the model's `log_mel`.
FRONT_END = tuple(field.name for field in dataclasses.fields(LogMelConfig))
_MOST: dict[Any, float] = {"int": 2**63 - 1, "float": 3.4028234663852886e38}  # what PyTorch's integers and float32 hold


@dataclass(frozen=True)
class MatpacConfig:
    """Everything that defines the model and its losses; the defaults are the official MATPAC.

    Sizes: `width`, `depth`, `num_heads` of the encoders, `predictor_*` of the predictor, `head_*` and `prototypes` of
    the classification head. `mcl_heads=5` is MATPAC++. `n_mels` and `n_frames` are the size of a training crop.

    Front end: `n_mels` and the fields from `sample_rate` on are those of `LogMelConfig`; `log_mel` is all of them.

    Schedules run over `max_steps` optimiser steps; `teacher_temp_warmup` is in steps too.

    Three options have a better form than the official one, which stays the default:

    - `center_of="logits"` centres by the mean of the teacher's logits, as DINO does. The official code takes the mean
      of its probabilities *after* the softmax, so it hardly centres.
    - `teacher_init="copy"` starts the teacher as a copy of the student. The official teacher starts from random
      weights of its own, and its head from the student's weights before they are initialised again.
    - `head_ema_past_end="head"` keeps the head's own final decay past `max_steps`; official is the encoder's.

    Raises:
        ConfigError: sizes that cannot be, with what was expected.
    """

    n_mels: int = 80
    n_frames: int = 608
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: int = 4
    predictor_width: int = 512
    predictor_depth: int = 8
    predictor_heads: int = 16
    mcl_heads: int = 0
    mcl_temp_start: float = 0.1
    mcl_temp_decay: float = 0.99997
    mcl_temp_end: float = 1e-4
    mask_ratio: float = 0.7
    prototypes: int = 2048
    head_hidden: int = 2048
    head_bottleneck: int = 256
    student_temp: float = 0.1
    teacher_temp_start: float = 0.04
    teacher_temp: float = 0.07
    teacher_temp_warmup: int = 9_827
    center_momentum: float = 0.9
    center_of: Literal["probabilities", "logits"] = "probabilities"
    ema_start: float = 0.99995
    ema_end: float = 0.99999
    head_ema_start: float = 0.998
    head_ema_end: float = 1.0
    head_ema_past_end: Literal["encoder", "head"] = "encoder"
    teacher_init: Literal["random", "copy"] = "random"
    classification_weight: float = 0.5
    max_steps: int = 294_816
    seed: int = 0
    sample_rate: int = LogMelConfig.sample_rate
    n_fft: int = LogMelConfig.n_fft
    win_length: int = LogMelConfig.win_length
    hop: int = LogMelConfig.hop
    f_min: float = LogMelConfig.f_min
    f_max: float = LogMelConfig.f_max
    log_offset: float = LogMelConfig.log_offset
    mean: float = LogMelConfig.mean
    std: float = LogMelConfig.std
    bank: str = LogMelConfig.bank
    window: str = LogMelConfig.window
    framing: str = LogMelConfig.framing
    preemphasis: float = LogMelConfig.preemphasis
    gain: float = LogMelConfig.gain
    log_floor: float = LogMelConfig.log_floor

    def __post_init__(self) -> None:
        convert(self)
        if self.patch_size < 1:
            raise ConfigError(f"patch_size is {self.patch_size}; expected at least 1")
        for name in ("n_mels", "n_frames"):
            if getattr(self, name) < self.patch_size or getattr(self, name) % self.patch_size:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; expected a multiple of the patch size, {self.patch_size}"
                )
        for width, heads in (("width", "num_heads"), ("predictor_width", "predictor_heads")):
            w, h = getattr(self, width), getattr(self, heads)
            if w < 4 or w % 4:
                raise ConfigError(f"{width} is {w}; expected a multiple of 4, which the sine-cosine positions need")
            if h < 1 or w % h:
                raise ConfigError(f"{heads} is {h}, which does not divide {width}, {w}")
        if not 0 < self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio is {self.mask_ratio}; expected a share above 0 and below 1")
        if not 0 < self.n_visible() < self.n_tokens:
            raise ConfigError(
                f"mask_ratio is {self.mask_ratio}; of {self.n_tokens} patches it leaves {self.n_visible()} visible, "
                "expected at least one visible and one masked"
            )
        for name in (
            "depth",
            "predictor_depth",
            "mlp_ratio",
            "prototypes",
            "head_hidden",
            "head_bottleneck",
            "max_steps",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("mcl_heads", "teacher_temp_warmup", "seed", "mcl_temp_end"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 or more")
        for name in ("student_temp", "teacher_temp_start", "teacher_temp", "mcl_temp_start"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a positive temperature")
        for name in (
            "center_momentum",
            "ema_start",
            "ema_end",
            "head_ema_start",
            "head_ema_end",
            "mcl_temp_decay",
            "classification_weight",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        self.log_mel  # noqa: B018 - it checks its fields
        for field in dataclasses.fields(self):
            most = _MOST.get(field.type)
            if most is not None and not abs(getattr(self, field.name)) <= most:
                raise ConfigError(
                    f"{field.name} is {getattr(self, field.name)!r}; expected a finite number, to {most:g}"
                )

    @property
    def log_mel(self) -> LogMelConfig:
        """What turns waves into the model's input."""
        return LogMelConfig(**{name: getattr(self, name) for name in FRONT_END})

    @property
    def freq(self) -> int:
        """Patches along frequency."""
        return self.n_mels // self.patch_size

    @property
    def time(self) -> int:
        """Patches along time."""
        return self.n_frames // self.patch_size

    @property
    def n_tokens(self) -> int:
        """Patches of a training crop."""
        return self.freq * self.time

    def n_visible(self, n_tokens: int | None = None) -> int:
        """Patches that the student sees, rounded down as the official code does."""
        return int((self.n_tokens if n_tokens is None else n_tokens) * (1 - self.mask_ratio))

    def replace(self, **changes: Any) -> MatpacConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> MatpacConfig:
        """Inverse of `to_dict`; what is none of its, ConfigError."""
        return made_of(fields, cls, "the model's configuration")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> MatpacConfig:
        """nano (192 x 6), tiny (192 x 12), small (384 x 12), base (768 x 12, official) or large (1024 x 24).

        The rest in proportion.
        """
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}; expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})


def stored_config(metadata: Mapping[str, Any], path: str | os.PathLike[str]) -> MatpacConfig | None:
    """The model's configuration by a checkpoint's metadata, None where they have none.

    Raises:
        CheckpointError: one that cannot be.
    """
    if "config" not in metadata:
        return None
    try:
        return MatpacConfig.from_dict(metadata["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: damaged: its configuration cannot be: {error}") from None


PRESETS: dict[str, dict[str, Any]] = {
    # Of an hour on one CPU core: twice the steps of tiny.
    "nano": dict(width=192, depth=6, num_heads=3, predictor_width=128, predictor_depth=4, predictor_heads=4)
    | dict(head_hidden=512, prototypes=512),
    "tiny": dict(width=192, num_heads=3, predictor_width=128, predictor_heads=4, head_hidden=512, prototypes=512),
    "small": dict(width=384, num_heads=6, predictor_width=256, predictor_heads=8, head_hidden=1024, prototypes=1024),
    "base": {},
    # The predictor and the head stay official: they grow with the task, not with the encoder.
    "large": dict(width=1024, depth=24, num_heads=16),
}
