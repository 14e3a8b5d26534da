"""TAU Urban Acoustic Scenes 2020 Mobile, development set: 10 s, ten scenes, several devices, the official setup."""

from __future__ import annotations

import os

import numpy as np

from .task import DatasetError, Fold, Layout, Task, class_indices


def load(path: str | os.PathLike[str], partial: bool = False, seed: int = 0) -> Task:
    """The official folder: meta.csv, evaluation_setup/fold1_train.csv and fold1_evaluate.csv, audio/*.wav.

    Train and test are the official ones; the score is given for each device as well (a, b, c and s1 to s3 are heard in
    training, s4 to s6 are not). Recordings of one city and location are one group.
    """
    layout = Layout("tau2020", path, partial)
    listed = {row["filename"] for row in layout.rows("meta.csv", ["filename", "scene_label"], "\t")}
    rows, splits = [], []
    for split, table in (("train", "fold1_train.csv"), ("test", "fold1_evaluate.csv")):
        part = layout.rows(f"evaluation_setup/{table}", ["filename", "scene_label"], "\t")
        rows += part
        splits += [split] * len(part)
        strange = [row["filename"] for row in part if row["filename"] not in listed]
        layout.problems += [(f"evaluation_setup/{table}", f"altered: {name} is not in meta.csv") for name in strange]
    kept, seconds = layout.audio([row["filename"] for row in rows], (9.5, 10.5))
    rows = [rows[i] for i in kept]
    split = np.array(splits)[kept]
    groups, devices = [], []
    for row in rows:
        parts = os.path.splitext(os.path.basename(row["filename"]))[0].split("-")  # scene-city-location-segment-device
        if len(parts) != 5:
            raise DatasetError(f"tau2020: {row['filename']} is not named scene-city-location-segment-device")
        groups.append(f"{parts[1]}-{parts[2]}")
        devices.append(parts[4])
    classes, targets = class_indices([row["scene_label"] for row in rows])
    device = np.array(devices)
    return Task(
        name="tau2020",
        kind="single",
        classes=classes,
        paths=[layout.folder / row["filename"] for row in rows],
        targets=targets,
        groups=np.array(groups),
        folds=[Fold(np.flatnonzero(split == "train"), np.flatnonzero(split == "test"))],
        seconds=seconds,
        subsets={f"device {name}": device == name for name in np.unique(device[split == "test"])},
        left_out=layout.problems,
    )
