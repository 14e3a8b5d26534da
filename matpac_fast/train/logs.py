"""What a run tells: one JSON object a line on disk, and a reporter for whoever watches."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint import read_latest
from ..errors import CheckpointError
from ..files import write_text

Record = dict[str, Any]


class Reporter:
    """Hears what a run does; the base class ignores it all. The command line's draws a progress bar."""

    def step(self, step: int) -> None:
        """`step` steps are done; called after every one, so it must be cheap."""

    def record(self, record: Record) -> None:
        """A line of the log: a measurement (it has "loss") or an event (it has "event")."""

    def saved(self, folder: Path, step: int) -> None:
        """The checkpoint of `step` is on the disk in the run folder; called in a thread beside the training."""

    def close(self) -> None:
        """The run has ended, however it did."""


class Reporters(Reporter):
    """Several reporters as one, told in order."""

    def __init__(self, *reporters: Reporter):
        self._reporters = reporters

    def step(self, step: int) -> None:
        for reporter in self._reporters:
            reporter.step(step)

    def record(self, record: Record) -> None:
        for reporter in self._reporters:
            reporter.record(record)

    def saved(self, folder: Path, step: int) -> None:
        for reporter in self._reporters:
            reporter.saved(folder, step)

    def close(self) -> None:
        for reporter in self._reporters:
            reporter.close()


def versions() -> dict[str, str]:
    """The versions that a result may depend on."""
    import numpy
    import torch

    from .. import __version__

    return {
        "matpac_fast": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def read_log(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a log, none where there is no file; a line that is none, as a killed process leaves its last one,
    is passed over. NaN and infinity are the strings "nan", "inf" and "-inf".

    Args:
        path: log.jsonl of a run folder.
    """
    records = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class Log:
    """Appends records to a JSONL file, each handed to the system before the next step is logged.

    Args:
        path: the file, in the run's folder.
        keep_until: of what is there, keep the records up to this step: what a killed run did after its last checkpoint
            is done again, and would stand there twice. By default all are kept.
    """

    def __init__(self, path: Path, keep_until: int | None = None):
        if keep_until is not None:
            kept = [record for record in read_log(path) if record.get("step", 0) <= keep_until]
            write_text(path, "".join(_line(record) for record in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, record: Record) -> None:
        with self._failing():
            self._file.write(_line(record))
            self._file.flush()

    def sync(self) -> None:
        """Until all of it is on the disk."""
        with self._failing():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written was said by `write`
            self._file.close()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            latest = read_latest(Path(self._file.name).parent)
            intact = f"; {latest} is intact" if latest else ""
            raise CheckpointError(f"{self._file.name}: cannot be written: {error.strerror}{intact}") from error


def _line(record: Record) -> str:
    return json.dumps(_plain(record), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
