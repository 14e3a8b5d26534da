"""Tables of official layouts that hold what cannot be: named by file and row, and no traceback."""

from __future__ import annotations

import json

import pytest

from matpac_fast.tasks import DatasetError, load_task
from tests.tasks import miniature


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "said"),
    [
        ("esc50", "meta/esc50.csv", "1,0,dog", ",0,dog", "row 1 below the header has the fold ''; expected a whole"),
        ("urbansound8k", "metadata/UrbanSound8K.csv", ",2,0,siren", ",two,0,siren", "row 3 .* the fold 'two'"),
        (
            "openmic",
            "openmic-2018-aggregated-labels.csv",
            "0.5,",
            ",",
            "row .* the relevance ''; expected a number",
        ),
        ("openmic", "openmic-2018-aggregated-labels.csv", "0.5,", "nan,", r"row \d .* the relevance 'nan'"),
        ("openmic", "class-map.json", '"bass": 1', '"bass": 0', "it has other values; expected an object of instr"),
        ("nsynth", "nsynth-test/examples.json", '"instrument_str"', '"inst"', "note bass_.* has no instrument_str"),
        ("hear", "task_metadata.json", "multiclass", "regression", "prediction_type has 'regression'; expected multic"),
        ("hear", "task_metadata.json", '"fold00"', "1", "splits has .*; expected a list of names"),
        ("hear", "task_metadata.json", "new_split_kfold", "trainvaltest", "splits has .*; expected train, valid and"),
        ("hear", "labelvocabulary.csv", "1,2", "2,2", "idx has 3 rows; expected 0, 1, 2, .* each once"),
        (
            "hear",
            "fold01.json",
            "[10]",
            "[11]",
            r"10-1.wav has \[11\]; expected a list of one label of labelvocabulary",
        ),
        ("hear", "fold02.json", "[0]", "[0, 2]", r"0-2.wav has \[0, 2\]; expected a list of one label"),
        ("nsynth", "nsynth-valid/examples.json", '"reed"', "7", "the note reed_.* has no instrument_family_str"),
    ],
)
def test_what_cannot_be_is_named_by_file_and_row(tmp_path, name, file, old, new, said):
    getattr(miniature, name)(tmp_path)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    with pytest.raises(DatasetError, match=rf"{name}: \S*{file} is altered: .*{said}") as caught:
        load_task(f"{name}:{tmp_path}", partial=True)
    ((path, _),) = caught.value.problems
    assert path == file


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("nsynth", "nsynth-train/examples.json"),
        ("openmic", "class-map.json"),
        ("hear", "task_metadata.json"),
        ("hear", "fold00.json"),
    ],
)
def test_a_list_in_the_place_of_an_object_is_named(tmp_path, name, file):
    getattr(miniature, name)(tmp_path)
    (tmp_path / file).write_text(json.dumps(["bass"]))
    with pytest.raises(DatasetError, match=f"{file} is altered: it has .*; expected an object"):
        load_task(f"{name}:{tmp_path}", partial=True)


def test_a_clip_of_openmic_without_labels_is_left_out_of_a_partial_folder(tmp_path):
    miniature.openmic(tmp_path)
    table = tmp_path / "openmic-2018-aggregated-labels.csv"
    table.write_text("".join(line for line in table.open() if not line.startswith("000003_")))
    task = load_task(f"openmic:{tmp_path}", partial=True)
    assert [path.stem[:6] for path in task.paths] == [f"{i:06d}" for i in range(8) if i != 3]
    assert ("partitions/split01_train.csv", f"altered: 000003_3000 has no labels in {table.name}") in task.left_out
