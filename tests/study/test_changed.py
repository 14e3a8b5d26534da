"""A study of clips that have changed since, or of which some are left out: nothing is told of other ones."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

from matpac_fast.study import sweep
from matpac_fast.study.linear import ProbeConfig
from matpac_fast.study.sweep import StudyConfig, run_study
from matpac_fast.tasks import load_task
from tests.study.conftest import made_cost

PROBE = ProbeConfig(learning_rates=(0.3,), decays=(1e-3, 1e-1), seeds=2, steps=60)


@pytest.mark.parametrize("change", ["labels", "audio", "probe"])
def test_probes_are_of_what_is_asked_now(encoder_file, clips, tmp_path, change):
    folder = shutil.copytree(clips, tmp_path / "tones")
    study = StudyConfig((str(encoder_file),), (f"folder:{folder}",), (0.2,), probe=PROBE, cost=False, workers=1)
    (before,) = run_study(study, tmp_path / "out")
    if change == "labels":  # two classes change places
        text = (folder / "clips.csv").read_text().replace("class 0", "class x")
        (folder / "clips.csv").write_text(text.replace("class 1", "class 0").replace("class x", "class 1"))
    elif change == "audio":
        for i in range(10):
            (folder / f"0-{i}.wav").rename(folder / "x.wav")
            (folder / f"1-{i}.wav").rename(folder / f"0-{i}.wav")
            (folder / "x.wav").rename(folder / f"1-{i}.wav")
    else:
        study = dataclasses.replace(study, probe=dataclasses.replace(PROBE, learning_rates=(1.0,)))
    (again,), (fresh,) = (run_study(study, tmp_path / out) for out in ("out", "fresh"))
    assert torch.allclose(again.probed.scores[0], fresh.probed.scores[0], atol=1e-4)
    assert not torch.allclose(again.probed.scores[0], before.probed.scores[0], atol=1e-3)


def test_costs_are_those_of_a_cells_own_temporal_support(encoder_file, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "measure", lambda name, ts, *_: made_cost(ts))
    study = StudyConfig((str(encoder_file),), (f"folder:{clips}",), (0.5, 0.25), probe=PROBE, batch_sizes=(4,))
    cells = run_study(study, tmp_path / "out")
    assert [[cost.temporal_support for cost in cell.costs] for cell in cells] == [[0.25], [0.5]]


def test_what_is_told_of_clips_stays_where_others_are_left_out(clips):
    task = load_task(f"folder:{clips}")
    n = len(task.paths)
    lacks = [("clips.csv", "of before")]
    task = dataclasses.replace(
        task, groups=np.array([f"g{i}" for i in range(n)]), seconds=1.0 + np.arange(n), left_out=lacks
    )
    audio = [f"hash {i}" for i in range(n)]
    rest = sweep._without(task, audio, {"hash 3": "damaged", "hash 7": "damaged"})
    assert rest.left_out == [*lacks, *((str(task.paths[i]), "damaged") for i in (3, 7))]
    kept = [i for i in range(n) if i not in (3, 7)]
    for j, i in enumerate(kept):
        assert (rest.paths[j], rest.groups[j], rest.seconds[j]) == (task.paths[i], task.groups[i], task.seconds[i])
        assert rest.targets[j] == task.targets[i]
        assert {name: member[j] for name, member in rest.subsets.items()} == {
            name: member[i] for name, member in task.subsets.items()
        }
    (one,), (two,) = task.folds, rest.folds
    for name in ("train", "test", "valid"):
        assert [kept[j] for j in getattr(two, name)] == [i for i in getattr(one, name).tolist() if i in kept]
