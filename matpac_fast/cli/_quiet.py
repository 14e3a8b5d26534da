"""Keeps C libraries from writing into the midst of a progress bar."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence what C code writes to stderr; Python's own stderr goes on as before.

    The MP3 decoder remarks on odd files there, without their names. What matters of it becomes a reason, with the file.
    MATPAC_FAST_DEBUG=1 lets it through.
    """
    ours = sys.stderr
    try:
        quiet = os.environ.get("MATPAC_FAST_DEBUG") != "1" and ours.fileno() == 2
    except (OSError, ValueError):  # no real file, as in a notebook
        quiet = False
    if not quiet:
        yield
        return
    ours.flush()
    real = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        with open(real, "w", buffering=1, closefd=False, encoding=ours.encoding, errors=ours.errors) as sys.stderr:
            yield
    finally:
        sys.stderr = ours
        os.dup2(real, 2)
        os.close(real)
