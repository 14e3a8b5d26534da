"""What is still whole of a run whose newest checkpoint is damaged."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from . import checkpoint, distcp
from .errors import CheckpointError


def _is_whole(folder: Path) -> bool:
    """Whether all of a checkpoint can be read."""
    try:
        if distcp.is_one(folder / checkpoint.PARTS):
            for prefix in ("model.", "optimizer."):
                distcp.load(folder / checkpoint.PARTS, prefix)
        else:
            for name in ("model", "optimizer"):
                checkpoint.load(folder / f"{name}.safetensors")
        json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (CheckpointError, OSError, json.JSONDecodeError):
        return False
    return True


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
        for folder in sorted(run.glob("checkpoints/step-*"), reverse=True):
            if folder != latest and folder.name[5:].isdigit() and _is_whole(folder):
                quoted = {name: shlex.quote(str(path)) for name, path in (("folder", folder), ("run", run))}
                told = way.format(name=folder.name, **quoted)
                raise CheckpointError(f"{error}. {folder.name} is intact: {told}") from None
        raise CheckpointError(f"{error}. No other checkpoint of {run} is intact") from None
