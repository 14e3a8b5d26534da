"""How many cores this process may use."""

from __future__ import annotations

import os


def n_cores() -> int:
    """At least 1; where the system tells (Linux does, macOS does not), fewer than the machine has if it is pinned."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
