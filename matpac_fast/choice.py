"""What the end of a name chooses: a step of a run, a side of the model, a layer of the encoder.

"runs/a@20000" is the run's checkpoint of that step, "runs/a@teacher" the newest one's teacher, "runs/a@layer6" the
encoder up to its sixth block; several go one behind the other, in any order: "runs/a@20000@teacher@layer6". An existing
path is one, whatever it ends in.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from .checkpoint import checkpoints, step_name
from .errors import CheckpointError

_ENDING = re.compile(r"(.+)@(student|teacher|[0-9]{1,15}|layer[0-9]{1,4})", re.DOTALL)
ENDINGS = "@teacher, @student, @STEP such as @20000, and @layerN such as @layer6"
_NAMED = 20  # steps that an error lists


class Choice(NamedTuple):
    """A name in its parts."""

    path: str
    ending: str = ""  # as it is written, "@20000@teacher"
    step: int | None = None  # None: the newest
    side: str | None = None  # "student", "teacher", or None: it is not said
    layer: int | None = None  # from 1; None: the last

    def source(self) -> str:
        """`path`, or the folder of its checkpoint of `step`; where nothing is, who reads it will say so.

        Raises:
            CheckpointError: `path` is no run, or has no checkpoint of that step.
        """
        if self.step is None or not os.path.exists(self.path):
            return self.path
        folder = Path(self.path, "checkpoints", step_name(self.step))
        if folder.is_dir():
            return os.fspath(folder)
        if not (steps := list(checkpoints(self.path))):
            raise CheckpointError(
                f"{self.path}: holds no checkpoints, so none of step {self.step}; expected a run of "
                f"`matpac-fast pretrain`, or a name without @{self.step}"
            )
        more = f", and {len(steps) - _NAMED} before them" if len(steps) > _NAMED else ""
        raise CheckpointError(
            f"{self.path}: no checkpoint of step {self.step}; there are {', '.join(map(str, steps[-_NAMED:]))}{more}"
        )


def parse(name: str) -> Choice:
    """`name` in its parts; a second step, side or layer is left in its path, which then is none."""
    path, chosen = name, {}
    while not os.path.exists(path) and (found := _ENDING.fullmatch(path)) is not None:
        kind, value = "side", found[2]
        if value.isdecimal():
            kind, value = "step", int(value)
        elif value.startswith("layer"):
            kind, value = "layer", int(value[5:])
        if kind in chosen:
            break
        path, chosen[kind] = found[1], value
    return Choice(path, name[len(path) :], **chosen)
