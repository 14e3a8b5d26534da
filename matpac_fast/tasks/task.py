"""Task: clips, what is to be said of each, and which may be learnt from; and the reading of official folders."""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .._cores import n_cores
from ..audio.decode import AudioFile
from ..errors import AudioError, ConfigError
from ..files import storable

SPLITS = ("train", "valid", "test")
ANY_LENGTH = (1e-3, np.inf)  # seconds that a clip may last, where nobody says how many
_NAMED = 5  # files that an error's one line names
_NEAR = 0.82  # of difflib: "splitt", "folds" and "groups" are near, "folder" and "subject" are not


class DatasetError(ConfigError):
    """A data set's folder is incomplete or altered; `problems` has (path in it, what is wrong) for every file,
    or (class, what is wrong)."""

    def __init__(self, message: str, problems: Sequence[tuple[str, str]] = ()):
        super().__init__(message)
        self.problems = list(problems)


@dataclass(frozen=True)
class Fold:
    """Indices of clips, int64. Where `valid` is None, the probe holds out some of `train`, whole groups at a time."""

    train: np.ndarray
    test: np.ndarray
    valid: np.ndarray | None = None


@dataclass(frozen=True)
class Task:
    """A data set as a question to embeddings.

    Attributes:
        name: for people, and a part of file names.
        kind: "single", one class a clip; "multi", any number of them.
        classes: their names, K of them.
        paths: (N,) audio files.
        targets: "single": (N,) int64; "multi": (N, K) float32 of 0 and 1, NaN where nobody knows.
        groups: (N,) str; clips of one group belong together: a split that is drawn keeps them on one side, and
            the bootstrap resamples them together.
        folds: one, or several whose scores are averaged.
        seconds: (N,) float64, the clips' lengths, by their headers where these state them.
        subsets: name -> (N,) bool; test clips that are also scored on their own, such as one device's.
        left_out: clips that a partial folder lacks, and why.
    """

    name: str
    kind: Literal["single", "multi"]
    classes: tuple[str, ...]
    paths: list[Path]
    targets: np.ndarray
    groups: np.ndarray
    folds: list[Fold]
    seconds: np.ndarray
    subsets: Mapping[str, np.ndarray] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        n, k = len(self.paths), len(self.classes)
        wanted = (n,) if self.kind == "single" else (n, k)
        if self.targets.shape != wanted or len(self.groups) != n or len(self.seconds) != n:
            raise ConfigError(f"{self.name}: {n} clips of {k} classes with targets {self.targets.shape}")
        untrained: dict[int, int] = {}  # class -> the first fold that tests it all the same
        for number, fold in enumerate(self.folds):
            named = {"training": fold.train, "test": fold.test}
            named |= {} if fold.valid is None else {"validation": fold.valid}
            together = np.concatenate(list(named.values()))
            if empty := [what for what, part in named.items() if not len(part)]:
                raise DatasetError(f"{self.name}: fold {number} has no {' and no '.join(empty)} clips")
            if len(np.unique(together)) != len(together):
                raise DatasetError(f"{self.name}: fold {number} has a clip in two parts")
            heard = self.targets[fold.train]
            lacking = (
                np.setdiff1d(self.targets[fold.test], heard)
                if self.kind == "single"
                else np.flatnonzero((np.nansum(heard, 0) == 0) & (np.nansum(self.targets[fold.test], 0) > 0))
            )
            for each in lacking.tolist():
                untrained.setdefault(each, number)
        if untrained:
            problems = [
                (self.classes[each], f"tested in fold {number}, not trained") for each, number in untrained.items()
            ]
            names = ", ".join(repr(name) for name, _ in problems[1:_NAMED])
            more = (
                f", and there are {len(problems) - 1} more such ({names}{'' if len(problems) <= _NAMED else ', …'})"
                if names
                else ""
            )
            raise DatasetError(
                f"{self.name}: fold {next(iter(untrained.values()))} tests the class {problems[0][0]!r}, which it has "
                f"not trained{more}; expected each class among the training clips of every fold: give it more clips "
                "(three or more where folds are drawn), or leave it out",
                problems,
            )
        if self.kind == "multi":  # what no mean average precision can be told of
            for what, parts in (
                ("test", [fold.test for fold in self.folds]),
                ("validation", [fold.valid for fold in self.folds]),
            ):
                if all(part is not None and not np.nansum(self.targets[part]) for part in parts):
                    raise DatasetError(f"{self.name}: no {what} clip is of any class; expected some that are")

    @property
    def metric(self) -> str:
        return "accuracy" if self.kind == "single" else "mAP"

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything but the audio: which clips, what is true of them, how they are split."""
        digest = hashlib.sha256(repr((self.name, self.kind, self.classes)).encode())
        common = os.path.commonpath([path.parent for path in self.paths])
        for path in self.paths:
            digest.update(os.fsencode(os.path.relpath(path, common)) + b"\0")
        digest.update("\0".join(self.groups.tolist()).encode())
        arrays = [self.targets]
        for fold in self.folds:
            arrays += [fold.train, fold.test, np.empty(0, np.int64) if fold.valid is None else fold.valid]
        for array in arrays:
            digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class Layout:
    """A data set's folder while it is read: what is missing or altered is noted file by file, and raised together."""

    def __init__(self, name: str, folder: str | os.PathLike[str], partial: bool = False):
        self.name, self.folder, self.partial = name, Path(folder), partial
        if not self.folder.is_dir():
            raise DatasetError(f"{name}: no folder {folder}")
        self.problems: list[tuple[str, str]] = []

    def first(self, *names: str) -> str:
        """The one of several names, by which a file or folder is known, that is there; the first where none is."""
        return next((name for name in names if (self.folder / name).exists()), names[0])

    def text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise DatasetError(
                f"{self.name}: {self.folder / name} cannot be read ({error.strerror}); expected the official layout",
                [(name, "missing")],
            ) from None
        except UnicodeDecodeError:
            raise DatasetError(
                f"{self.name}: {self.folder / name} is altered: not UTF-8", [(name, "altered")]
            ) from None

    def rows(
        self,
        name: str,
        columns: Sequence[str],
        delimiter: str = ",",
        header: bool = True,
        optional: Sequence[str] = (),
    ) -> list[dict[str, str]]:
        """The rows of a CSV file that has at least these columns; without a header they are all its columns.

        With `optional` ones, which somebody wrote by hand, blanks around names are no part of them, and a name that is
        nearly that of a column which is not there is an error.
        """
        reader = csv.DictReader(
            io.StringIO(self.text(name)), None if header else list(columns), delimiter=delimiter, restval=""
        )
        if optional:
            reader.fieldnames = [column.strip() for column in reader.fieldnames or ()]
            self._check_spelling(name, reader.fieldnames, [*columns, *optional])
        rows = list(reader)
        if lacking := [column for column in columns if column not in (reader.fieldnames or ())]:
            raise DatasetError(
                f"{self.name}: {self.folder / name} is altered: it has no column {', '.join(lacking)}",
                [(name, f"altered: no column {', '.join(lacking)}")],
            )
        return rows

    def _check_spelling(self, name: str, found: Sequence[str], known: Sequence[str]) -> None:
        """Raise DatasetError for a misspelt column, which would be passed over, and its split or groups with it."""
        if twice := next((column for column in known if found.count(column) > 1), None):
            raise DatasetError(f"{self.name}: {self.folder / name} has the column {twice} twice; expected it once")
        absent = [column for column in known if column not in found]
        for column in found:
            near = difflib.get_close_matches(column.casefold(), absent, 1, _NEAR)
            if near and column not in known:
                raise DatasetError(
                    f"{self.name}: {self.folder / name} has a column {column!r} and no {near[0]!r}; expected that "
                    f"name, if it is meant, or else one less like it; the columns that are used: {', '.join(known)}"
                )

    def json(self, name: str) -> Any:
        text = self.text(name)
        try:
            return json.loads(text)
        except ValueError as error:
            raise DatasetError(
                f"{self.name}: {self.folder / name} is damaged: {error}", [(name, "altered: no JSON")]
            ) from None

    def altered(self, name: str, where: str, came: str, expected: str) -> DatasetError:
        """Of a table that is there, and holds what cannot be; `where` names the row."""
        told = f"altered: {where} has {came}"
        return DatasetError(
            f"{self.name}: {self.folder / name} is {told}; expected {expected}; unpack the data set anew",
            [(name, told)],
        )

    def whole(self, name: str, rows: Sequence[Mapping[str, str]], column: str) -> list[int]:
        """The whole numbers of a table's column."""
        return [int(number) for number in self._numbers(name, rows, column, int, "a whole number")]

    def numbers(self, name: str, rows: Sequence[Mapping[str, str]], column: str) -> list[float]:
        """The finite numbers of a table's column."""
        return self._numbers(name, rows, column, float, "a number")

    def _numbers(
        self, name: str, rows: Sequence[Mapping[str, str]], column: str, kind: type, expected: str
    ) -> list[float]:
        found = []
        for number, row in enumerate(rows, 1):
            try:
                found.append(kind(row[column]))
            except ValueError:
                found.append(math.nan)
            if not math.isfinite(found[-1]):
                raise self.altered(name, f"row {number} below the header", f"the {column} {row[column]!r}", expected)
        return found

    def count(self, name: str, what: str, found: int, official: int) -> None:
        """Note a list that is not as long as the official one."""
        if found != official and not self.partial:
            self.problems.append((name, f"altered: {found} {what}, officially {official}"))

    def audio(self, names: Sequence[str], seconds: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """Of these files those that are there with a length in this range, by number (M,), and their lengths (M,).

        Raises:
            DatasetError: some are not and the folder is not taken for partial, or none is.
        """
        workers = min(8, n_cores() * 2)
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda name: _length(self.folder / name, seconds), names, chunksize=64))
        bad = [(storable(name), reason) for name, (_, reason) in zip(names, found, strict=True) if reason]
        self.problems += bad
        if len(bad) == len(names) or (self.problems and not self.partial):
            raise self.error(len(names))
        kept = np.array([i for i, (_, reason) in enumerate(found) if not reason], np.int64)
        return kept, np.array([found[i][0] for i in kept])

    def error(self, n_files: int) -> DatasetError:
        shown = "; ".join(f"{name}: {reason}" for name, reason in self.problems[:_NAMED])
        more = f"; and {len(self.problems) - _NAMED} more" if len(self.problems) > _NAMED else ""
        problems = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        files = "1 file" if n_files == 1 else f"{n_files} files"
        return DatasetError(
            f"{self.name}: {self.folder} is incomplete or altered, {problems} in {files}: {shown}{more}",
            self.problems,
        )


def _length(path: Path, seconds: tuple[float, float]) -> tuple[float, str]:
    """A file's length, by its header where that states it, and what is wrong with it or ""."""
    try:
        if path.stat().st_size == 0:
            return 0.0, "altered: 0 bytes"
    except OSError:
        return 0.0, "missing"
    try:
        with AudioFile(path) as file:
            length = file.seconds
            if length is None:  # as in a FLAC that was written to a pipe
                for _ in file.blocks(file.sample_rate):
                    pass
                length = file.frames / file.sample_rate
    except AudioError as error:
        return 0.0, f"altered: {str(error).removeprefix(f'{path}: ')}"
    if not seconds[0] <= length <= seconds[1]:
        return length, f"altered: {length:.2f} s long, expected {seconds[0]:g} to {seconds[1]:g} s"
    return length, ""


def class_indices(labels: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The class names, sorted, and each label's index (N,) int64."""
    classes = sorted(set(labels))
    place = {name: i for i, name in enumerate(classes)}
    return tuple(classes), np.array([place[label] for label in labels], dtype=np.int64)


def split_fold(splits: np.ndarray) -> Fold:
    """The one fold of clips that are each of a part of `SPLITS`, by name."""
    train, valid, test = (np.flatnonzero(splits == part) for part in SPLITS)
    return Fold(train, test, valid)


def rotate_folds(numbers: np.ndarray) -> list[Fold]:
    """Each fold number once as the test; the next one validates, the others train."""
    names = np.unique(numbers)
    if len(names) < 3:
        folds = "1 fold" if len(names) == 1 else f"{len(names)} folds"
        raise DatasetError(f"{folds}; expected at least 3, to train, validate and test on")
    folds = []
    for i, name in enumerate(names):
        after = names[(i + 1) % len(names)]
        test, valid = numbers == name, numbers == after
        folds.append(Fold(*map(np.flatnonzero, (~(test | valid), test, valid))))
    return folds


def deal_groups(groups: np.ndarray, strata: np.ndarray, n_parts: int, seed: int) -> np.ndarray:
    """(N,) part of each clip: whole groups, dealt out so that every stratum spreads evenly over the parts.

    Groups are dealt largest first, in an order drawn from their names' hashes, each to the part that has fewest clips
    of its stratum and then fewest in all. Depends on names and seed alone: not on the order of the clips.
    """
    names, inverse = np.unique(groups, return_inverse=True)
    kinds, kind = np.unique(strata, return_inverse=True)
    counts = np.zeros((len(names), len(kinds)), np.int64)
    np.add.at(counts, (inverse, kind), 1)
    drawn = [hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in names.tolist()]
    totals = counts.sum(1)
    filled, part = np.zeros((n_parts, len(kinds)), np.int64), np.zeros(len(names), np.int64)
    for g in sorted(range(len(names)), key=lambda g: (-totals[g], drawn[g])):
        main = int(counts[g].argmax())
        part[g] = min(range(n_parts), key=lambda p: (filled[p, main], filled[p].sum(), p))
        filled[part[g]] += counts[g]
    return part[inverse]
