"""Progress for long commands: a bar with rate and time left on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, Protocol

from ._words import plain

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
    def __call__(self, done: float, total: int, note: str = "") -> None: ...


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

        rate_so_far = Rate()

        def update(done: float, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, rate=told_rate(rate_so_far(done)), note=note)

        yield update


@contextlib.contextmanager
def stages(units: Mapping[str, str], begin: str | None = None) -> Iterator[Callable[..., None]]:
    """Yield a function to be called with (stage, done, total) and a note: a bar for each stage, one after the other.
    `units` has what each stage counts; that of `begin` is there at once, before anything is counted."""
    with contextlib.ExitStack() as stack:
        now = begin
        update = stack.enter_context(progress(begin, units[begin])) if begin is not None else None

        def hear(stage: str, done: float, total: int, note: str = "") -> None:
            nonlocal now, update
            if stage != now or update is None:
                stack.close()
                now, update = stage, stack.enter_context(progress(stage, units[stage]))
            update(done, total, note)

        yield hear


@contextlib.contextmanager
def kept(what: str) -> Iterator[None]:
    """Where Ctrl-C ends what runs within, say that it is not lost: `what` begins the sentence."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{what} kept; the same command goes on from there", file=sys.stderr)
        raise


class Rate:
    """What is done a second since the first call, whose count an earlier run may have done in part."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None

    def __call__(self, done: float) -> float:
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        since, before = self._first
        return (done - before) / (now - since) if now > since else 0.0


def told_rate(rate: float) -> str:
    """In whichever unit is no fraction: "28/s", "3.5/s", "12 s each", "4.0 min each"; nothing where there is none."""
    if rate <= 0:
        return ""
    if rate >= 1:
        return f"{rate:.0f}/s" if rate >= 10 else f"{rate:.1f}/s"
    each = 1 / rate
    return f"{each / 60:.1f} min each" if each >= 60 else f"{each:.1f} s each"


class _Lines:
    """Plain lines for logs and pipes."""

    def __init__(self, console: Any, title: str, unit: str):
        self._console, self._title, self._unit = console, title, unit
        self._last = time.monotonic()
        self._rate = Rate()

    def __call__(self, done: float, total: int, note: str = "") -> None:
        rate = self._rate(done)
        if time.monotonic() - self._last < _EVERY_SECONDS:
            return
        self._last = time.monotonic()
        # Another worker's work, done again after it was thought lost, may make it more than all.
        left = timedelta(seconds=round(max(0.0, total - done) / rate)) if rate > 0 else None
        speed = "" if left is None else f", {told_rate(rate)}, {left} left"
        note = note and f"; {note}"
        count = f"{done:.1f}" if done % 1 else int(done)  # of long pieces, parts
        line = plain(f"{self._title} {count}/{total} {self._unit}{speed}{note}")
        self._console.print(line, markup=False, soft_wrap=True)
