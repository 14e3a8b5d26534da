"""Every data set in its official layout: clips, labels, splits; and what is missing or altered is named."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from matpac_fast.errors import ConfigError
from matpac_fast.tasks import TASKS, DatasetError, Task, load_task, magnatagatune
from matpac_fast.tasks.task import Layout
from tests.tasks import miniature

OFFICIAL = [name for name in TASKS if name != "folder"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for name in OFFICIAL:
        getattr(miniature, name)(root / name)
    return root


@pytest.fixture
def copy(sets, tmp_path):
    """copy("esc50") -> a folder of links into the miniature, free to be damaged."""

    def make(name: str) -> Path:
        target = tmp_path / name
        for file in (sets / name).rglob("*"):
            if file.is_file():
                link = target / file.relative_to(sets / name)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file)
        return target

    return make


def load(root: Path, name: str) -> Task:
    return load_task(f"{name}:{root / name}", partial=True)


def labels(task: Task, where: np.ndarray) -> list[str]:
    return [task.classes[i] for i in task.targets[where]]


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_parts_are_whole_and_apart(sets, name):
    task = load(sets, name)
    assert all(path.is_file() for path in task.paths)
    assert not task.left_out
    for fold in task.folds:
        parts = [fold.train, fold.test] + ([] if fold.valid is None else [fold.valid])
        together = np.concatenate(parts)
        assert sorted(together.tolist()) == list(range(len(task.paths)))
        assert not set(task.groups[fold.train]) & set(task.groups[fold.test])


def test_esc50(sets):
    task = load(sets, "esc50")
    assert (task.kind, task.metric, len(task.paths), len(task.folds)) == ("single", "accuracy", 15, 5)
    first = task.folds[0]  # fold 1 tests, fold 2 validates
    assert {path.name[0] for path in np.array(task.paths)[first.test]} == {"1"}
    assert {path.name[0] for path in np.array(task.paths)[first.valid]} == {"2"}
    assert labels(task, first.test) == ["dog", "rain", "clock_tick"]
    assert task.seconds.tolist() == [5.0] * 15
    assert task.groups[:2].tolist() == ["100", "101"]  # the recordings, whichever clip of them


def test_urbansound8k(sets):
    task = load(sets, "urbansound8k")
    assert (len(task.paths), len(task.folds)) == (20, 10)
    assert {path.parent.name for path in np.array(task.paths)[task.folds[9].test]} == {"fold10"}
    assert {path.parent.name for path in np.array(task.paths)[task.folds[9].valid]} == {"fold1"}
    assert set(task.groups.tolist()) == {f"{fold}-{1000 + fold}" for fold in range(1, 11)}  # both slices of a recording


def test_gtzan(sets):
    task = load(sets, "gtzan")
    assert [len(task.folds[0].train), len(task.folds[0].valid), len(task.folds[0].test)] == [6, 4, 2]
    assert labels(task, task.folds[0].test) == ["blues", "rock"]


@pytest.mark.parametrize("root", ["genres_original", "."])
def test_gtzan_by_the_other_names_that_it_goes_by(sets, copy, root):
    want, folder = load(sets, "gtzan"), copy("gtzan")
    for genre in ("blues", "rock"):
        (folder / root).mkdir(exist_ok=True)
        (folder / "genres" / genre).rename(folder / root / genre)
        for path in (folder / root / genre).iterdir():
            path.rename(path.with_suffix(".au"))
    (folder / "genres").rmdir()
    (folder / "GTZAN_split").mkdir()
    for path in folder.glob("*_filtered.txt"):
        path.rename(folder / "GTZAN_split" / path.name)
    task = load_task(f"gtzan:{folder}", partial=True)
    assert [path.relative_to(folder).suffix for path in task.paths] == 12 * [".au"]
    assert task.targets.tolist() == want.targets.tolist()


def test_tau2020_scores_devices(sets):
    task = load(sets, "tau2020")
    assert len(task.folds[0].train) == 8
    assert sorted(task.subsets) == ["device a", "device s4"]
    assert task.subsets["device s4"].sum() == 2
    # City and location, whichever segment and device.
    assert set(task.groups.tolist()) == {f"barcelona-{n}" for n in (0, 1, 2, 10, 11, 12)}
    assert task.folds[0].valid is None


def test_openmic_masks_what_nobody_knows(sets):
    task = load(sets, "openmic")
    assert (task.kind, task.metric, task.classes) == ("multi", "mAP", ("accordion", "bass", "banjo"))
    assert task.groups[:2].tolist() == ["000000", "000001"]  # the tracks, whichever seconds of them
    wanted = [[math.nan if (i + p) % 4 == 0 else float((i + p) % 2 == 1) for p in range(3)] for i in range(8)]
    assert np.array_equal(task.targets, np.array(wanted, np.float32), equal_nan=True)


def test_magnatagatune_takes_the_fifty_tags_and_the_folders(sets):
    task = load(sets, "magnatagatune")
    assert len(task.classes) == 50
    assert not {"tag 50", "tag 51"} & set(task.classes)
    folders = [[task.paths[i].parent.name for i in part] for part in (task.folds[0].train, task.folds[0].valid)]
    assert folders == [["0", "3", "b"], ["c"]]
    assert "1" not in {path.parent.name for path in task.paths}  # has none of the tags
    assert task.targets[0].tolist() == [float(tag % 3 == 0) for tag in range(50)]
    assert task.groups[0] == "0/artist-album-01-song"  # whichever seconds of it


def test_magnatagatune_is_whole_without_the_files_that_are_empty_in_it(copy):
    root = copy("magnatagatune")
    table = root / "annotations_final.csv"
    lines = table.read_text().splitlines()
    table.unlink()
    empty = [lines[1].rpartition("\t")[0] + "\t" + name for name in sorted(magnatagatune._EMPTY)]
    table.write_text("\n".join([*lines, *empty]) + "\n")
    for folder in (root / "mp3").iterdir():  # which may be there or not
        folder.rename(root / folder.name)
    (root / "mp3").rmdir()
    task = load_task(f"magnatagatune:{root}", partial=True)
    assert (len(task.paths), task.left_out) == (6, [])


def test_nsynth(sets):
    task = load(sets, "nsynth")
    assert task.classes == ("bass", "reed", "synth_lead")
    assert task.groups[0] == "bass_train"  # the instrument, whichever note
    assert [len(task.folds[0].train), len(task.folds[0].valid), len(task.folds[0].test)] == [6, 4, 2]


def test_fsd50k(sets):
    task = load(sets, "fsd50k")
    assert task.classes == ("Bark", "Rain", "Guitar")
    assert task.targets[:4].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    (fold,) = task.folds
    names = [[task.paths[i].stem for i in part] for part in (fold.train, fold.valid, fold.test)]
    assert names == [["0", "1", "2", "3", "4"], ["5", "6"], ["7", "8"]]


def test_hear_rotates_its_folds(sets):
    task = load(sets, "hear")
    assert (task.name, task.kind, task.classes) == ("hear", "single", ("0", "2", "10"))  # in the order of its list
    assert task.targets.tolist() == 3 * [0, 1, 2]
    parts = [[task.paths[part[0]].parent.name for part in (fold.valid, fold.test)] for fold in task.folds]
    assert parts == [["fold01", "fold00"], ["fold02", "fold01"], ["fold00", "fold02"]]


def test_hear_of_several_labels_and_fixed_splits_at_its_highest_rate(tmp_path):
    miniature.hear(tmp_path, ("train", "valid", "test"), "trainvaltest", "multilabel")
    shutil.copytree(tmp_path / "48000", tmp_path / "8000")
    told = json.loads((tmp_path / "test.json").read_text())
    (tmp_path / "test.json").write_text(json.dumps(told | {"2-2.wav": []}))
    task = load_task(f"hear:{tmp_path}")
    (fold,) = task.folds
    assert [task.paths[part[0]].parent.name for part in (fold.train, fold.valid, fold.test)] == [
        "train",
        "valid",
        "test",
    ]
    assert {path.parent.parent.name for path in task.paths} == {"48000"}
    assert task.targets[fold.test].tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 1]]


def test_hear_tasks_with_times_are_refused(tmp_path):
    miniature.hear(tmp_path)
    about = (tmp_path / "task_metadata.json").read_text()
    (tmp_path / "task_metadata.json").write_text(about.replace('"scene"', '"event"'))
    with pytest.raises(DatasetError, match=r"asks when in a clip something is heard .* expected a task of whole clips"):
        load_task(f"hear:{tmp_path}")


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name not in ("tau2020", "hear")])
def test_a_shortened_list_is_told_from_the_official_one(sets, name):
    with pytest.raises(DatasetError, match=r"altered: \d+ \w+, officially \d+"):
        load_task(f"{name}:{sets / name}")


def test_a_partial_folder_of_nothing_is_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"incomplete or altered, 2 problems in 2 files: a\.wav: missing; b\.wav:"):
        Layout("esc50", tmp_path, partial=True).audio(["a.wav", "b.wav"], (4.9, 5.1))


def test_a_lengthened_list_is_told_too(tmp_path):
    layout = Layout("esc50", tmp_path)
    layout.count("meta/esc50.csv", "clips", 2_001, 2_000)
    assert layout.problems == [("meta/esc50.csv", "altered: 2001 clips, officially 2000")]


@pytest.mark.parametrize("name", OFFICIAL)
def test_files_that_are_missing_or_altered_are_all_named(copy, monkeypatch, name):
    root = copy(name)
    module = importlib.import_module(f"matpac_fast.tasks.{name}")
    monkeypatch.setattr(module.Layout, "count", lambda *_: None)
    whole = load_task(f"{name}:{root}")
    gone, empty, short = (whole.paths[i] for i in whole.folds[0].train[:3])
    for path in (gone, empty, short):
        path.unlink()
    empty.touch()
    miniature.tone(short, 50)
    with pytest.raises(DatasetError) as caught:
        load_task(f"{name}:{root}")
    problems = dict(caught.value.problems)
    assert problems[str(gone.relative_to(root))] == "missing"
    assert problems[str(empty.relative_to(root))] == "altered: 0 bytes"
    assert "altered: 50.00 s long" in problems[str(short.relative_to(root))]
    assert len(problems) == 3
    assert "\n" not in str(caught.value)
    assert all(str(path.relative_to(root)) in str(caught.value) for path in (gone, empty, short))


def test_a_partial_folder_says_what_it_lacks(copy):
    root = copy("esc50")
    (root / "audio/1-100-A-0.wav").unlink()
    task = load_task(f"esc50:{root}", partial=True)
    assert len(task.paths) == 14
    assert task.left_out == [("audio/1-100-A-0.wav", "missing")]


@pytest.mark.parametrize(
    ("name", "file"),
    [("esc50", "meta/esc50.csv"), ("nsynth", "nsynth-test/examples.json"), ("openmic", "partitions/split01_test.csv")],
)
def test_a_missing_or_damaged_table_is_named(copy, name, file):
    root = copy(name)
    (root / file).unlink()
    with pytest.raises(DatasetError, match=f"^{name}: [^:]*{file} cannot be read"):
        load_task(f"{name}:{root}")
    (root / file).write_text("{")
    with pytest.raises(DatasetError, match=file.replace("/", ".")):
        load_task(f"{name}:{root}")


def test_tau2020_rows_that_meta_csv_lacks_are_named(copy):
    root = copy("tau2020")
    meta = (root / "meta.csv").read_text().splitlines()
    (root / "meta.csv").unlink()
    (root / "meta.csv").write_text("\n".join(meta[:-1]))
    with pytest.raises(DatasetError, match=r"metro_station-barcelona-12-2-s4.wav is not in meta.csv"):
        load_task(f"tau2020:{root}")


def test_a_length_that_the_header_does_not_state_is_counted(tmp_path):
    """A FLAC that was written to a pipe has 0 in the place of its 36 bits of samples."""
    miniature.folder(tmp_path)
    (tmp_path / "cat/0.wav").unlink()
    path = tmp_path / "cat/0.flac"
    soundfile.write(path, 0.1 * np.random.default_rng(0).normal(size=12_000), 16_000)
    flac = bytearray(path.read_bytes())
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    path.write_bytes(flac)
    assert soundfile.info(path).frames > 2**62
    task = load_task(f"folder:{tmp_path}")
    assert task.seconds[task.paths.index(path)] == 0.75
    path.write_bytes(flac[: len(flac) // 2])
    with pytest.raises(DatasetError, match=r"1 problem in 30 files: cat/0\.flac: altered: "):
        load_task(f"folder:{tmp_path}")


@pytest.mark.parametrize("spec", ["esc50", "esc:/data", "esc50:", "esc50:/nowhere"])
def test_a_spec_that_names_nothing_is_an_error(spec):
    with pytest.raises(ConfigError):
        load_task(spec)


@pytest.mark.parametrize("listed", [False, True])
def test_names_are_the_same_in_a_locale_of_ascii_alone(tmp_path, listed):
    """And a name in no UTF-8 is one of a file as any other."""
    folder = tmp_path / "set"
    names = [f"{label}/zoé{i}.wav" for label in ("thé", "café") for i in range(4)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, np.zeros(800, np.float32), 16_000)
    if listed:
        rows = [f"{name},{name.split('/')[0]}" for name in names]
        (folder / "clips.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    else:
        try:
            os.rename(folder / names[0], os.fsencode(folder / "thé") + b"/\xe9.wav")
        except OSError:
            pytest.skip("this disk takes names in UTF-8 alone")
    code = (
        "import sys; from matpac_fast.tasks import load_task; t = load_task(sys.argv[1]); "
        "print(ascii(t.classes), ascii(sorted(t.groups)), t.fingerprint)"
    )
    command = [sys.executable, "-c", code, f"folder:{folder}"]
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    printed = [
        subprocess.run(command, env={**os.environ, **more}, capture_output=True, text=True, check=True).stdout
        for more in ({"PYTHONUTF8": "1"}, ascii_alone)
    ]
    assert printed[0] == printed[1]
    assert printed[0].startswith(ascii(("café", "thé")))
