"""What judges the encoders while they are trained: a function of the user's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..config import MatpacConfig
from ..files import number_for_json
from ..model import Matpac
from .distributed import whole
from .logs import Record
from .watch import TrainingError

# (Their weights, whole and by name: a copy, which it may change; the model's configuration) -> numbers for the log.
Probe = Callable[[Mapping[str, Tensor], MatpacConfig], Record]
_PARTS = ("frontend.", "student.", "teacher.")


def ask(probe: Probe | None, model: Matpac) -> Record | None:
    """The probe's answer, with Python's numbers for those of NumPy and torch. Every rank must ask, most of them with no
    probe, for FSDP hands out whole weights to all or none.

    Raises:
        TrainingError: the answer holds what the log cannot.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith(_PARTS):
            tensor = whole(tensor.detach())
            if probe is not None:
                state[name] = tensor.clone()
    return None if probe is None else _checked(probe(state, model.config), probe)


def _checked(found: Any, probe: Probe) -> Record:
    returned = f"probe {getattr(probe, '__qualname__', type(probe).__qualname__)} returned"
    if not isinstance(found, Mapping):
        raise TrainingError(f"{returned} {found!r}; expected a dictionary of numbers for the log")
    values = {}
    for key, value in found.items():
        try:
            values[key] = json.loads(json.dumps(value, default=number_for_json))
        except (TypeError, ValueError):
            raise TrainingError(f"{returned} {value!r} as {key!r}; expected a number for the log") from None
    return values
