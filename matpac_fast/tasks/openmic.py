"""OpenMIC-2018: 20,000 clips of 10 s, twenty instruments, labels known for some of them in each clip."""

from __future__ import annotations

import os

import numpy as np

from .task import DatasetError, Fold, Layout, Task

_TRAIN, _TEST = 14_915, 5_085


def load(path: str | os.PathLike[str], partial: bool = False, seed: int = 0) -> Task:
    """The official folder: openmic-2018-aggregated-labels.csv, class-map.json, partitions/split01_*.csv and audio/.

    An instrument is there where its relevance is 0.5 or more, as in the official baseline; of instruments that nobody
    was asked about in a clip nothing is known: they are masked in training and in the score. The pickled .npz is not
    read. A clip's group is its track.
    """
    layout = Layout("openmic", path, partial)
    places = layout.json("class-map.json")
    if not isinstance(places, dict) or sorted(places.values(), key=str) != sorted(range(len(places)), key=str):
        raise layout.altered("class-map.json", "it", "other values", "an object of instruments, numbered from 0")
    table = "openmic-2018-aggregated-labels.csv"
    known: dict[str, list[tuple[int, float]]] = {}
    rows = layout.rows(table, ["sample_key", "instrument", "relevance"])
    for row, relevance in zip(rows, layout.numbers(table, rows, "relevance"), strict=True):
        if row["instrument"] not in places:
            raise DatasetError(f"openmic: {table} has an instrument {row['instrument']!r} that class-map.json has not")
        known.setdefault(row["sample_key"], []).append((places[row["instrument"]], relevance))
    keys: list[str] = []
    splits: list[str] = []
    for split, official in (("train", _TRAIN), ("test", _TEST)):
        name = f"partitions/split01_{split}.csv"
        part = [line.strip() for line in layout.text(name).splitlines() if line.strip()]
        layout.count(name, "clips", len(part), official)
        layout.problems += [(name, f"altered: {key} has no labels in {table}") for key in part if key not in known]
        keys += part
        splits += [split] * len(part)
    kept, seconds = layout.audio([f"audio/{key[:3]}/{key}.ogg" for key in keys], (9.0, 11.0))
    labelled = np.array([keys[i] in known for i in kept], bool)
    kept, seconds = kept[labelled], seconds[labelled]
    keys, split = [keys[i] for i in kept], np.array(splits)[kept]
    targets = np.full((len(keys), len(places)), np.nan, np.float32)
    for row, key in zip(targets, keys, strict=True):
        for place, relevance in known[key]:
            row[place] = relevance >= 0.5
    return Task(
        name="openmic",
        kind="multi",
        classes=tuple(sorted(places, key=lambda name: places[name])),
        paths=[layout.folder / "audio" / key[:3] / f"{key}.ogg" for key in keys],
        targets=targets,
        groups=np.array([key.split("_")[0] for key in keys]),
        folds=[Fold(np.flatnonzero(split == "train"), np.flatnonzero(split == "test"))],
        seconds=seconds,
        left_out=layout.problems,
    )
