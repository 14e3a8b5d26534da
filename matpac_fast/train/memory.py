"""What a step on the CPU frees stays with the process, for the next step to use again."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import torch

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEP = {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0}
# Setting any ends glibc's own adjusting of them; these are the limits that it adjusts them up to.
_GIVE_BACK = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25, _MMAP_MAX: 65_536}


@contextlib.contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """While training on a CPU malloc gives no memory back to the kernel; on leaving, what is free goes back at once.

    Activations and gradients are freed in each step and wanted again in the next. By itself glibc returns most of it in
    between, and a step spends up to a tenth of its time in page faults: some 80,000 of them with the preset `base` and
    eight crops. Where malloc is not glibc's (another system, musl, jemalloc loaded before it) nothing changes.
    """
    set_option, trim = _glibc("mallopt"), _glibc("malloc_trim")
    if device.type != "cpu" or set_option is None or trim is None:
        yield
        return
    for name, value in _KEEP.items():
        set_option(name, value)
    try:
        yield
    finally:
        for name, value in _GIVE_BACK.items():
            set_option(name, value)
        trim(0)


def _glibc(name: str):
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
