"""`hear:PATH`: a task of the HEAR benchmark (2203.03022) whose labels are of whole clips, in its released layout."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from .task import ANY_LENGTH, SPLITS, DatasetError, Layout, Task, rotate_folds, split_fold

_METADATA, _VOCABULARY = "task_metadata.json", "labelvocabulary.csv"
_OFF = 0.1  # seconds that a clip may differ from the length to which all were cut or padded


def load(path: str | os.PathLike[str], partial: bool = False, seed: int = 0) -> Task:
    """One task's folder, such as tasks/esc50-v2.0.0-full: task_metadata.json, labelvocabulary.csv, for each split or
    fold a JSON file of its clips' labels, and the clips below 48000/ or another sample rate; the highest is taken.

    Folds rotate as in the benchmark: each tests once, the next one validates. It says nothing of which clips belong
    together, so each is a group of its own.

    Raises:
        DatasetError: a task whose labels have times in the clip ("event"); what is missing or altered.
    """
    layout = Layout("hear", path, partial)
    about = layout.json(_METADATA)
    if not isinstance(about, dict):
        raise layout.altered(_METADATA, "it", "no object", "an object with split_mode, splits and more")
    if _one_of(layout, about, "embedding_type", "scene", "event") == "event":
        raise DatasetError(
            f"hear: {layout.folder} asks when in a clip something is heard (embedding_type 'event'); expected a task "
            "of whole clips, 'scene'"
        )
    multi = _one_of(layout, about, "prediction_type", "multiclass", "multilabel") == "multilabel"
    fixed = _one_of(layout, about, "split_mode", "trainvaltest", "new_split_kfold", "presplit_kfold") == "trainvaltest"
    splits = about.get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise layout.altered(_METADATA, "splits", repr(splits), "a list of names")
    if fixed and sorted(splits) != sorted(SPLITS):
        raise layout.altered(_METADATA, "splits", repr(splits), "train, valid and test")
    classes = _classes(layout)
    rate = max((name for name in os.listdir(layout.folder) if name.isdecimal()), key=int, default="48000")
    names, labels, split_of = [], [], []
    for split in sorted(splits):
        for name, told in _labels(layout, f"{split}.json", classes, multi).items():
            names.append(f"{rate}/{split}/{name}")
            labels.append(told)
            split_of.append(split)
    kept, seconds = layout.audio(names, _lengths(about.get("sample_duration")))
    names = [names[i] for i in kept]
    split = np.array(split_of)[kept]
    return Task(
        name=layout.folder.resolve().name,
        kind="multi" if multi else "single",
        classes=tuple(classes),
        paths=[layout.folder / name for name in names],
        targets=np.array(labels)[kept],
        groups=np.array(names),
        folds=[split_fold(split)] if fixed else rotate_folds(split),
        seconds=seconds,
        left_out=layout.problems,
    )


def _one_of(layout: Layout, about: dict[str, Any], field: str, *known: str) -> str:
    value = about.get(field)
    if value not in known:
        raise layout.altered(_METADATA, field, repr(value), " or ".join(known))
    return value


def _lengths(duration: object) -> tuple[float, float]:
    """In which range clips are long, where they were cut and padded to one length; else any."""
    if isinstance(duration, (int, float)):
        return duration - _OFF, duration + _OFF
    return ANY_LENGTH


def _classes(layout: Layout) -> dict[str, int]:
    """Their places by their names."""
    rows = layout.rows(_VOCABULARY, ["idx", "label"])
    places = dict(zip((row["label"] for row in rows), layout.whole(_VOCABULARY, rows, "idx"), strict=True))
    if sorted(places.values()) != list(range(len(rows))) or len(rows) < 2:
        raise layout.altered(_VOCABULARY, "idx", f"{len(rows)} rows", "0, 1, 2, ... of two or more labels, each once")
    return dict(sorted(places.items(), key=lambda item: item[1]))


def _labels(layout: Layout, file: str, classes: dict[str, int], multi: bool) -> dict[str, Any]:
    """Of each clip of a split its class, or (K,) float32 of 0 and 1."""
    listed = layout.json(file)
    if not isinstance(listed, dict):
        raise layout.altered(file, "it", "no object", "an object of clips and their labels")
    found: dict[str, Any] = {}
    for name, labels in listed.items():
        places = [classes.get(str(label)) for label in labels] if isinstance(labels, list) else [None]
        if None in places or not (multi or len(places) == 1):
            one = "labels" if multi else "one label"
            raise layout.altered(file, name, repr(labels), f"a list of {one} of {_VOCABULARY}")
        if multi:  # of a clip there may be none
            found[name] = np.zeros(len(classes), np.float32)
            found[name][places] = 1.0
        else:
            found[name] = places[0]
    return found
