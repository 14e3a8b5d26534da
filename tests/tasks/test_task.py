"""A task that is made in Python: what it may be, and what it is told that it may not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from matpac_fast.errors import ConfigError
from matpac_fast.tasks import DatasetError, Fold, Task


def several_labels(targets: list[list[float]], **fields) -> Task:
    """The first half of the clips trains, the rest tests."""
    n, k = len(targets), len(targets[0])
    names = np.array([f"clip {i}" for i in range(n)])
    fold = Fold(np.arange(n // 2), np.arange(n // 2, n))
    made = dict(groups=names, folds=[fold], seconds=np.ones(n)) | fields
    paths = [Path(f"/x/{name}.wav") for name in names]
    return Task("t", "multi", tuple("abcdef"[:k]), paths, np.array(targets, np.float32), **made)


def test_a_class_that_no_clip_has_is_asked_of_no_fold():
    """As of tags that a part of a data set lacks: nothing is scored by it. One that is tested must be trained."""
    nobody = [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, math.nan]]
    assert several_labels(nobody).classes == ("a", "b")
    with pytest.raises(DatasetError, match="fold 0 tests the class 'b', which it has not trained"):
        several_labels([*nobody[:3], [0.0, 1.0]])


@pytest.mark.parametrize("field", ["groups", "seconds"])
def test_a_task_has_a_group_and_a_length_for_each_clip(field):
    targets = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    with pytest.raises(ConfigError, match="t: 4 clips of 2 classes"):
        several_labels(targets, **{field: getattr(several_labels(targets), field)[:3]})
