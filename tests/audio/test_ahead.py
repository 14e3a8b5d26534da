"""Work done ahead: in order, not too far, and dropped when nobody wants it."""

from __future__ import annotations

import threading
import time

import pytest

from matpac_fast.audio import ahead
from matpac_fast.audio.ahead import in_order


def test_results_come_in_order_whatever_takes_longest():
    def job(i):
        time.sleep(0.002 * ((7 * i) % 5))
        return i

    jobs = ((1, lambda i=i: job(i)) for i in range(40))
    assert list(in_order(jobs, 4)) == list(range(40))
    assert list(in_order(iter(()), 4)) == []


@pytest.mark.parametrize(("size", "most"), [(1, 8 * 2 + 1), (10, 4), (1000, 3)])
def test_no_more_is_done_ahead_than_is_allowed(monkeypatch, size, most):
    monkeypatch.setattr(ahead, "_BYTES", 35)
    begun = []
    results = in_order(((size, lambda i=i: begun.append(i)) for i in range(100)), 2)
    for done in range(1, 50):
        next(results)
        assert len(begun) < done + most
    results.close()
    assert len(begun) < 50 + most


def test_workers_work_at_the_same_time():
    meet = threading.Barrier(3, timeout=10)
    assert sorted(in_order(((1, meet.wait) for _ in range(3)), 3)) == [0, 1, 2]


def test_an_error_is_raised_in_its_turn():
    def fail():
        raise KeyError("x")

    results = in_order(iter([(1, lambda: 1), (1, fail), (1, lambda: 3)]), 2)
    assert next(results) == 1
    with pytest.raises(KeyError):
        next(results)
