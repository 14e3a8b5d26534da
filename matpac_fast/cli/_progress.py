"""Progress for long commands: a bar with rate and time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, Protocol

_EVERY_SECONDS = 5.0  # between plain lines


def unbreakable_console(quiet: bool = False) -> Any:
    """A rich console that falls silent where nobody reads on, as behind `| head`: rich's own would end the process."""
    from rich.console import Console

    class Unbreakable(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            # Python flushes stdout when it exits, and would complain then.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return Unbreakable(highlight=False, quiet=quiet)


class Update(Protocol):
    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextlib.contextmanager
def progress(title: str, unit: str) -> Iterator[Update]:
    """Yield a function to be called with (done, total) and a note, as often as one likes and from any thread."""
    console = unbreakable_console()
    if not console.is_terminal:
        yield _Lines(console, title, unit)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    rate = TextColumn("{task.fields[rate]}")
    note = TextColumn("{task.fields[note]}")
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        rate,
        TimeRemainingColumn(),
        note,
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=None, rate="", note="")

        def update(done: int, total: int, note: str = "") -> None:
            speed = bar.tasks[0].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:.1f}/s" if speed else "", note=note)

        yield update


class _Lines:
    """Plain lines for logs and pipes."""

    def __init__(self, console: Any, title: str, unit: str):
        self._console, self._title, self._unit = console, title, unit
        self._began = self._last = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done  # what an earlier run had done tells nothing about the rate
        if now - self._last < _EVERY_SECONDS:
            return
        self._last = now
        rate = (done - self._first) / (now - self._began)
        left = f", {timedelta(seconds=round((total - done) / rate))} left" if rate > 0 else ""
        note = note and f"; {note}"
        self._console.print(
            f"{self._title} {done}/{total} {self._unit}, {rate:.1f}/s{left}{note}", markup=False, soft_wrap=True
        )
