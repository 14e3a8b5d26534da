"""Checkpoints of which every process writes its own part, by torch.distributed.checkpoint; reading them runs no code.

A folder with one `.distcp` file a process, `.metadata`, which says what lies where in them, and matpac_fast.json.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .errors import CheckpointError, first_line
from .files import sync_folder, write_text

_ABOUT = "matpac_fast.json"

# What `.metadata`, a pickle, may name: torch's descriptions of tensors and files, which hold data and run nothing.
_DATA = {
    "torch.distributed.checkpoint.metadata": [
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    ],
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.serialization": ["_get_layout"],
    "torch": ["Size", "float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"],
    "pathlib": ["PosixPath"],
    "pathlib._local": ["PosixPath"],  # in Python 3.13
}


def _member(of: Any, name: Any) -> Any:
    """What stands for `getattr`, by which Python 3.11.0 to 3.11.3 write a member of an Enum: that, and nothing else."""
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    if of is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"it names {name!r} of {of!r}")
    return _MEM_FORMAT_ENCODING[name]


_InPython: Any = pickle._Unpickler  # its opcodes can be overridden, those of the one in C cannot


class _Unpickler(_InPython):
    dispatch: ClassVar = dict(_InPython.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _DATA.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set attributes, of descriptions alone: those of a class or of an Enum's member are the whole process's."""
        what = self.stack[-2]
        if isinstance(what, type) or not dataclasses.is_dataclass(what):
            raise pickle.UnpicklingError(f"it names attributes of {what!r}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def is_one(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds such a checkpoint."""
    return (Path(folder) / ".metadata").is_file()


def save(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], group: Any = None
) -> None:
    """Write this process's parts of `tensors` and, where they are not cut, what is this process's share of the work.

    Every process of `group` must call it with the same names. When it returns on the first one, all is on the disk.

    Args:
        folder: a new one, on a disk that all processes share.
        tensors: by name; those that FSDP has cut as the DTensors that they are.
        metadata: for people and for `load`, as JSON.

    Raises:
        OSError: some process's disk is full or failing.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    folder = Path(folder)
    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder, overwrite=False), process_group=group)
    except CheckpointException as error:  # a BaseException, with every process's reason
        rank, (reason, _) = min(error.failures.items())
        if isinstance(reason.__context__, OSError):  # torch's own file format reports a write that failed as its error
            reason = reason.__context__
        strerror = getattr(reason, "strerror", None) or str(reason)
        if "inline_container" in strerror:  # of another process, whose context does not come along
            strerror = f"a write failed, as on a full disk: {strerror.splitlines()[0]}"
        raise OSError(getattr(reason, "errno", None), f"{strerror} (rank {rank})") from error
    if group is None or torch.distributed.get_rank(group) == 0:
        write_text(folder / _ABOUT, json.dumps(metadata, sort_keys=True) + "\n")
        sync_folder(folder)


def shapes(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Tensors without memory, of the shapes and dtypes that `folder` holds, by name."""
    entries = _read_metadata(Path(folder)).state_dict_metadata
    try:
        return {name: torch.empty(e.size, dtype=e.properties.dtype, device="meta") for name, e in entries.items()}
    except (AttributeError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: damaged: {first_line(error)}") from None


def fill(tensors: Mapping[str, Tensor], folder: str | os.PathLike[str]) -> None:
    """Read into `tensors`, in place, what of each this process holds: all, or where it is a DTensor, its shard.

    It asks no other process, so any number of them may read what any number has written.

    Raises:
        CheckpointError: a name that is not there, another shape, a damaged file, or one that would run code.
    """
    import torch.distributed.checkpoint as dcp

    folder = Path(folder)
    metadata = _read_metadata(folder)
    state = {name: tensor.detach() for name, tensor in tensors.items()}
    reader, planner = dcp.FileSystemReader(folder), dcp.DefaultLoadPlanner()
    try:
        planner.set_up_planner(state, metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        plan = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])[0]
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    except Exception as error:  # there is no end to what damaged files raise
        raise CheckpointError(f"{folder}: damaged: {first_line(error)}") from None


def load(folder: str | os.PathLike[str], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Whole tensors on the CPU, and the metadata: of the names that begin with `prefix`, without it.

    Raises:
        CheckpointError: as `fill`.
    """
    folder = Path(folder)
    named = {name: tensor for name, tensor in shapes(folder).items() if name.startswith(prefix)}
    try:
        wanted = {name: torch.empty_like(tensor, device="cpu") for name, tensor in named.items()}
    except RuntimeError as error:  # a size beyond all memory
        raise CheckpointError(f"{folder}: damaged: {first_line(error)}") from None
    fill(wanted, folder)
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder / _ABOUT}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise CheckpointError(f"{folder / _ABOUT}: damaged: {error}") from None
    if not isinstance(about, dict):
        raise CheckpointError(f"{folder / _ABOUT}: damaged: it is a {type(about).__name__}, no object")
    return {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}, about


def _read_metadata(folder: Path) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError as error:
        reason = f"the pickle is more than a description of tensors, {error}, so it is refused"
        raise CheckpointError(f"{path}: {reason if 'names' in str(error) else 'damaged'}") from None
    except Exception as error:  # there is no end to what damaged opcodes raise
        raise CheckpointError(f"{path}: damaged: {error}") from None
    entries = getattr(found, "state_dict_metadata", None) if isinstance(found, Metadata) else None
    if not isinstance(entries, dict) or not all(
        isinstance(name, str) and isinstance(entry, TensorStorageMetadata) for name, entry in entries.items()
    ):
        raise CheckpointError(f"{path}: damaged: it holds no description of tensors")
    return found
