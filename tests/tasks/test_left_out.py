"""A clip that is missing from a partial data set moves nothing of the others."""

from __future__ import annotations

from typing import Any

import pytest
import soundfile

from matpac_fast.tasks import TASKS, Task, load_task
from tests.tasks import miniature


def told(task: Task) -> dict[Any, Any]:
    """What a task says of each of its clips."""
    parts: dict[int, list[str]] = {i: [] for i in range(len(task.paths))}
    for number, fold in enumerate(task.folds):
        for name, part in (("train", fold.train), ("test", fold.test), ("valid", fold.valid)):
            for i in [] if part is None else part.tolist():
                parts[i].append(f"{name} {number}")
    subsets = {i: [name for name, member in task.subsets.items() if member[i]] for i in parts}
    label = [str(value) for value in task.targets.tolist()]
    return {
        task.paths[i]: (label[i], task.groups[i], task.seconds[i], parts[i], subsets[i]) for i in range(len(task.paths))
    }


@pytest.mark.parametrize("name", [name for name in TASKS if name != "folder"])
def test_what_is_told_of_the_others_stays(tmp_path, name):
    # Of which one may lack a class.
    more = dict(splits=[f"fold0{i}" for i in range(4)]) if name == "hear" else {}
    getattr(miniature, name)(tmp_path, **more)
    for i, path in enumerate(load_task(f"{name}:{tmp_path}", partial=True).paths):
        info = soundfile.info(path)  # each clip of another length
        miniature.tone(path, info.duration + i / 500, i, info.samplerate)
    whole = load_task(f"{name}:{tmp_path}", partial=True)
    first = whole.folds[0]
    parts = [first.test, first.train if first.valid is None else first.valid]
    for gone in [whole.paths[part[0]] for part in parts if len(part) > 1]:  # else the part is empty
        gone.rename(tmp_path / "gone")
        rest = load_task(f"{name}:{tmp_path}", partial=True)
        (tmp_path / "gone").rename(gone)
        assert rest.classes == whole.classes
        assert told(rest) == {path: of for path, of in told(whole).items() if path != gone}
        assert rest.left_out == [(str(gone.relative_to(tmp_path)), "missing")]
