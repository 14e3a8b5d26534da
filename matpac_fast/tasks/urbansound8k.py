"""UrbanSound8K: 8732 clips of up to 4 s, ten classes of urban sound, ten official folds."""

from __future__ import annotations

import os

import numpy as np

from .task import Layout, Task, class_indices, rotate_folds

_CLIPS = 8732


def load(path: str | os.PathLike[str], partial: bool = False, seed: int = 0) -> Task:
    """The official folder: metadata/UrbanSound8K.csv and audio/fold1 to fold10. Never reshuffled: slices of one
    recording are in one fold."""
    layout = Layout("urbansound8k", path, partial)
    table = "metadata/UrbanSound8K.csv"
    rows = layout.rows(table, ["slice_file_name", "fsID", "fold", "class"])
    folds = np.array(layout.whole(table, rows, "fold"))
    layout.count(table, "clips", len(rows), _CLIPS)
    names = [f"audio/fold{row['fold']}/{row['slice_file_name']}" for row in rows]
    kept, seconds = layout.audio(names, (1e-3, 4.1))
    rows = [rows[i] for i in kept]
    classes, targets = class_indices([row["class"] for row in rows])
    return Task(
        name="urbansound8k",
        kind="single",
        classes=classes,
        paths=[layout.folder / names[i] for i in kept],
        targets=targets,
        # A recording's slices of one class are together; the official folds part a few recordings between classes.
        groups=np.array([f"{row['fold']}-{row['fsID']}" for row in rows]),
        folds=rotate_folds(folds[kept]),
        seconds=seconds,
        left_out=layout.problems,
    )
