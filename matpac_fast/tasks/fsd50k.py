"""FSD50K: 51,197 clips of 0.3 to 30 s, 200 classes of sound, several to a clip."""

from __future__ import annotations

import os

import numpy as np

from .task import DatasetError, Fold, Layout, Task

_CLIPS = {"dev": 40_966, "eval": 10_231}


def load(path: str | os.PathLike[str], partial: bool = False, seed: int = 0) -> Task:
    """The official folders: FSD50K.ground_truth (dev.csv, eval.csv, vocabulary.csv), FSD50K.dev_audio and .eval_audio.

    dev.csv says which clips train and which validate.
    """
    layout = Layout("fsd50k", path, partial)
    words = layout.rows("FSD50K.ground_truth/vocabulary.csv", ["index", "label", "mid"], header=False)
    classes = tuple(row["label"] for row in words)
    place = {label: i for i, label in enumerate(classes)}
    names: list[str] = []
    splits: list[str] = []
    labels: list[list[str]] = []
    for part, official in _CLIPS.items():
        table = f"FSD50K.ground_truth/{part}.csv"
        rows = layout.rows(table, ["fname", "labels", "split"] if part == "dev" else ["fname", "labels"])
        layout.count(table, "clips", len(rows), official)
        for row in rows:
            names.append(f"FSD50K.{part}_audio/{row['fname']}.wav")
            splits.append(row["split"] if part == "dev" else "test")
            labels.append(row["labels"].split(","))
            if unknown := [label for label in labels[-1] if label not in place]:
                raise DatasetError(f"fsd50k: {table} has a label {unknown[0]!r} that vocabulary.csv has not")
    kept, seconds = layout.audio(names, (0.2, 31.0))
    targets = np.zeros((len(kept), len(classes)), np.float32)
    for row, i in zip(targets, kept, strict=True):
        row[[place[label] for label in labels[i]]] = 1.0
    split = np.array(splits)[kept]
    return Task(
        name="fsd50k",
        kind="multi",
        classes=classes,
        paths=[layout.folder / names[i] for i in kept],
        targets=targets,
        groups=np.array([os.path.basename(names[i]) for i in kept]),
        folds=[Fold(*(np.flatnonzero(split == part) for part in ("train", "test", "val")))],
        seconds=seconds,
        left_out=layout.problems,
    )
