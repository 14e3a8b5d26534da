"""What a run tells: one JSON object a line on disk, and a reporter for whoever watches."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoint import read_latest
from ..errors import CheckpointError, first_line
from ..files import atomic

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
    """Several reporters as one, told in order. One that fails is warned of once and told of what follows: whoever
    watches a run does not end it."""

    def __init__(self, *reporters: Reporter):
        nested = [r._reporters if type(r) is Reporters else [r] for r in reporters]
        self._reporters = [reporter for group in nested for reporter in group]
        self._failed: set[int] = set()
        self._untold: list[str] = []

    def step(self, step: int) -> None:
        self._tell("step", step)

    def record(self, record: Record) -> None:
        self._tell("record", record)

    def saved(self, folder: Path, step: int) -> None:
        self._tell("saved", folder, step)

    def close(self) -> None:
        self._tell("close")

    def failures(self) -> list[str]:
        """What has failed since this was asked last."""
        told, self._untold = self._untold, []
        return told

    def _tell(self, what: str, *args: Any) -> None:
        for i, reporter in enumerate(self._reporters):
            try:
                getattr(reporter, what)(*args)
            except Exception as error:  # there is no end to what a network raises
                if i not in self._failed:
                    self._failed.add(i)
                    kind = type(reporter).__name__
                    text = f"{kind}.{what} failed, training goes on: {type(error).__name__}: {first_line(error)}"
                    self._untold.append(text)
                    warnings.warn(text, stacklevel=3)


def read_log(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a log, none where there is no file; a line that is none, as a killed process leaves its last one,
    is passed over. NaN and infinity are the strings "nan", "inf" and "-inf".

    Args:
        path: log.jsonl of a run folder.
    """
    return list(iter_log(path))


def iter_log(path: str | os.PathLike[str]) -> Iterator[Record]:
    """As `read_log`, one by one: the log of a long run is many times as large in memory as on the disk."""
    for _, record in _lines(path):
        yield record


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, Record]]:
    """Each line that is a record, as it stands, and what it says."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                yield line.rstrip("\n") + "\n", json.loads(line)


class Log:
    """Appends records to a JSONL file, each handed to the system before the next step is logged.

    Args:
        path: the file, in the run's folder.
        keep_until: of what is there, keep the records up to this step: what a killed run did after its last checkpoint
            is done again, and would stand there twice. By default all are kept.
    """

    def __init__(self, path: Path, keep_until: int | None = None):
        if keep_until is not None:
            with atomic(path) as beside, open(beside, "w", encoding="utf-8") as kept:
                kept.writelines(line for line, record in _lines(path) if record.get("step", 0) <= keep_until)
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
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
