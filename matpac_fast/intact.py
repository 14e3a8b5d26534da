"""What is still whole of a run whose newest checkpoint is damaged."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import checkpoint, distcp
from .errors import CheckpointError
from .files import crc32


def _is_whole(folder: Path) -> bool:
    """Whether all of a checkpoint can be read."""
    try:
        if distcp.is_one(folder / checkpoint.PARTS):
            for prefix in ("model.", "optimizer."):
                distcp.load(folder / checkpoint.PARTS, prefix)
        else:
            for name in ("model", "optimizer"):
                checkpoint.load(folder / f"{name}.safetensors")
        check_sums(folder, read_state(folder))
    except CheckpointError:
        return False
    return True


def check_sums(folder: Path, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a file of a checkpoint, or a part that a process wrote, is gone or has other bytes
    than were written, by the sums in its state."""
    for name, sum_ in state.get("crc32", {}).items():
        path = folder / name
        try:
            found = crc32(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        if found != sum_:
            raise CheckpointError(f"{path}: damaged: its bytes have changed since they were written")


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint's state.json holds: its step, which is the folder's, the seconds until then, and the CRC-32 of
    its files.

    Raises:
        CheckpointError: it cannot be read, or is another checkpoint's.
    """
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        name = checkpoint.step_name(state["step"])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:  # ValueError: no JSON, or no UTF-8
        raise CheckpointError(f"{path}: damaged: {error}") from None
    if name != folder.name:
        raise CheckpointError(f"{path}: damaged: it is that of {name}")
    return state


@contextlib.contextmanager
def intact_named(source: str | os.PathLike[str], way: str) -> Iterator[None]:
    """Where a run's newest checkpoint is damaged, add the newest one that is not, and the way to it, to the error.

    Args:
        source: a run folder; for anything else nothing is added.
        way: what to do, with {folder} for the checkpoint, {name} for its name and {run} for the run.
    """
    try:
        yield
    except CheckpointError as error:
        run = Path(source)
        latest = run / "checkpoints" / checkpoint.read_latest(run)
        if latest == run / "checkpoints" or _is_whole(latest):
            raise
        for folder in reversed(checkpoint.checkpoints(run).values()):
            if folder != latest and _is_whole(folder):
                quoted = {name: shlex.quote(str(path)) for name, path in (("folder", folder), ("run", run))}
                told = way.format(name=folder.name, **quoted)
                raise CheckpointError(f"{error}. {folder.name} is intact: {told}") from None
        raise CheckpointError(f"{error}. No other checkpoint of {run} is intact") from None
