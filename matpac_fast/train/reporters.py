"""Reporters that come with the package: curves as a picture beside the checkpoints, and TensorBoard."""

from __future__ import annotations

import math
import os
import threading
import warnings
from pathlib import Path

from ..errors import ConfigError
from ..files import atomic
from .logs import Record, Reporter, read_log

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
                draw_curves(folder / "log.jsonl", folder / "curves.png")
        except Exception as error:  # whatever it is, the run and its checkpoint are worth as much without their picture
            if not self._warned:
                self._warned = True
                told = f"{folder / 'curves.png'} could not be drawn, training goes on: {type(error).__name__}: {error}"
                warnings.warn(told, stacklevel=2)


def draw_curves(log: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """The curves of a log as a PNG, none where it has no numbers yet; without matplotlib.pyplot, whose state belongs to
    the main thread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_log(log)
    lines = [record for record in records if "loss" in record]
    probes = [record for record in records if record.get("event") == "probe"]
    panels = [(title, names, lines) for title, names in _PANELS] * bool(lines) + [(*_PROBE, probes)] * bool(probes)
    if not panels:  # stopped before the first line
        return
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, names, shown) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, i + 1)
        for name in names:
            points = [(r["step"], float(r[name])) for r in shown if name in r]  # NaN is a gap in the curve
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1, marker="." if len(points) < 30 else "")
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
