"""The official inference model, imported as it stands from a checkout of aurianworld/matpac, for comparisons.

Nothing of it is kept here. What its files import and is not installed is replaced by the least that does the same:
torchaudio's mel spectrogram on torch.stft; timm's block, with the plain attention of the pinned timm 0.4.12 or the
fused one of a current timm; of einops the patterns that the model uses; pandas is only imported for class names.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from _official_block import Block
from torch import Tensor, nn

from matpac_fast import checkpoint
from matpac_fast.reference import LogMelConfig, mel_bank
from matpac_fast.vit_encoder import Encoder


class MelSpectrogram(nn.Module):
    """torchaudio's, for the options that the official front end gives it."""

    def __init__(self, n_fft: int, hop_length: int, n_mels: int, f_min: float, f_max: float, **_: Any):
        super().__init__()
        self.n_fft, self.hop = n_fft, hop_length
        self.register_buffer("window", torch.hann_window(n_fft))
        bank = mel_bank(LogMelConfig(n_fft=n_fft, n_mels=n_mels, f_min=f_min, f_max=f_max))
        self.register_buffer("bank", bank.float())

    window: Tensor
    bank: Tensor

    def forward(self, wave: Tensor) -> Tensor:
        spectrum = torch.stft(wave, self.n_fft, self.hop, window=self.window, center=False, return_complex=True)
        return torch.matmul(self.bank, spectrum.abs().pow(2.0))


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """einops' rearrange, for patterns whose names and groups torch can reshape."""
    left, right = (re.findall(r"\([^)]*\)|\w+", side) for side in pattern.split("->"))
    for group, length in zip(left, x.shape, strict=True):
        names = group.strip("()").split()
        unknown = [name for name in names if name not in sizes]
        known = 1
        for name in names:
            known *= sizes.get(name, 1)
        if unknown:
            sizes[unknown[0]] = length // known
    flat = [name for group in left for name in group.strip("()").split()]
    wanted = [name for group in right for name in group.strip("()").split()]
    x = x.reshape([sizes[name] for name in flat]).permute([flat.index(name) for name in wanted])
    shape = []
    for group in right:
        length = 1
        for name in group.strip("()").split():
            length *= sizes[name]
        shape.append(length)
    return x.reshape(shape)


def load(checkout: Path, encoder: Encoder, attention: Literal["plain", "fused"]) -> nn.Module:
    """The official precise model, time pulled, of the sizes and weights of `encoder`."""
    folder = checkout / "inference_matpac" / "matpac"
    if not (folder / "model.py").is_file():
        raise FileNotFoundError(f"{checkout} is no checkout of aurianworld/matpac: it has no inference_matpac/matpac")
    block = partial(Block, fused=attention == "fused")
    package = _module("matpac")
    package.__path__ = [str(folder)]
    stubs = {
        "matpac": package,
        "timm": _module("timm"),
        "timm.models": _module("timm.models"),
        "timm.models.layers": _module("timm.models.layers", trunc_normal_=nn.init.trunc_normal_),
        "timm.models.vision_transformer": _module("timm.models.vision_transformer", Block=block),
        "torchaudio": _module("torchaudio", transforms=_module("torchaudio.transforms", MelSpectrogram=MelSpectrogram)),
        "einops": _module("einops", rearrange=rearrange),
        "pandas": _module("pandas"),
    }
    for name in [name for name in sys.modules if name.startswith("matpac.")]:
        del sys.modules[name]
    before = {name: sys.modules.get(name) for name in stubs}
    # Its dataclasses have dataclasses as default values, which Python >= 3.11 takes only where they can be hashed.
    plain = dataclasses.dataclass
    dataclasses.dataclass = lambda cls=None, **options: plain(cls, **{"unsafe_hash": True, **options})  # pyright: ignore
    sys.modules.update(stubs)
    try:
        official = importlib.import_module("matpac.model")
    finally:
        dataclasses.dataclass = plain
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    sizes = {name: encoder.sizes[name] for name in ("depth", "num_heads", "mlp_ratio")}
    layers = official.encoder_layers_config(embed_dim=encoder.width, **sizes)
    model = official.matpac_wrapper(cfg=official.general_config(encoder=layers, n_t=encoder.n_frames))
    found = model.load_state_dict(checkpoint.to_official_names(encoder.state_dict()), strict=False)
    if weights := [name for name in found.missing_keys if not name.startswith("log_mel.")]:
        raise ValueError(f"the official model misses weights: {weights}")
    return model.eval()


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members, __path__=[])
    return module
