"""Reporters that come with the package: curves as a picture beside the checkpoints, and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import warnings
from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..files import atomic
from .logs import Record, Reporter

# One panel each: its title, and what it shows of the lines of the log.
_PANELS = (
    ("loss", ("loss", "loss_pred", "loss_cls")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("lr",)),
    ("teacher: prototypes", ("teacher_perplexity", "prototypes_used")),
    ("teacher: effective rank", ("effective_rank",)),
    ("crops a second", ("crops_per_s",)),
)
_PROBE = (
    "probe accuracy",
    tuple(f"{of}_{score}" for of in ("student", "teacher", "statistics") for score in ("knn", "linear")),
)
_COLUMNS = 1000  # more than a panel is wide, in pixels


class Curves(Reporter):
    """Draws the run's log as curves.png in its folder, after each checkpoint and each probe that follows one.

    A picture that cannot be drawn is warned of once, and tried again at the next checkpoint.

    Raises:
        ConfigError: matplotlib is not installed.
    """

    def __init__(self) -> None:
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"curves.png needs matplotlib ({error}): pip install 'matpac_fast[plots]'") from error

        self._folder: Path | None = None
        self._warned = False
        self._shown = Shown()
        self._drawing = threading.Lock()  # a checkpoint is told of in a thread of its own

    def saved(self, folder: Path, step: int) -> None:
        self._folder = folder
        self._draw(folder)

    def record(self, record: Record) -> None:
        if self._folder is not None and record.get("event") == "probe":
            self._draw(self._folder)

    def _draw(self, folder: Path) -> None:
        try:
            with self._drawing:
                draw_curves(folder / "log.jsonl", folder / "curves.png", self._shown)
        except Exception as error:  # whatever it is, the run and its checkpoint are worth as much without their picture
            if not self._warned:
                self._warned = True
                told = f"{folder / 'curves.png'} could not be drawn, training goes on: {type(error).__name__}: {error}"
                warnings.warn(told, stacklevel=2)


class Shown:
    """What the curves show of a log, read on from where it was read last: a long run's is not read anew each time."""

    def __init__(self) -> None:
        self._file: tuple[int, int] | None = None  # device and inode
        self._forget()

    def _forget(self) -> None:
        self._end = 0  # of what is read, in bytes
        self._points: dict[str, tuple[array[float], array[float]]] = {}  # name -> steps, values
        self.lines = self.probes = 0

    def read(self, log: str | os.PathLike[str]) -> None:
        """What was written since; all, where it is another file than then."""
        with contextlib.suppress(FileNotFoundError), open(log, "rb") as file:
            now = os.fstat(file.fileno())
            if self._file != (now.st_dev, now.st_ino) or now.st_size < self._end:
                self._forget()
            self._file = now.st_dev, now.st_ino
            file.seek(self._end)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written
                self._end += len(line)
                try:
                    record = json.loads(line)
                except ValueError:  # none, as a killed process leaves its last one
                    continue
                self._add(record)

    def _add(self, record: Record) -> None:
        is_line, is_probe = "loss" in record, record.get("event") == "probe"
        self.lines += is_line
        self.probes += is_probe
        for _, names in [*_PANELS] * is_line + [_PROBE] * is_probe:
            for name in names:
                if name in record:
                    step, value = float(record["step"]), float(record[name])  # NaN is a gap in the curve
                    steps, values = self._points.setdefault(name, (array("d"), array("d")))
                    steps.append(step)
                    values.append(value)

    def curve(self, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Steps and values; of more than can be told apart the least and the greatest of each `_COLUMNS`-th part."""
        steps, values = (np.array(each) for each in self._points.get(name, ((), ())))
        part = len(values) // _COLUMNS
        if part < 3:
            return steps, values
        whole = part * _COLUMNS
        parts, first = values[:whole].reshape(_COLUMNS, part), np.arange(0, whole, part)
        ends = np.sort(np.stack([first + parts.argmin(1), first + parts.argmax(1)], axis=1), axis=1)
        at = np.concatenate([ends.ravel(), np.arange(whole, len(values))])
        return steps[at], values[at]


def draw_curves(log: str | os.PathLike[str], out: str | os.PathLike[str], shown: Shown | None = None) -> None:
    """The curves of a log as a PNG, none where it has no numbers yet; without matplotlib.pyplot, whose state belongs to
    the main thread. `shown`: of the same log, when it was drawn last."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = Shown() if shown is None else shown
    shown.read(log)
    panels = list(_PANELS) * bool(shown.lines) + [_PROBE] * bool(shown.probes)
    if not panels:  # stopped before the first line
        return
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, names) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, i + 1)
        for name in names:
            steps, values = shown.curve(name)
            if len(steps):
                axes.plot(steps, values, label=name, linewidth=1, marker="." if len(steps) < 30 else "")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=8)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:  # beside the title, where it covers no curve
            axes.legend(
                loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=7, frameon=False, borderaxespad=0.2,
                columnspacing=1.0, handlelength=1.5,
            )  # fmt: skip
    with atomic(out) as beside:
        figure.savefig(beside, format="png", dpi=100)


class TensorBoard(Reporter):
    """Writes every number of the log for TensorBoard into `folder`, and its events as text.

    Raises:
        ConfigError: tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"--tensorboard needs the package tensorboard ({error}): pip install 'matpac_fast[tensorboard]'"
            ) from error
        self._folder, self._make = os.fspath(folder), SummaryWriter
        self._writer: SummaryWriter | None = None

    def record(self, record: Record) -> None:
        step = record["step"]
        if self._writer is None:
            # What a killed run had written beyond its last checkpoint is done again, and would stand there twice.
            self._writer = self._make(self._folder, purge_step=step + 1)
        kind = record.get("event", "train")
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        if "text" in record:
            self._writer.add_text(kind, record["text"], step)

    def saved(self, folder: Path, step: int) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
