"""ESC-50: 2000 clips of 5 s, 50 classes of environmental sound, five official folds."""

from __future__ import annotations

import os

import numpy as np

from .task import Layout, Task, class_indices, rotate_folds

_CLIPS = 2000


def load(path: str | os.PathLike[str], partial: bool = False, seed: int = 0) -> Task:
    """The official folder: meta/esc50.csv and audio/*.wav. Clips cut from one recording are in one fold already."""
    layout = Layout("esc50", path, partial)
    table = "meta/esc50.csv"
    rows = layout.rows(table, ["filename", "fold", "category", "src_file"])
    folds = np.array(layout.whole(table, rows, "fold"))
    layout.count(table, "clips", len(rows), _CLIPS)
    names = [f"audio/{row['filename']}" for row in rows]
    kept, seconds = layout.audio(names, (4.9, 5.1))
    rows = [rows[i] for i in kept]
    classes, targets = class_indices([row["category"] for row in rows])
    return Task(
        name="esc50",
        kind="single",
        classes=classes,
        paths=[layout.folder / "audio" / row["filename"] for row in rows],
        targets=targets,
        groups=np.array([row["src_file"] for row in rows]),
        folds=rotate_folds(folds[kept]),
        seconds=seconds,
        left_out=layout.problems,
    )
