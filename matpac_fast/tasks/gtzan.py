"""GTZAN, fault-filtered: 930 excerpts of 30 s, ten genres, 443 / 197 / 290 to train, validate and test."""

from __future__ import annotations

import os

import numpy as np

from .task import Layout, Task, class_indices, split_fold

_SPLITS = {"train": 443, "valid": 197, "test": 290}


def load(path: str | os.PathLike[str], partial: bool = False, seed: int = 0) -> Task:
    """The folder of genres (`genres/blues/blues.00000.wav`, or genres_original, or the genres themselves) and, in it,
    the lists of Sturm's and Kereliuk's fault-filtered split: train_filtered.txt, valid_filtered.txt, test_filtered.txt,
    a file a line. The data set comes without them; without them repeated and mislabelled excerpts, and artists that
    are in train and test, inflate every score.
    """
    layout = Layout("gtzan", path, partial)
    root = layout.first("genres", "genres_original", ".")
    names, splits = [], []
    for split, official in _SPLITS.items():
        table = layout.first(f"{split}_filtered.txt", f"GTZAN_split/{split}_filtered.txt")
        listed = [line.strip() for line in layout.text(table).splitlines() if line.strip()]
        layout.count(table, "clips", len(listed), official)
        for line in listed:
            stem = os.path.splitext(os.path.basename(line))[0]  # blues.00000, whatever folder and suffix the list has
            base = f"{root}/{stem.split('.')[0]}/{stem}"
            names.append(os.path.normpath(layout.first(f"{base}.wav", f"{base}.au")))
        splits += [split] * len(listed)
    kept, seconds = layout.audio(names, (29.0, 31.0))
    names = [names[i] for i in kept]
    split = np.array(splits)[kept]
    classes, targets = class_indices([os.path.basename(name).split(".")[0] for name in names])
    return Task(
        name="gtzan",
        kind="single",
        classes=classes,
        paths=[layout.folder / name for name in names],
        targets=targets,
        groups=np.array(names),
        folds=[split_fold(split)],
        seconds=seconds,
        left_out=layout.problems,
    )
