"""Names for the parts of a training step: for torch's profiler, for Nsight as NVTX ranges, and to be timed.

Off, a span costs a function call. `recorded()` and `timed()` switch them on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

# In the order of a step.
PARTS = (
    "front end",
    "patch embedding",
    "student",
    "predictor",
    "teacher",
    "heads",
    "losses",
    "backward",
    "EMA",
    "clip and optimiser",
)
_OFF = contextlib.nullcontext()
_open: Callable[[str], contextlib.AbstractContextManager[None]] | None = None


def span(part: str) -> contextlib.AbstractContextManager[None]:
    """What runs within belongs to `part`, one of PARTS."""
    return _OFF if _open is None else _open(part)


@contextlib.contextmanager
def _with(opener: Callable[[str], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    global _open
    before, _open = _open, opener
    try:
        yield
    finally:
        _open = before


def recorded() -> contextlib.AbstractContextManager[None]:
    """Within, spans are ranges of torch's profiler and of NVTX."""
    return _with(_range)


@contextlib.contextmanager
def _range(part: str) -> Iterator[None]:
    nvtx = torch.cuda.is_available()
    with torch.profiler.record_function(part):
        if nvtx:
            torch.cuda.nvtx.range_push(part)
        try:
            yield
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()


def timed(seconds: dict[str, float], device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within, `seconds` gathers each part's time. The device is waited for at both ends, so parts never overlap."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    @contextlib.contextmanager
    def opener(part: str) -> Iterator[None]:
        began = clock()
        try:
            yield
        finally:
            seconds[part] = seconds.get(part, 0.0) + clock() - began

    return _with(opener)
