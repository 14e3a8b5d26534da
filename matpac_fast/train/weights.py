"""The weights that a new run begins with: those of another run or model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..choice import parse
from ..config import FRONT_END, PRESETS, stored_config
from ..encoder import list_encoders
from ..errors import CheckpointError, ConfigError
from ..intact import check_sums, intact_named, read_state
from ..model import Matpac
from ..reference import LogMelConfig

_INIT = "to begin from it, --init {folder}"
_ALONE = "an encoder alone; expected a training checkpoint, which holds teacher, predictor and heads too"
# What a model is, whatever the length of its crops and however it is trained.
_SIZES = frozenset(
    (*FRONT_END, "patch_size", "mlp_ratio", "mcl_heads", "predictor_depth", "head_bottleneck", "predictor_heads")
).union(*PRESETS.values())


def load_weights(model: Matpac, source: str | os.PathLike[str]) -> None:
    """Start `model` from the weights in a run folder, "RUN@STEP", a file of `Matpac.save` or an official training
    checkpoint.

    Student, predictor, heads, teachers and centre; not the optimiser's moments. The crops may be of another length than
    those the weights were trained on: positions are fixed, and the model's own.

    Raises:
        CheckpointError: no such file, damaged, unsafe, an encoder alone, or weights of another model: what differs is
            listed, by the sizes where the file says them.
    """
    path, state, config, official = _read(source, sums=True)
    known = config or {}
    if official:
        sizes = checkpoint.read_sizes(state, str(path))
        known = dataclasses.asdict(LogMelConfig(n_mels=sizes["n_mels"])) | sizes
    _check_whole(path, state)
    asked = model.config.to_dict()
    if different := [name for name in asked if name in _SIZES and known.get(name, asked[name]) != asked[name]]:
        told = ", ".join(f"{name} is {known[name]!r} there and {asked[name]!r} here" for name in different)
        raise CheckpointError(f"{path} holds weights of another model: {told}; make this one as it is there")
    own = model.state_dict()
    state |= {name: own[name] for name in checkpoint.POSITIONS}
    checkpoint.load_into(model, state, str(path))


def weights_sizes(source: str | os.PathLike[str], given: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The sizes of the model whose weights `load_weights` takes from there, as `MatpacConfig` names them.

    Args:
        source: as of `load_weights`.
        given: fields of `MatpacConfig` that are believed where the file does not say them; by default its heads have 64
            channels each, as official, a predictor of width 512 has 16, and its mels are those of its positions.
    """
    path, state, sizes, official = _read(source, sums=False)
    if sizes is None:
        _check_whole(path, state)
        sizes = checkpoint.read_sizes(state, str(path))
        sizes["num_heads"] = checkpoint.heads_by_rule(sizes["width"], given.get("num_heads"))
        if "predictor_width" in sizes:  # else what is missing is listed when it is loaded
            told = given.get("predictor_heads")
            sizes["predictor_heads"] = checkpoint.predictor_heads(sizes["predictor_width"], told)
        if not official:
            sizes["n_mels"] = given.get("n_mels", sizes["n_mels"])
    return {name: value for name, value in sizes.items() if name in _SIZES}


def _check_whole(path: Path, state: Mapping[str, Any]) -> None:
    if not any(name.startswith("predictor.") for name in state):
        raise CheckpointError(f"{path}: {_ALONE}")


def _read(source: str | os.PathLike[str], sums: bool) -> tuple[Path, dict[str, Any], dict[str, Any] | None, bool]:
    """The file, its weights by our names, the model's configuration where it says one, and whether it is official.

    `sums`: check a run's checkpoint by them; once is enough, where its sizes are asked for first.
    """
    source = _whole(source)
    if not os.path.exists(source) and source.partition(":")[0] in list_encoders():
        raise CheckpointError(f"{source}: {_ALONE}")
    with intact_named(source, _INIT):
        path = checkpoint.find_weights(source)
        state, metadata = checkpoint.load(path)
        if sums and (path.parent / "state.json").exists():  # of a run
            check_sums(path.parent, read_state(path.parent))
    official = "config" not in metadata and checkpoint.is_official(state)
    if official:
        state = checkpoint.from_official_names(state, str(path))
    config = stored_config(metadata, path)
    return path, state, None if config is None else config.to_dict(), official


def _whole(source: str | os.PathLike[str]) -> str:
    """Where a whole model lies, of the step that `source` may end in."""
    choice = parse(os.fspath(source))
    if choice.side is not None or choice.layer is not None:
        part = f"@{choice.side}" if choice.side is not None else f"@layer{choice.layer}"
        raise ConfigError(
            f"{os.fspath(source)}: a new run begins with the whole model, student and teacher; leave {part} out"
        )
    return choice.source()
