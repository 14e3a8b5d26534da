"""torch's files, which are pickles: read as long as they are data, so that nothing in them is run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from .errors import CheckpointError, first_line


class _Skipped:
    """Stands for what a file holds beside its weights, whose values nobody needs."""

    def __init__(self, *args: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What lies beside the weights in some released files: numpy's numbers and arrays, under the names that numpy 1 and 2
# give what rebuilds them, and the arguments of older fairseq. None is built: numpy writes outside its memory where a
# pickle makes the items of an array's dtype larger.
_SKIPPED: list[Any] = [
    (_Skipped, name)
    for name in (
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.ndarray",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    )
]


def unpickle(path: str | os.PathLike[str]) -> Any:
    """The content of a torch file, or of the one in a zip archive, as long as it is data: nothing in the file is run.

    Numpy's numbers and arrays in it, and an argparse.Namespace, are skipped: something stands there, without a value.

    Raises:
        CheckpointError: a file that would run code, or is damaged.
    """
    try:
        with _skipping():
            return torch.load(_unpacked(path), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"an object of {name[1]}" if name else "more than tensors"
        raise CheckpointError(
            f"{path}: the pickle holds {what}, and loading it could run code, so it is refused; where the file is "
            "trusted, save its weights alone, with torch.save(model.state_dict(), ...) or as safetensors"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # there is no end to what damaged bytes raise
        raise CheckpointError(f"{path}: damaged torch checkpoint: {first_line(error)}") from None


_loading = threading.Lock()


@contextlib.contextmanager
def _skipping() -> Iterator[None]:
    """Meanwhile torch.load skips what is `_SKIPPED`.

    torch keeps what it allows for all of the process, so one thread loads at a time, and what the application itself
    has allowed stays; but for what it calls by the same names, which steps aside meanwhile.
    """
    with _loading:
        allowed = torch.serialization.get_safe_globals()
        aside = [entry for entry in allowed if _full_name(entry).startswith(("numpy.", "argparse."))]
        if aside:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals([entry for entry in allowed if entry not in aside])
        try:
            with torch.serialization.safe_globals(_SKIPPED):
                yield
        finally:
            torch.serialization.add_safe_globals(aside)


def _full_name(allowed: Any) -> str:
    return allowed[1] if isinstance(allowed, tuple) else f"{allowed.__module__}.{allowed.__qualname__}"


def _unpacked(path: str | os.PathLike[str]) -> str | os.PathLike[str] | io.BytesIO:
    """`path`, or the one torch file in an archive of other files, as M2D's weights are released; torch's own files are
    archives too.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # macOS adds what it knows of each file, by names that end alike.
            packed = [
                name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")
            ]
            if any(name.endswith("/data.pkl") for name in packed):
                return path
            weights = [name for name in packed if name.endswith((".pt", ".pth", ".ckpt"))]
            if len(weights) != 1:
                held = ", ".join(packed[:3]) + (", ..." if packed[3:] else "")
                raise CheckpointError(
                    f"{path}: an archive, of {held or 'nothing'}; unpack it and give the file of weights"
                )
            return io.BytesIO(archive.read(weights[0]))
    except zipfile.BadZipFile:
        return path  # torch says what is wrong
