"""A folder of one's own as a task: sub-folders are labels, or a clips.csv says more; and how groups are dealt out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from matpac_fast.tasks import DatasetError, Fold, load_task
from matpac_fast.tasks.task import deal_groups
from tests.tasks import miniature


def load(folder, rows):
    miniature.table(folder / "clips.csv", rows)
    return load_task(f"folder:{folder}")


def split_rows(split: str = "split", group: str = "group") -> list[dict[str, str]]:
    return [
        {"path": f"{name}/{i}.wav", "label": name, split: "test" if i > 3 else "train", group: f"{name} {i}"}
        for name in ("cat", "dog")
        for i in range(6)
    ]


def test_a_folder_of_folders(tmp_path):
    miniature.folder(tmp_path / "mine")
    task = load_task(f"folder:{tmp_path / 'mine'}")
    assert task.name == "mine"
    assert task.classes == ("cat", "dog", "owl")
    assert sorted(np.concatenate([fold.test for fold in task.folds]).tolist()) == list(range(30))
    for fold in task.folds:
        assert np.bincount(task.targets[fold.test]).tolist() == [2, 2, 2]
    same, other = (load_task(f"folder:{tmp_path / 'mine'}", seed=seed) for seed in (0, 1))
    assert same.fingerprint == task.fingerprint
    assert other.fingerprint != task.fingerprint
    unnamed = dataclasses.replace(task, folds=[Fold(fold.train, fold.test) for fold in task.folds])
    assert unnamed.fingerprint != task.fingerprint
    for name in ("groups", "targets", "classes", "paths"):  # probes are chosen by all of these
        other = dataclasses.replace(task, **{name: getattr(task, name)[::-1]})
        assert other.fingerprint != task.fingerprint, name
    with pytest.raises(DatasetError, match="mine: fold 0 has a clip in two parts"):
        dataclasses.replace(task, folds=[Fold(fold.train, fold.train[:3]) for fold in task.folds])
    (tmp_path / "mine/loose.wav").symlink_to(tmp_path / "mine/cat/0.wav")
    with pytest.raises(DatasetError, match=r"loose\.wav lies beside"):
        load_task(f"folder:{tmp_path / 'mine'}")


def test_the_name_of_a_folder_is_one_label_whatever_is_in_it(tmp_path):
    names = ["?who", "a, b", "rock; pop"]
    for name in names:
        (tmp_path / name).mkdir()
        for i in range(5):
            miniature.tone(tmp_path / name / f"{i}.wav", 0.1, i)
    task = load_task(f"folder:{tmp_path}")
    assert (task.kind, task.metric, list(task.classes)) == ("single", "accuracy", names)


def test_a_listed_folder(tmp_path):
    miniature.folder(tmp_path, clips=6)
    rows = [
        dict(
            path=f"{label}/{i}.wav",
            label=text,
            split="test" if i > 3 else "train",
            group=f"g{i}",
            subset="odd" * (i % 2),
        )
        for label, text in (("cat", "cat;pet"), ("dog", "dog;pet;?cat"), ("owl", ""))
        for i in range(6)
    ]
    miniature.table(tmp_path / "clips.csv", rows)
    task = load_task(f"folder:{tmp_path}")
    assert (task.kind, task.classes) == ("multi", ("cat", "dog", "pet"))
    assert np.array_equal(task.targets[::6], [[1, 0, 1], [np.nan, 1, 1], [0, 0, 0]], equal_nan=True)
    assert len(task.folds) == 1
    assert (len(task.folds[0].train), len(task.folds[0].test)) == (12, 6)
    assert task.subsets["odd"].sum() == 9
    rows[0]["group"] = "g5"
    miniature.table(tmp_path / "clips.csv", rows)
    with pytest.raises(DatasetError, match="'g5' are in train and in test"):
        load_task(f"folder:{tmp_path}")
    rows[0] |= dict(split="valid")
    miniature.table(tmp_path / "clips.csv", rows)
    with pytest.raises(DatasetError, match="'g5' are in valid and in test"):
        load_task(f"folder:{tmp_path}")
    rows[0] |= dict(group="g0")  # learnt from and validated on: no test clip is heard before
    miniature.table(tmp_path / "clips.csv", rows)
    assert load_task(f"folder:{tmp_path}").folds[0].valid.tolist() == [0]


def test_a_clip_without_a_group_is_one_of_its_own(tmp_path):
    miniature.folder(tmp_path)
    paths = [f"{label}/{i}.wav" for i in range(10) for label in ("cat", "dog")]
    rows = [dict(path=path, label=path[:3], group="pair" if i < 2 else "") for i, path in enumerate(paths)]
    miniature.table(tmp_path / "clips.csv", rows)
    assert load_task(f"folder:{tmp_path}").groups.tolist() == ["pair", "pair", *paths[2:]]


def test_labels_are_the_same_with_and_without_spaces(tmp_path):
    miniature.folder(tmp_path, clips=6)
    labels = {"cat": "cat;pet", "dog": " dog ; pet", "owl": "pet; ?cat"}
    rows = [dict(path=f"{name}/{i}.wav", label=label) for name, label in labels.items() for i in range(6)]
    miniature.table(tmp_path / "clips.csv", rows)
    task = load_task(f"folder:{tmp_path}")
    assert task.classes == ("cat", "dog", "pet")
    assert np.array_equal(task.targets[::6], [[1, 0, 1], [0, 1, 1], [np.nan, 0, 1]], equal_nan=True)


def test_a_class_of_too_few_clips_is_told_with_what_helps(tmp_path):
    miniature.folder(tmp_path, clips=6)
    for i in range(1, 6):
        (tmp_path / "owl" / f"{i}.wav").unlink()
    with pytest.raises(DatasetError, match="'owl', which it has not trained; expected .* give it more clips"):
        load_task(f"folder:{tmp_path}")


def test_three_clips_of_a_rare_label_are_enough_beside_other_labels(tmp_path):
    miniature.folder(tmp_path, clips=15)
    rows = [
        dict(path=f"{name}/{i}.wav", label=f"{name};{'?cat;' * (name == 'dog')}rare {i}")
        for name in ("cat", "dog", "owl")
        for i in range(15)
    ]
    miniature.table(tmp_path / "clips.csv", rows)
    for seed in range(5):
        assert len(load_task(f"folder:{tmp_path}", seed=seed).folds) == 5
    rows = [row | dict(label=row["label"] + f";once {i}") for i, row in enumerate(rows)]
    miniature.table(tmp_path / "clips.csv", rows)
    with pytest.raises(DatasetError, match=r"not trained, and there are \d\d more such \('\w+ \d+', .*, …\)") as caught:
        load_task(f"folder:{tmp_path}")
    assert {f"once {i}" for i in range(45)} <= {name for name, _ in caught.value.problems}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("path,label\ncat/0.wav,cat\ncat/1.wav,cat, purring\n", "row of cat/1.wav has more fields than the header"),
        ("path,label\ncat/0.wav,cat\n./cat/0.wav,pet\n", "lists ./cat/0.wav twice; .*, with ; between several"),
        ("path,label,fold\ncat/0.wav,cat,1\ncat/1.wav,cat,\n", "cat/1.wav has no fold; expected one for each clip"),
        ("path,label,group\ncat/0.wav,cat,a\n", ": 2 groups of clips; expected 5 or more to split"),
    ],
)
def test_a_list_that_would_be_misread_is_an_error(tmp_path, text, line):
    miniature.folder(tmp_path, clips=2)
    (tmp_path / "clips.csv").write_text(text + "dog/0.wav,dog,\n")
    with pytest.raises(DatasetError, match=line):
        load_task(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("names", "came", "meant"),
    [
        ({"split": "SPLIT"}, "SPLIT", "split"),
        ({"split": "splitt"}, "splitt", "split"),
        ({"split": "folds"}, "folds", "fold"),
        ({"group": " Groups "}, "Groups", "group"),
    ],
)
def test_a_misspelt_column_is_refused_before_its_split_or_groups_are_lost(tmp_path, names, came, meant):
    miniature.folder(tmp_path, clips=6)
    miniature.table(tmp_path / "clips.csv", split_rows(**names))
    with pytest.raises(DatasetError, match=f"clips.csv has a column '{came}' and no '{meant}'; expected that name"):
        load_task(f"folder:{tmp_path}")


def test_a_misspelt_column_that_has_to_be_there_is_told_as_such(tmp_path):
    miniature.folder(tmp_path, clips=6)
    (tmp_path / "clips.csv").write_text("path,Label\ncat/0.wav,cat\n")
    with pytest.raises(DatasetError, match="has a column 'Label' and no 'label'"):
        load_task(f"folder:{tmp_path}")


def test_blanks_around_names_of_columns_and_a_byte_order_mark_are_no_part_of_them(tmp_path):
    miniature.folder(tmp_path, clips=6)
    miniature.table(tmp_path / "clips.csv", split_rows(" split", "group "))
    (tmp_path / "clips.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "clips.csv").read_bytes())
    task = load_task(f"folder:{tmp_path}")
    assert [path.name for path in np.array(task.paths)[task.folds[0].test]] == 2 * ["4.wav", "5.wav"]
    assert task.groups[0] == "cat 0"
    miniature.table(tmp_path / "clips.csv", [row | {"split ": "train"} for row in split_rows()])
    with pytest.raises(DatasetError, match=r"clips\.csv has the column split twice"):
        load_task(f"folder:{tmp_path}")


def test_other_columns_may_be_there(tmp_path):
    """Also such as are called nearly as one that is there as well, and so is not lost."""
    miniature.folder(tmp_path, clips=6)
    others = dict.fromkeys(["label_id", "site", "speaker", "subject", "folder", "duration", "filename", "Split"], "0")
    miniature.table(tmp_path / "clips.csv", [row | others for row in split_rows()])
    task = load_task(f"folder:{tmp_path}")
    assert (len(task.folds), len(task.folds[0].train), len(task.folds[0].test)) == (1, 8, 4)


def test_a_label_may_hold_what_ends_lines_elsewhere(tmp_path):
    miniature.folder(tmp_path, clips=5)
    labels = {"cat": "cat,\u2028old", "dog": "dog\x85old", "owl": "owl\nold"}
    rows = [dict(path=f"{name}/{i}.wav", label=label) for name, label in labels.items() for i in range(5)]
    miniature.table(tmp_path / "clips.csv", rows)
    assert load_task(f"folder:{tmp_path}").classes == tuple(labels.values())


@pytest.mark.parametrize(("split", "word"), [("test", "test"), ("valid", "validation")])
def test_clips_of_no_class_have_no_mean_average_precision(tmp_path, split, word):
    miniature.folder(tmp_path, clips=6)
    splits = ["train", "train", "valid", "valid", "test", "test"]
    rows = [
        dict(path=f"{name}/{i}.wav", label="" if part == split else f"{name};pet", split=part)
        for name in ("cat", "dog")
        for i, part in enumerate(splits)
    ]
    miniature.table(tmp_path / "clips.csv", rows)
    with pytest.raises(DatasetError, match=f"no {word} clip is of any class"):
        load_task(f"folder:{tmp_path}")


def test_groups_stay_together_and_parts_are_even():
    random = np.random.default_rng(0)
    groups = np.array([f"g{i}" for i in random.integers(0, 60, 600)])
    strata = np.array([int(name[1:]) % 4 for name in groups])
    part = deal_groups(groups, strata, 5, seed=3)
    assert all(len(set(part[groups == name])) == 1 for name in set(groups.tolist()))
    counts = np.array([[((part == p) & (strata == s)).sum() for s in range(4)] for p in range(5)])
    assert counts.min() > 0.7 * counts.mean()
    assert counts.max() < 1.3 * counts.mean()
    order = random.permutation(600)
    assert np.array_equal(deal_groups(groups[order], strata[order], 5, seed=3), part[order])
    assert not np.array_equal(deal_groups(groups, strata, 5, seed=4), part)


def test_a_large_group_leaves_the_small_ones_to_the_other_parts():
    groups = np.array(10 * ["large"] + [f"small {i}" for i in range(10)])
    for seed in range(5):
        assert np.bincount(deal_groups(groups, np.zeros(20), 2, seed)).tolist() == [10, 10]


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
