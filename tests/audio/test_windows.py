"""Windows cover what they should, for any length, size and hop."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matpac_fast.audio.windows import REMAINDERS, windows
from matpac_fast.errors import ConfigError

lengths = st.integers(1, 500)


@given(n=lengths, size=lengths, hop=lengths, remainder=st.sampled_from(REMAINDERS))
def test_spans(n, size, hop, remainder):
    spans = windows(n, size, hop, remainder)
    assert (spans[0, 0], spans.dtype) == (0, np.int64)
    assert (np.diff(spans[:, 0]) == hop).all()
    assert (spans[:, 1] > spans[:, 0]).all()
    assert (spans[:, 0] < n).all()
    whole = spans[:-1]
    assert (whole[:, 1] - whole[:, 0] == size).all()
    last = spans[-1, 1] - spans[-1, 0]
    if remainder == "pad":
        assert last == size
    else:
        assert spans[-1, 1] <= n
    if remainder in ("keep", "pad"):
        # Nothing is lost: every sample is in a window, or in a gap that a hop longer than the window asked for.
        covered = np.zeros(n, dtype=bool)
        for a, b in spans:
            covered[a:b] = True
        assert covered.all() or hop > size
        assert (~covered).sum() <= len(spans) * max(0, hop - size)
    if remainder == "merge" and hop <= size:
        assert spans[-1, 1] == n
    if remainder == "drop" and n >= size:
        assert last == size


@pytest.mark.parametrize(
    ("n", "size", "hop", "remainder", "want"),
    [
        (10, 4, 4, "keep", [[0, 4], [4, 8], [8, 10]]),
        (10, 4, 4, "pad", [[0, 4], [4, 8], [8, 12]]),
        (10, 4, 4, "merge", [[0, 4], [4, 10]]),
        (10, 4, 4, "drop", [[0, 4], [4, 8]]),
        (8, 4, 2, "keep", [[0, 4], [2, 6], [4, 8]]),
        (9, 4, 2, "keep", [[0, 4], [2, 6], [4, 8], [6, 9]]),
        (3, 4, 4, "keep", [[0, 3]]),
        (3, 4, 4, "pad", [[0, 4]]),
        (3, 4, 4, "drop", [[0, 3]]),
        (9, 2, 5, "keep", [[0, 2], [5, 7]]),
    ],
)
def test_examples(n, size, hop, remainder, want):
    assert windows(n, size, hop, remainder).tolist() == want


def test_what_cannot_be():
    with pytest.raises(ConfigError, match="size 0"):
        windows(5, 0, 1)
    with pytest.raises(ConfigError, match="remainder is 'x'; expected one of keep, pad, merge, drop"):
        windows(5, 1, 1, "x")
