"""Journal: what a run tells, to its log and to whoever watches, in its order."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from ..config import MatpacConfig
from ..nn.statistics import effective_rank
from .logs import Log, Record, Reporters
from .watch import collapse


class Journal:
    """The log of rank 0 and its reporters; the other ranks' tell nothing.

    Args:
        log: None on the other ranks.
        reporter: what fails in it is told as a warning, once.
        model: of the run; it says what is a collapse.
        beside: find effective ranks on the host, in a thread, and tell a step's line when that is done: a GPU's solver
            would hold up the training.
    """

    def __init__(self, log: Log | None, reporter: Reporters, model: MatpacConfig, beside: bool):
        self._log, self._reporter, self._model = log, reporter, model
        self._pool = ThreadPoolExecutor(1, "effective rank") if beside else None
        self._pending: tuple[Record, Future[float]] | None = None
        self._collapsed = False

    def tell(self, record: Record) -> None:
        """A line of the log, after all that was told before it."""
        self.settle()
        self._write(record)

    def tell_measured(self, values: Record, gram: Tensor | None) -> None:
        """A step's line, with the effective rank of its latents, from their `gram` (D, D) where there is one; and a
        warning where it shows that a collapse begins."""
        self.settle()
        if gram is None or self._log is None:
            self._measured(values)
        elif self._pool is None:
            self._measured({**values, "effective_rank": effective_rank(gram)})
        else:
            self._pending = values, self._pool.submit(effective_rank, gram.cpu())

    def settle(self, wait: bool = True) -> None:
        """Tell the line that waits for its effective rank, or without `wait` only if that is known."""
        if self._pending is not None and (wait or self._pending[1].done()):
            (values, rank), self._pending = self._pending, None
            self._measured({**values, "effective_rank": rank.result()})

    def sync(self) -> None:
        """Until all that was told is on the disk."""
        self.settle()
        if self._log is not None:
            self._log.sync()

    def close(self) -> None:
        with contextlib.suppress(Exception):  # what ended the run is the error to tell
            self.settle()
        if self._pool is not None:
            self._pool.shutdown()
        if self._log is not None:
            self._log.close()

    def _measured(self, values: Record) -> None:
        self._write(values)
        text = collapse(values, self._model.width, self._model.prototypes)
        if text and not self._collapsed:  # once when it begins, not on every line while it lasts
            self._write({"event": "warning", "step": values["step"], "text": text})
        self._collapsed = text is not None

    def _write(self, record: Record) -> None:
        if self._log is None:
            return
        step = {"step": record["step"]} if "step" in record else {}
        failures = [{"event": "warning", **step, "text": text} for text in self._reporter.failures()]
        for line in (*failures, record):
            self._log.write(line)
            self._reporter.record(line)
