"""Types of the scripts' options: what cannot be is said before anything is measured."""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any


def count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from 1")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a positive number")
    return value


def device(text: str) -> Any:
    from matpac_fast.errors import ConfigError
    from matpac_fast.train.distributed import pick_device

    try:
        return pick_device(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def folder(text: str | Path) -> Path:
    """A folder to write into: it is made, and a file tried in it."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} is no folder to write into ({error.strerror})") from None
    return path


def output(text: str) -> Path:
    """A file to be written, in a folder as above."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; expected a file")
    folder(path.parent)
    return path


def there(text: str) -> Path:
    """A file to be read."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path}")
    return path
