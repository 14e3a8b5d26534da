"""A training step taken apart: time, rate and distance from the floor of each part, and a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import MatpacConfig
from ..files import atomic
from ..reference import LogMelConfig
from ..spans import PARTS, recorded, timed
from ..train.config import resolve_precision
from ..train.flops import part_flops
from ._quiet import quiet_libraries
from .bench import seconds_of, training_step

_STEPS = 5


def take_apart(config: MatpacConfig, batch: int, device: torch.device, folder: Path) -> list[str]:
    """Write the trace into `folder`, and return the lines of the table."""
    step = training_step(config, batch, device)
    for _ in range(2):
        step()
    seconds: dict[str, float] = {}
    with timed(seconds, device):
        for _ in range(_STEPS):
            step()
    _trace(step, folder / "trace.json")
    written = [str(folder / "trace.json")]
    if device.type == "cuda":
        _memory(step, folder / "memory.pickle")
        written.append(str(folder / "memory.pickle"))

    dtype = torch.bfloat16 if resolve_precision("auto", device) == "bf16" else torch.float32
    rate, bandwidth = matrix_rate(device, dtype), copy_rate(device)
    flops = {part: batch * count for part, count in part_flops(config).items()}
    moved = least_bytes(config, batch, sum(p.numel() for p in _trained(config)))
    total = sum(seconds.values())
    lines = [
        f"a training step, part by part ({_STEPS} steps, the device waited for between parts); here products run at "
        f"{rate / 1e9:,.0f} GFLOP/s in {str(dtype).removeprefix('torch.')} and copies at {bandwidth / 1e9:,.0f} GB/s",
        f"{'':<20}{'ms':>10}{'share':>8}{'rate':>16}{'of floor':>10}",
    ]
    for part in PARTS:
        spent = seconds.get(part, 0.0) / _STEPS
        if not spent:
            continue
        if part in flops:
            told, floor = f"{flops[part] / spent / 1e9:,.0f} GFLOP/s", flops[part] / rate
        else:
            told, floor = f"{moved[part] / spent / 1e9:,.1f} GB/s", moved[part] / bandwidth
        lines.append(f"{part:<20}{1e3 * spent:>10.2f}{spent * _STEPS / total:>8.1%}{told:>16}{floor / spent:>10.0%}")
    lines.append(f"{'together':<20}{1e3 * total / _STEPS:>10.2f}")
    return [*lines, f"written: {', '.join(written)}"]


def _trained(config: MatpacConfig) -> list[torch.nn.Parameter]:
    from ..model import Matpac

    with torch.device("meta"):
        return [p for p in Matpac(config).parameters() if p.requires_grad]


def least_bytes(config: MatpacConfig, batch: int, parameters: int) -> dict[str, float]:
    """What the parts without products must move: waves and mels; average; AdamW's four numbers a weight, in float32."""
    mels = LogMelConfig()
    return {
        "front end": batch * (2 * mels.n_samples(config.n_frames) + 4 * config.n_mels * config.n_frames),
        "EMA": 3 * 4 * parameters,  # reads both, writes one
        "clip and optimiser": 7 * 4 * parameters,  # reads four, writes three
    }


def _trace(step: Callable[[], Any], path: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    # The profiler says when it starts and stops, and that it does not know what was allocated before it.
    with (
        quiet_libraries(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profiler,
        recorded(),
    ):
        step()
        step()
    with atomic(path) as beside:
        profiler.export_chrome_trace(str(beside))
        trace = json.loads(beside.read_text())
        trace["traceEvents"] += memory_timeline(trace["traceEvents"])
        beside.write_text(json.dumps(trace))


def memory_timeline(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Perfetto's counters of allocated memory, one a device, from the allocations that the profiler saw."""
    timeline = []
    for event in events:
        if event.get("name") == "[memory]":
            told = event["args"]
            name = f"allocated on the {'GPU' if told['Device Type'] else 'CPU'}"
            held = {"MiB": told["Total Allocated"] / 2**20}
            timeline.append({"ph": "C", "ts": event["ts"], "pid": event["pid"], "name": name, "args": held})
    return timeline


def _memory(step: Callable[[], Any], path: Path) -> None:
    # Of C++ it would look up the names of all frames, for seconds.
    torch.cuda.memory._record_memory_history(stacks="python", max_entries=1_000_000)
    try:
        step()
        with atomic(path) as beside:
            torch.cuda.memory._dump_snapshot(str(beside))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def _best(call: Callable[[], Any], device: torch.device) -> float:
    return min(seconds_of(call, device) for _ in range(5))


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product."""
    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / _best(lambda: a @ a, device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)
