"""Weights in and out: safetensors by default, the official formats both ways, and no file that runs code.

What a file is, is read from its content: never from its name.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import distcp, pickles
from .errors import CheckpointError, ConfigError
from .files import atomic, number_for_json
from .nn.vit import sincos_positions

# Official name -> ours, by prefix, longest first. The official code calls the predictor "decoder".
_PREFIXES = (
    ("patch_embed.", "frontend.patch_embed."),
    ("cls_token", "frontend.cls_token"),
    ("pos_embed", "frontend.pos_embed"),
    ("student_encoder.", "student."),
    ("decoder.decoder_pos_embed", "predictor.pos_embed"),
    ("decoder.decoder_embed.", "predictor.embed."),
    ("decoder.decoder_blocks.", "predictor.blocks."),
    ("decoder.decoder_norm.", "predictor.norm."),
    ("decoder.decoder_pred.", "predictor.out."),
    ("decoder.mask_token", "predictor.mask_token"),
    ("mcl_heads.mcl_heads.", "predictor.mcl_heads."),
    ("cls_head_loss.center", "center"),
    ("cls_student_head.", "head."),
    ("_ema.", "teacher."),
    ("_cls_head_ema.", "teacher_head."),
)
_NESTED = ("_ema", "_cls_head_ema")
# Fixed sines, which follow from the sizes: a model for another length of crop has its own.
POSITIONS = ("frontend.pos_embed", "predictor.pos_embed")

_NAMED = 8  # entries that an error's line names
PARTS = "parts"  # in a checkpoint's folder, what the processes of a sharded training wrote


def from_official_names(state: Mapping[str, Any], name: str = "the checkpoint") -> dict[str, Tensor]:
    """Official names, nested or flat, -> ours. A name that is not known raises CheckpointError, which `name` begins."""
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": tensor for inner, tensor in value.items()})
        else:
            flat[key] = value
    not_official = f"{name}: not an official MATPAC checkpoint"
    if odd := [key for key, value in flat.items() if not isinstance(value, Tensor)]:
        raise CheckpointError(f"{not_official}: {len(odd)} of its names hold no tensor: {_some(odd)}")
    ours: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in flat.items():
        for theirs, mine in _PREFIXES:
            if key.startswith(theirs):
                ours[mine + key[len(theirs) :]] = tensor
                break
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(f"{not_official}: {len(unknown)} unknown names: {_some(unknown)}")
    if "center" in ours:
        ours["center"] = ours["center"].reshape(-1)
    return ours


def to_official_names(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Ours -> official names; the teachers under `_ema` and `_cls_head_ema` as dictionaries, as fairseq stores them."""
    official: dict[str, Any] = {}
    for name, tensor in state.items():
        theirs, mine = next(pair for pair in _PREFIXES if name.startswith(pair[1]))
        full = theirs + name[len(mine) :]
        outer, _, inner = full.partition(".")
        if full == "cls_head_loss.center":
            official[full] = tensor.reshape(1, 1, -1)
        elif outer in _NESTED:
            official.setdefault(outer, {})[inner] = tensor
        else:
            official[full] = tensor
    return official


def is_official(state: Mapping[str, Any]) -> bool:
    """Whether the names are those of the official MATPAC code, training or inference."""
    return "patch_embed.proj.weight" in state and any(name.startswith("student_encoder.") for name in state)


def read_sizes(state: Mapping[str, Tensor], source: str = "the checkpoint") -> dict[str, int]:
    """The model's sizes, read off the shapes of a state with our names; predictor and head only where present."""
    try:
        width, _, patch_size, _ = state["frontend.patch_embed.proj.weight"].shape
        sizes = {
            "width": width,
            "patch_size": patch_size,
            "depth": _count(state, r"student\.blocks\.(\d+)\."),
            "mlp_ratio": state["student.blocks.0.mlp.fc1.weight"].shape[0] // width,
        }
        freq, time = _grid(state["frontend.pos_embed"], patch_size, source)
        sizes |= {"n_mels": freq * patch_size, "n_frames": time * patch_size}
        if "predictor.embed.weight" in state:
            sizes |= {
                "predictor_width": state["predictor.embed.weight"].shape[0],
                "predictor_depth": _count(state, r"predictor\.blocks\.(\d+)\."),
                "mcl_heads": _count(state, r"predictor\.mcl_heads\.(\d+)\."),
            }
        if "head.mlp.0.weight" in state:
            prototypes, bottleneck = state["head.last_layer.weight_v"].shape
            sizes |= {"head_hidden": state["head.mlp.0.weight"].shape[0]}
            sizes |= {"head_bottleneck": bottleneck, "prototypes": prototypes}
    except KeyError as error:
        raise CheckpointError(f"{source} has no {error.args[0]!r}, so its sizes cannot be read") from None
    except (AttributeError, ValueError, IndexError, ZeroDivisionError):  # no tensor, or one of other axes
        raise CheckpointError(f"{source}: its tensors have not MATPAC's axes, so its sizes cannot be read") from None
    return sizes


def _count(state: Iterable[str], pattern: str) -> int:
    """How many there are, whatever their numbers: a name may say any."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _grid(pos: Tensor, patch_size: int, source: str) -> tuple[int, int]:
    """(frequency, time) patches of positions (1, 1 + N, D), as their sines tell; without sines, those of 80 mels."""
    tokens, freq = pos.shape[1] - 1, 80 // patch_size
    if told := _grid_of_sines(pos):
        return told
    if freq < 1 or tokens % freq:
        raise CheckpointError(f"{source}: its {tokens} positions are no grid of patches of {patch_size} on 80 mels")
    return freq, tokens // freq


def _grid_of_sines(pos: Tensor) -> tuple[int, int] | None:
    """The grid whose `sincos_positions` these are, or None."""
    if pos.ndim != 3 or pos.shape[2] % 4 or not pos.is_floating_point() or not is_whole(pos):
        return None
    time_code = pos[0, 1:, : pos.shape[2] // 2]  # of the first frequency, of the second, ...
    again = (time_code[1:] == time_code[:1]).all(-1).nonzero()
    time = int(again[0]) + 1 if len(again) else len(time_code)
    if not time or len(time_code) % time:
        return None
    freq = len(time_code) // time
    with torch.device(pos.device):
        sines = sincos_positions(pos.shape[2], freq, time)
    fits = torch.allclose(pos.float(), sines.float(), rtol=0, atol=5e-3)  # they may have been kept in 16 bits
    return (freq, time) if fits else None


def is_whole(tensor: Tensor) -> bool:
    """Whether it is dense and its memory holds each of its numbers; a pickle may repeat one without end."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


_PER_HEAD = 64  # channels


def heads_by_rule(width: int, given: int | None) -> int:
    """Attention heads: as given, else of 64 channels each, the official rule."""
    if given is not None:
        if not isinstance(given, int) or given < 1 or width % given:
            raise ConfigError(f"num_heads is {given!r}; expected a whole number that divides the width, {width}")
        return given
    if width % _PER_HEAD:
        raise CheckpointError(
            f"a width of {width} does not divide into heads of {_PER_HEAD} channels, the official rule: "
            "give the number of heads"
        )
    return width // _PER_HEAD


def predictor_heads(width: int, given: int | None) -> int:
    """The predictor's attention heads, which no official file says: as given, or the 16 of the official width, 512."""
    if given is None and width != 512:
        ours = max(1, width // 32)
        raise CheckpointError(
            f"the checkpoint does not say how many attention heads its predictor of width {width} has, and 16 are the "
            f"official ones of width 512: give predictor_heads; this package's presets have {ours} there, which to "
            f"pretrain is --set model.predictor_heads={ours}"
        )
    return 16 if given is None else given


def load_into(module: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Strict load: missing, unexpected or misshapen entries raise one CheckpointError that lists them."""
    check_fits(module.state_dict(), state, source)
    module.load_state_dict(state)


def check_fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Raise what `load_into` raises where `state` does not have the names and shapes of `own`."""
    problems = []
    if missing := [name for name in own if name not in state]:
        problems.append(f"{len(missing)} missing: {_some(missing)}")
    if unexpected := [name for name in state if name not in own]:
        problems.append(f"{len(unexpected)} unexpected: {_some(unexpected)}")
    if misshapen := [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]:
        problems.append(f"{len(misshapen)} of another shape: {_some(misshapen)}")
    if problems:
        raise CheckpointError(f"{source} does not fit this model; {'; '.join(problems)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f", and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def state_to_save(module: torch.nn.Module, made: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A module's state, by the names that it has without torch.compile.

    Raises:
        CheckpointError: FSDP has cut it, it is quantized, or its names and shapes are not those of `made`, its state
            when it was made.
    """
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in module.state_dict().items()}
    if any(hasattr(tensor, "to_local") for tensor in state.values()):
        raise CheckpointError(
            "save: FSDP has cut the weights: gather them on every rank by torch.distributed.checkpoint.state_dict."
            "get_model_state_dict with full_state_dict=True, load them into a model of its own, and save that"
        )
    if odd := [name for name, tensor in state.items() if not isinstance(tensor, Tensor) or tensor.is_quantized]:
        raise CheckpointError(f"save: {odd[0]} is quantized; expected plain weights: save it before quantize_dynamic")
    if made is not None:
        check_fits(made, state, "save: put back the layers that were replaced or parametrized; what they hold now")
    return state


def save(path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file, all of it or none; `metadata` goes into its header as JSON under "matpac_fast"."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic(path) as beside:
        save_file(tensors, beside, {"matpac_fast": json.dumps(metadata, sort_keys=True, default=number_for_json)})


def check_name(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError where safetensors would write to a path and not read from it."""
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(
            f"{os.fspath(path)}: weights are not read from where a name is not UTF-8; rename it"
        ) from None


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read weights onto the CPU: (state, metadata). safetensors, a torch file of plain tensors, by itself or as the one
    in a zip archive, or the folder that the processes of a sharded training wrote together.

    A training checkpoint gives its "model" entry, and its "cfg" as metadata. Metadata is empty for other files that
    this package did not write.

    Raises:
        CheckpointError: no such file, damaged, or a pickle that would run code.
    """
    path = Path(path)
    if distcp.is_one(path):
        return distcp.load(path, "model.")
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a pipe, opening it would wait for ever
            raise CheckpointError(f"{path}: not a regular file; expected a file of weights or a run folder")
        with open(path, "rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if start[8:9] == b"{":
        return _load_safetensors(path)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return _load_pickle(path)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: Git LFS's pointer to the file and not the file itself; git lfs pull brings that"
        )
    raise CheckpointError(f"{path}: neither a safetensors file nor a torch checkpoint")


def _load_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    check_name(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("matpac_fast", "{}"))
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of 5000 digits
        raise CheckpointError(f"{path}: damaged safetensors file: {error}") from None
    if not isinstance(metadata, dict):
        raise CheckpointError(
            f"{path}: damaged safetensors file: its metadata is a {type(metadata).__name__}, no object"
        )
    return state, metadata


def _load_pickle(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    content, metadata = pickles.unpickle(path), {}
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        metadata = {"cfg": content["cfg"]} if isinstance(content.get("cfg"), Mapping) else {}
        content = content["model"]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, (Tensor, Mapping)) for name, value in content.items()
    ):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, or a training checkpoint with one under 'model'"
        )
    return dict(content), metadata


def find_weights(path: str | os.PathLike[str]) -> Path:
    """What of `path` holds the weights: itself, or the newest complete checkpoint of a run folder."""
    path = Path(path)
    if not path.is_dir() or distcp.is_one(path):
        return path
    latest = read_latest(path)
    if latest:
        path = path / "checkpoints" / latest
    if distcp.is_one(path / PARTS):
        return path / PARTS
    if latest or (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    raise CheckpointError(f"{path}: a folder without a checkpoint; expected a run of `matpac-fast pretrain`")


def step_name(step: int) -> str:
    """What the checkpoint of a step is called, in the folder checkpoints/ of its run."""
    return f"step-{step:08d}"


def checkpoints(run: str | os.PathLike[str]) -> dict[int, Path]:
    """A run's checkpoints by their steps, the oldest first; folders of other names are somebody's copies."""
    found = {int(p.name[5:]): p for p in Path(run).glob("checkpoints/step-*") if p.name[5:].isdecimal()}
    return dict(sorted(found.items()))


def read_latest(run: Path) -> str:
    """The name of a run's newest checkpoint, "" where there is none.

    It stands in the file `latest`. Where that is lost, as from a copy of the run, it is the last of the checkpoints
    that are there: none gets its name before all of it is on the disk.

    Raises:
        CheckpointError: `latest` is there and cannot be read.
    """
    try:
        name = (run / "latest").read_text(encoding="utf-8", errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        name = ""
    except OSError as error:
        raise CheckpointError(f"{run / 'latest'}: cannot be read: {error.strerror}") from None
    return name or next((path.name for path in reversed(checkpoints(run).values())), "")
