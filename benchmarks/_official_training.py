"""The official training model, imported as it stands from a checkout of aurianworld/matpac, for comparisons.

Nothing of it is kept here. What its files import is replaced by the least that does the same: fairseq's averages, one
parameter at a time as there, and timm's block, with the fused attention of a current timm (0.4.12, which the official
inference package pins, has the slower plain one).
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _official_block import Block
from torch import nn

from matpac_fast.config import MatpacConfig


@dataclass
class EMAModuleConfig:
    ema_decay: float = 0.999
    ema_fp32: bool = True
    log_norms: bool = False
    add_missing_params: bool = True


class EMAModule:
    """Averages in float32, parameter by parameter, written back into the model."""

    def __init__(self, model: nn.Module, config: EMAModuleConfig, copy_model: bool = True):
        self.model, self.decay, self.logs = model, config.ema_decay, {}
        self.restore(model.state_dict(), True)

    def set_decay(self, decay: float, weight_decay: float | None = None) -> None:
        self.decay = decay

    def get_decay(self) -> float:
        return self.decay

    @torch.no_grad()
    def step(self, new_model: nn.Module) -> None:
        for name, parameter in new_model.named_parameters():
            average = self.fp32_params[name]
            average.mul_(self.decay)
            average.add_(parameter.to(average.dtype), alpha=1 - self.decay)
        self.restore(self.fp32_params, False)

    def restore(self, state: Mapping[str, torch.Tensor], build_fp32_params: bool) -> None:
        self.model.load_state_dict(state)
        if build_fp32_params:
            self.fp32_params = {name: tensor.detach().float().clone() for name, tensor in state.items()}


class BaseFairseqModel(nn.Module):
    def set_num_updates(self, num_updates: int) -> None: ...


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members, __path__=[])
    return module


def _stubs() -> dict[str, types.ModuleType]:
    def register(*args: Any, **kwargs: Any):
        return lambda thing: thing

    return {
        "fairseq": _module("fairseq"),
        "fairseq.modules": _module("fairseq.modules", EMAModule=EMAModule, EMAModuleConfig=EMAModuleConfig),
        "fairseq.dataclass": _module("fairseq.dataclass", FairseqDataclass=type("FairseqDataclass", (), {})),
        "fairseq.models": _module("fairseq.models", BaseFairseqModel=BaseFairseqModel, register_model=register),
        "omegaconf": _module("omegaconf", II=lambda text: text, MISSING=None),
        "timm": _module("timm"),
        "timm.models": _module("timm.models"),
        "timm.models.vision_transformer": _module("timm.models.vision_transformer", Block=Block),
        # The task reads data sets; the model only names its classes.
        "training_matpac.tasks.pretraining": _module(
            "training_matpac.tasks.pretraining", PretrainingConfig=object, LogmelPretrainingTask=object
        ),
    }


def load(checkout: Path, config: MatpacConfig) -> nn.Module:
    """The official model of `config`'s sizes, schedules and temperatures, in training mode."""
    official_only = dict(head_bottleneck=256, center_of="probabilities", head_ema_past_end="encoder")
    if other := [name for name, value in official_only.items() if getattr(config, name) != value]:
        raise ValueError(f"the official model has no other {', '.join(other)} than {official_only}")
    folder = checkout / "training_matpac"
    if not (folder / "models" / "model.py").is_file():
        raise FileNotFoundError(f"{checkout} is no checkout of aurianworld/matpac: it has no training_matpac/models")
    package = _module("training_matpac")
    package.__path__ = [str(folder)]
    sys.modules.update(_stubs(), training_matpac=package)
    # Its dataclasses have dataclasses as default values, which Python >= 3.11 takes only where they can be hashed.
    plain = dataclasses.dataclass
    dataclasses.dataclass = lambda cls=None, **options: plain(cls, **{"unsafe_hash": True, **options})  # pyright: ignore
    try:
        official = importlib.import_module("training_matpac.models.model")
    finally:
        dataclasses.dataclass = plain

    c = config
    cfg = official.general_config()
    cfg.n_freq, cfg.n_t, cfg.patch_size, cfg.mask_ratio = c.n_mels, c.n_frames, c.patch_size, c.mask_ratio
    cfg.ema_decay, cfg.ema_end_decay, cfg.ema_anneal_end_step = c.ema_start, c.ema_end, c.max_steps
    cfg.alpha, cfg.use_mcl = 1 - c.classification_weight, c.mcl_heads > 0  # of 0 and 1 one loss alone comes
    _set(cfg.encoder, embed_dim=c.width, depth=c.depth, num_heads=c.num_heads, mlp_ratio=c.mlp_ratio)
    decoder = dict(decoder_embed_dim=c.predictor_width, decoder_depth=c.predictor_depth)
    _set(cfg.decoder, embed_dim=c.width, decoder_num_heads=c.predictor_heads, mlp_ratio=c.mlp_ratio, **decoder)
    _set(cfg.mcl_heads, embed_dim=c.width, decoder_embed_dim=c.predictor_width, n_head=c.mcl_heads)
    temperature = dict(temperature_start=c.mcl_temp_start, temperature_end=c.mcl_temp_end)
    _set(cfg.mcl_heads, decay_rate=c.mcl_temp_decay, **temperature)
    _set(cfg.cls_head_cfg, head_dim_out=c.prototypes, hidden_dim=c.head_hidden, warmup_n_steps=c.teacher_temp_warmup)
    temperature = dict(warmup_teacher_temp=c.teacher_temp_start, teacher_temp=c.teacher_temp)
    _set(cfg.cls_head_cfg, ema_decay=c.head_ema_start, ema_end_decay=c.head_ema_end, **temperature)
    model = official.GeneralModel(cfg, None).train()
    # Its loss is made without its configuration's values.
    _set(model.cls_head_loss, student_temp=c.student_temp, center_momentum=c.center_momentum)
    return model


def _set(config: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(config, name, value)
