"""M2D's released encoders (arXiv 2210.14648, 2404.06095): the same ViT as MATPAC's, other names and statistics.

Facts from nttcslab/m2d, examples/portable_m2d.py: weights lie at the top or under "model", after fine-tuning behind a
prefix; statistics are under "norm_stats" or, in older files, -7.1 and 4.2; the log-mel is MATPAC's with centred frames.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import checkpoint
from .errors import CheckpointError

_FINE_TUNED = "module.ar.runtime.backbone."
_NAMES = (
    ("cls_token", "frontend.cls_token"),
    ("pos_embed", "frontend.pos_embed"),
    ("patch_embed.", "frontend.patch_embed."),
    ("blocks.", "student.blocks."),
    ("norm.", "student.norm."),
)
_STATS = (-7.1, 4.2)


def is_m2d(state: Mapping[str, Any]) -> bool:
    """Whether the names are those of an M2D model, whole or encoder only."""
    own = ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
    return any(all(prefix + name in state for name in own) for prefix in ("", _FINE_TUNED))


def from_m2d(state: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """M2D's names -> ours and the encoder's sizes; target, decoder and heads are left out.

    Raises:
        CheckpointError: patches that are not square, or 32 kHz audio, which only the name of the file's folder, or of
            the archive, tells.
    """
    state = {name.removeprefix(_FINE_TUNED): tensor for name, tensor in state.items()}
    patch = tuple(state["patch_embed.proj.weight"].shape[2:])
    if patch[0] != patch[1]:
        raise CheckpointError(f"{source}: M2D with patches of {patch[0]} x {patch[1]}; only square ones are supported")
    if "p32k" in os.path.join(*Path(source).absolute().parts[-2:]):
        raise CheckpointError(f"{source}: M2D at 32 kHz, by the name of its folder; only 16 kHz is supported")
    ours = {
        mine + name[len(theirs) :]: tensor
        for name, tensor in state.items()
        for theirs, mine in _NAMES
        if name.startswith(theirs)
    }
    sizes = checkpoint.read_sizes(ours, source)
    mean, std = (float(x) for x in state.get("norm_stats", _STATS))
    return ours, sizes | {"mean": mean, "std": std, "framing": "center"}
