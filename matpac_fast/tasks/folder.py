"""`folder:PATH`: a folder of one's own. Sub-folder = label; or a clips.csv that says more."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..audio.find import find_audio
from ..files import local, storable
from .task import ANY_LENGTH, SPLITS, DatasetError, Fold, Layout, Task, class_indices, deal_groups, rotate_folds

_FOLDS = 5
_OPTIONAL = ("split", "fold", "group", "subset")  # columns of clips.csv


def load(path: str | os.PathLike[str], partial: bool = False, seed: int = 0) -> Task:
    """A folder whose sub-folders are the labels, in five folds that `seed` draws; each tests a fifth of the clips.

    A file clips.csv in the folder takes the place of that. Its columns: `path` (below the folder) and `label`, and as
    needed `split` (train, valid, test) or `fold` (any names, at least three), `group` (clips that belong together, such
    as one speaker's), and `subset` (test clips scored on their own too). A label with ";" in it, or an empty one, makes
    the task multi-label: "piano;drums". A label may be listed as unknown with "?" before it: "piano;?drums". Clips that
    it does not list are no part of the task. Blanks around a value are no part of it. Other columns are not used.

    Raises:
        DatasetError: a column that is nearly called as one of these, which is not there; a split and folds; what is
            listed and missing or no audio, file by file; fewer than two classes; too few groups.
    """
    layout = Layout(f"folder {Path(path).name}", path, partial)
    if (layout.folder / "clips.csv").exists():
        return _listed(layout, seed)
    names = [os.path.relpath(found, layout.folder) for found in find_audio(layout.folder)]
    if loose := [name for name in names if os.sep not in name]:
        raise DatasetError(
            f"{layout.folder}: {loose[0]} lies beside the sub-folders; expected each file in one, whose name is its "
            "label, or a clips.csv"
        )
    if not names:
        raise DatasetError(f"{layout.folder}: no audio in its sub-folders")
    rows = [{"file": name, "path": storable(name), "label": storable(name.split(os.sep)[0])} for name in names]
    return _task(layout, rows, seed, multi=False)  # whatever is in a folder's name


def _listed(layout: Layout, seed: int) -> Task:
    rows = layout.rows("clips.csv", ["path", "label"], optional=_OPTIONAL)
    if not rows:
        raise DatasetError(f"{layout.folder / 'clips.csv'} lists no clips")
    listed: set[str] = set()
    for row in rows:
        if any(row.get(None, "")):  # pyright: ignore[reportArgumentType, reportCallIssue]
            raise DatasetError(
                f"{layout.folder / 'clips.csv'}: the row of {row['path']} has more fields than the header; expected as "
                'many, and "" around one that holds a comma'
            )
        if (path := os.path.normpath(row["path"])) in listed:
            raise DatasetError(
                f"{layout.folder / 'clips.csv'} lists {row['path']} twice; expected each clip in one row, with ; "
                "between several labels"
            )
        listed.add(path)
    for row in rows:
        row["file"] = local(row["path"])
        for column in _OPTIONAL:  # "ann " is ann, whose clips must not be on two sides
            if column in row:
                row[column] = row[column].strip()
        # "piano; drums" has the drums of "drums"
        row["label"] = ";".join(label.strip() for label in row["label"].split(";"))
    multi = any(";" in row["label"] or not row["label"] or row["label"].startswith("?") for row in rows)
    return _task(layout, rows, seed, multi)


def _task(layout: Layout, rows: list[dict[str, str]], seed: int, multi: bool) -> Task:
    kept, seconds = layout.audio([row["file"] for row in rows], ANY_LENGTH)
    rows = [rows[i] for i in kept]
    name = layout.folder.resolve().name
    if multi:
        classes, targets = _multi([row["label"].split(";") for row in rows])
        # Of several labels the rarest: its few clips must not all fall into one fold.
        rarest = np.nansum(targets, 0).argsort(kind="stable")
        has = np.nan_to_num(targets)[:, rarest] > 0
        strata = np.where(has.any(1), has.argmax(1), -1)
    else:
        classes, targets = class_indices([row["label"] for row in rows])
        strata = targets
    if len(classes) < 2:
        raise DatasetError(f"{layout.folder}: the only class is {', '.join(classes)!r}; expected two or more")
    groups = np.array([row.get("group") or row["path"] for row in rows])
    subsets = sorted({row["subset"] for row in rows if row.get("subset")})
    return Task(
        name=name,
        kind="multi" if multi else "single",
        classes=classes,
        paths=[layout.folder / row["file"] for row in rows],
        targets=targets,
        groups=groups,
        folds=_folds(layout, rows, groups, strata, seed),
        seconds=seconds,
        subsets={subset: np.array([row.get("subset") == subset for row in rows]) for subset in subsets},
        left_out=layout.problems,
    )


def _multi(labels: list[list[str]]) -> tuple[tuple[str, ...], np.ndarray]:
    classes = sorted({label.removeprefix("?") for some in labels for label in some if label})
    place = {name: i for i, name in enumerate(classes)}
    targets = np.zeros((len(labels), len(classes)), np.float32)
    for row, some in zip(targets, labels, strict=True):
        for label in filter(None, some):
            row[place[label.removeprefix("?")]] = np.nan if label.startswith("?") else 1.0
    return tuple(classes), targets


def _folds(layout: Layout, rows: list[dict[str, str]], groups: np.ndarray, strata: np.ndarray, seed: int) -> list[Fold]:
    if all(any(row.get(name) for row in rows) for name in ("split", "fold")):
        raise DatasetError(
            f"{layout.folder / 'clips.csv'} says which clips are tested twice, by split and by fold; expected one of "
            "the two columns: remove or empty the other"
        )
    if any(row.get("split") for row in rows):
        splits = np.array([row.get("split", "") for row in rows])
        if unknown := set(splits.tolist()) - set(SPLITS):
            raise DatasetError(
                f"{layout.folder / 'clips.csv'}: split {sorted(unknown)[0]!r}; expected train, valid, test"
            )
        train, valid, test = (np.flatnonzero(splits == part) for part in SPLITS)
        folds = [Fold(train, test, valid if len(valid) else None)]
    elif any(row.get("fold") for row in rows):
        if bare := next((row for row in rows if not row["fold"]), None):
            raise DatasetError(f"{layout.folder / 'clips.csv'}: {bare['path']} has no fold; expected one for each clip")
        folds = rotate_folds(np.array([row.get("fold", "") for row in rows]))
    elif len(np.unique(groups)) < _FOLDS:
        few = len(np.unique(groups))
        of = "1 group" if few == 1 else f"{few} groups"
        raise DatasetError(f"{layout.folder}: {of} of clips; expected {_FOLDS} or more to split")
    else:
        folds = rotate_folds(deal_groups(groups, strata, _FOLDS, seed))
    for fold in folds:
        for name, part in (("train", fold.train), ("valid", fold.valid)):  # the probe is chosen by valid
            if part is not None and (shared := set(groups[fold.test].tolist()) & set(groups[part].tolist())):
                group = sorted(shared)[0]
                raise DatasetError(
                    f"{layout.folder}: clips of the group {group!r} are in {name} and in test; expected each group on "
                    "one side; correct the columns split, fold or group of clips.csv"
                )
    return folds
