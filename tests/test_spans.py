"""Spans: what a GPU is asked for at their ends, which is told here by what stands in its place."""

from __future__ import annotations

import pytest
import torch

from matpac_fast import spans


@pytest.fixture
def asked(monkeypatch) -> list[object]:
    """What was asked of a GPU, in order."""
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", asked.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: asked.append("end"))
    return asked


def test_recorded_spans_are_ranges_that_end_whatever_happens(asked):
    with spans.recorded():
        with spans.span("student"), spans.span("patch embedding"):
            pass
        with pytest.raises(KeyError), spans.span("heads"):
            raise KeyError
    with spans.span("EMA"):
        pass
    assert asked == ["student", "patch embedding", "end", "end", "heads", "end"]


def test_a_gpu_is_waited_for_at_both_ends_of_what_is_timed(asked):
    seconds, device = {}, torch.device("cuda", 1)
    with spans.timed(seconds, device):
        for _ in range(2):
            with spans.span("losses"):
                asked.append("work")
    assert asked == [device, "work", device] * 2
    assert list(seconds) == ["losses"]


def test_a_parts_time_is_the_sum_of_what_its_spans_took(monkeypatch):
    clock = iter([10.0, 13.0, 20.0, 21.0, 30.0, 35.0])
    monkeypatch.setattr(spans.time, "perf_counter", lambda: next(clock))
    seconds = {}
    with spans.timed(seconds, torch.device("cpu")):
        for part in ("losses", "EMA", "losses"):
            with spans.span(part):
                pass
    assert seconds == {"losses": 3.0 + 5.0, "EMA": 1.0}
