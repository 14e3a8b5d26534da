"""How many cores a process may use, with and without a system that tells."""

import os

import pytest

from matpac_fast._cores import n_cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system pins no process to cores")
def test_cores_are_those_that_the_process_is_pinned_to():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert n_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("counted", "expected"), [(6, 6), (None, 1)])
def test_cores_without_affinity_are_those_of_the_machine(monkeypatch, counted, expected):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: counted)
    assert n_cores() == expected
