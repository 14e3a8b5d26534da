"""NSynth, instrument family: 305,979 notes of 4 s; official split, in which no instrument is on two sides."""

from __future__ import annotations

import os

import numpy as np

from .task import Layout, Task, class_indices, split_fold

_SPLITS = {"train": 289_205, "valid": 12_678, "test": 4_096}


def load(path: str | os.PathLike[str], partial: bool = False, seed: int = 0) -> Task:
    """The official folders nsynth-train, nsynth-valid and nsynth-test, each with examples.json and audio/*.wav.

    The family synth_lead is in no clip of the official validation and test parts; it stays among the classes.
    """
    layout = Layout("nsynth", path, partial)
    names, labels, groups, splits = [], [], [], []
    for split, official in _SPLITS.items():
        table = f"nsynth-{split}/examples.json"
        notes = layout.json(table)
        if not isinstance(notes, dict):
            raise layout.altered(table, "it", f"a {type(notes).__name__}", "an object of notes")
        layout.count(table, "notes", len(notes), official)
        for name in sorted(notes):
            names.append(f"nsynth-{split}/audio/{name}.wav")
            for found, key in ((labels, "instrument_family_str"), (groups, "instrument_str")):
                told = notes[name].get(key) if isinstance(notes[name], dict) else None
                if not isinstance(told, str):
                    raise layout.altered(table, f"the note {name}", f"no {key}", "its name")
                found.append(told)
        splits += [split] * len(notes)
    kept, seconds = layout.audio(names, (3.9, 4.1))
    classes, targets = class_indices([labels[i] for i in kept])
    split = np.array(splits)[kept]
    return Task(
        name="nsynth",
        kind="single",
        classes=classes,
        paths=[layout.folder / names[i] for i in kept],
        targets=targets,
        groups=np.array(groups)[kept],
        folds=[split_fold(split)],
        seconds=seconds,
        left_out=layout.problems,
    )
