"""What a clips.csv says, whatever blanks are around it, and what it must not say twice."""

from __future__ import annotations

import pytest

from matpac_fast.tasks import DatasetError, load_task
from tests.tasks import miniature
from tests.tasks.test_tasks import split_rows


def load(folder, rows):
    miniature.table(folder / "clips.csv", rows)
    return load_task(f"folder:{folder}")


def test_blanks_around_values_are_no_part_of_them(tmp_path):
    miniature.folder(tmp_path, clips=6)
    plain = [row | {"subset": "odd" * (i % 2)} for i, row in enumerate(split_rows())]
    blank = [row | {name: f" {row[name]}\t" for name in ("split", "group", "subset")} for row in plain]
    one, two = load(tmp_path, plain), load(tmp_path, blank)
    assert two.fingerprint == one.fingerprint
    assert one.kind == "single"
    for task in (one, two):
        assert {name: member.tolist() for name, member in task.subsets.items()} == {"odd": [False, True] * 6}
    folds = [row | {"split": "", "fold": f"{i % 3}" + " " * (i % 2)} for i, row in enumerate(plain)]
    assert len(load(tmp_path, folds).folds) == 3


def test_a_leak_behind_a_blank_is_seen(tmp_path):
    miniature.folder(tmp_path, clips=6)
    rows = [row | {"group": "ann" if i in (0, 5) else f"g{i}"} for i, row in enumerate(split_rows())]
    rows[5]["group"] += " "
    with pytest.raises(DatasetError, match="clips of the group 'ann' are in train and in test"):
        load(tmp_path, rows)


def test_a_split_and_folds_are_one_too_many(tmp_path):
    miniature.folder(tmp_path, clips=6)
    rows = [row | {"fold": str(i % 3)} for i, row in enumerate(split_rows())]
    with pytest.raises(
        DatasetError, match="says which clips are tested twice, by split and by fold; expected one of the two"
    ):
        load(tmp_path, rows)
    assert len(load(tmp_path, [row | {"fold": " "} for row in rows]).folds) == 1  # an empty column says nothing


def test_a_split_of_another_name_is_no_clip_left_out(tmp_path):
    miniature.folder(tmp_path, clips=6)
    for other in ("dev", ""):
        rows = split_rows()
        rows[0]["split"] = other
        with pytest.raises(DatasetError, match=f"split {other!r}; expected train, valid, test"):
            load(tmp_path, rows)


def test_a_column_that_some_rows_leave_empty_still_says_something_of_the_others(tmp_path):
    miniature.folder(tmp_path, clips=6)
    rows = [row | {"fold": str(i) if i else ""} for i, row in enumerate(split_rows())]
    with pytest.raises(DatasetError, match="tested twice, by split and by fold"):
        load(tmp_path, rows)
    with pytest.raises(DatasetError, match=r"0\.wav has no fold; expected one for each clip"):
        load(tmp_path, [row | {"split": ""} for row in rows])


def test_a_folder_and_a_list_without_clips_are_named(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(DatasetError, match="no audio in its sub-folders"):
        load_task(f"folder:{tmp_path}")
    (tmp_path / "clips.csv").write_text("path,label\n")
    with pytest.raises(DatasetError, match=r"clips\.csv lists no clips"):
        load_task(f"folder:{tmp_path}")
