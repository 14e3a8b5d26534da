"""What the op benchmarks share: cases, a clock that waits for the GPU, the machine's own limits, memory, the table."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import floors
import torch

from matpac_fast import backend, use_backend
from matpac_fast.files import write_text
from matpac_fast.train.memory import freed_memory_kept

Call = Callable[[], Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Seconds that are timed together, at least: a few thousand times the resolution of a GPU's events. On a CPU torch's
# threads spin on for some milliseconds of it, waiting for more of what had its turn before.
SAMPLE = 5e-3 if DEVICE.type == "cuda" else 4e-2
MOST_CALLS = 100  # and calls at most
CYCLES = 2e9  # of a GPU a second, about; waiting a little long does no harm
ROWS = "MATPAC_FAST_ROWS"  # names a file that takes up the rows as they come: pytest-benchmark writes at its end


@dataclass(frozen=True)
class Case:
    """One way to compute one op at one size.

    Attributes:
        op, size, variant: for the table. A variant is a launcher ("cpp", "cuda", "triton"), "reference",
            "compiled reference" or a peer.
        make: builds the inputs on DEVICE and returns the call to time.
        work: the least that must be read, written and computed.
        dtype: of the arithmetic, which sets its floor.
    """

    op: str
    size: str
    variant: str
    make: Callable[[], Call]
    work: floors.Work
    dtype: torch.dtype = torch.float32

    def floor(self) -> float:
        """Seconds that this machine needs at least, by its measured bandwidth and matrix rate."""
        return self.work.seconds(bandwidth(), matrix_rate(self.dtype))


def variants(
    op: str,
    size: str,
    make: Callable[[Callable[..., Any]], Call],
    fast: Any,
    plain: Any,
    work: floors.Work,
    dtype: torch.dtype = torch.float32,
) -> list[Case]:
    """The reference, torch.compile of it, and every launcher of `op` that runs here.

    `make(function)` builds the inputs and returns the call; `fast` is the op, `plain` its reference.
    """

    def compiled() -> Call:
        torch._dynamo.reset()
        return make(torch.compile(plain))

    cases = [
        Case(op, size, "reference", lambda: make(plain), work, dtype),
        Case(op, size, "compiled reference", compiled, work, dtype),
    ]
    for launcher in launchers(op):
        if backend.unavailable(launcher) is None:
            cases.append(Case(op, size, launcher, lambda: make(fast), work, dtype))
    return cases


def launchers(op: str) -> tuple[str, ...]:
    """The kernels of `op` on DEVICE; none for a formula that has no kernel."""
    return backend.LAUNCHERS.get(op, {}).get(DEVICE.type, ())


@functools.cache
def installed(package: str) -> bool:
    """Whether a peer imports; one that is built for another torch may be installed and not load."""
    try:
        importlib.import_module(package)
    except (ImportError, OSError):
        return False
    return True


def summary(seconds: list[float]) -> dict[str, Any]:
    """The median of some times and their quartiles, in ms."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"ms": 1e3 * statistics.median(seconds), "spread_ms": [1e3 * quartiles[0], 1e3 * quartiles[2]]}


def clock() -> float:
    """Seconds, once the GPU has done all it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Pace:
    """How many calls are timed together, and for how long a GPU waits before the first."""

    calls: int = 1
    hold: float = 0.0  # seconds


def pace(call: Call) -> Pace:
    """For a call that is warm: as many as last some milliseconds."""
    seconds, host = timed(call)
    calls = min(MOST_CALLS, math.ceil(SAMPLE / max(seconds, 1e-6)))
    return Pace(calls, 1.2 * calls * (host or 0))


def timed(call: Call, at: Pace = Pace()) -> tuple[float, float | None]:
    """Seconds of one call; and on a GPU, of which these are the device's, those in which the host hands it on.

    There the calls lie back to back between two events. The device is held up until the host has queued them all: a
    kernel that is shorter than its launch would have to wait for it.
    """
    if DEVICE.type != "cuda":
        start = clock()
        for _ in range(at.calls):
            call()
        return (clock() - start) / at.calls, None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if at.hold:
        torch.cuda._sleep(int(at.hold * CYCLES))
    begin.record()
    start = time.perf_counter()
    for _ in range(at.calls):
        call()
    host = time.perf_counter() - start
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / at.calls, host / at.calls


@dataclass(frozen=True)
class Times:
    """Seconds of one call, turn by turn with those of others; `host` is empty on a CPU."""

    calls: int  # that one turn is the mean of
    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        return summary(self.device) | ({"host_ms": 1e3 * statistics.median(self.host)} if self.host else {})

    def over(self, other: Times) -> float:
        """How many times its seconds those of the other are: the median of the turns' ratios."""
        return statistics.median(theirs / own for theirs, own in zip(other.device, self.device, strict=True))


def turn_by_turn(
    calls: dict[str, Call], more: Callable[[int], bool], served_by: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Times]:
    """Time calls that are warm for as long as `more(turns so far)`; `served_by` has the backends to force, by name.

    A machine that slows down then slows all of them. On a CPU malloc keeps what is freed, as in `pretrain`: otherwise
    whose memory comes from the system anew would depend on what the others leave behind.
    """
    paces: dict[str, Pace] = {}
    times: dict[str, Times] = {}
    with freed_memory_kept(DEVICE):
        for name, call in calls.items():
            with use_backend(served_by.get(name, "auto")):
                paces[name] = pace(call)
            times[name] = Times(paces[name].calls)
        turns = 0
        while more(turns):
            for name, call in calls.items():
                with use_backend(served_by.get(name, "auto")):
                    device, host = timed(call, paces[name])
                times[name].device.append(device)
                if host is not None:
                    times[name].host.append(host)
            turns += 1
    return times


def _best(call: Call, rounds: int) -> float:
    at = pace(call)
    return min(timed(call, at)[0] for _ in range(rounds))


@functools.cache
def bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.ones(2**28 if DEVICE.type == "cuda" else 2**26, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), 10)


@functools.cache
def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    n = 8192 if DEVICE.type == "cuda" else 1536
    a = torch.randn(n, n, device=DEVICE).to(dtype)
    out = torch.empty_like(a)
    return 2 * n**3 / _best(lambda: torch.mm(a, a, out=out), 10)


def answer(*command: str) -> str:
    """What a process prints; where it fails, the end of this one, with what that one said."""
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return run.stdout


def peak_extra_mib(call: Call) -> float | None:
    """MiB above what was there before the call, its outputs included; None where the system does not tell."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else the call may reuse pages that malloc had kept
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = status_mib("VmRSS")
        call()
        return max(0.0, status_mib("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def status_mib(name: str, file: str = "/proc/self/status") -> float:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 2**10
    raise OSError(f"{file} has no {name}")


def run(benchmark: Any, cases: list[Case], seconds: float) -> None:
    """Time the variants of one op at one size turn by turn, and leave their rows in the benchmark's `extra_info`, and
    in the file that `ROWS` names.

    One that fails leaves the others theirs, and is raised after them.
    """
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    failed: list[Exception] = []
    served_by = {case.variant: case.variant for case in cases if case.variant in launchers(case.op)}
    for case in cases:
        try:
            with use_backend(served_by.get(case.variant, "auto")):
                call = case.make()
                start = clock()
                call()
                first = clock() - start
                call()
                peak = peak_extra_mib(call)
        except Exception as error:
            failed.append(error)
            continue
        calls[case.variant] = call
        rows[case.variant] = {
            "op": case.op,
            "size": case.size,
            "variant": case.variant,
            "device": DEVICE.type,
            "first_call_ms": 1e3 * first,
            "floor_ms": 1e3 * case.floor(),
            "bytes": case.work.bytes,
            "flops": case.work.flops,
            "peak_extra_mib": peak,
        }
    until = time.perf_counter() + seconds * len(calls)
    times = turn_by_turn(calls, lambda turns: turns < 5 or (time.perf_counter() < until and turns < 200), served_by)
    for name, row in rows.items():
        own = times[name]
        found = own.row()
        row |= {"median_ms": found.pop("ms"), "fastest_ms": 1e3 * min(own.device), "turns": len(own.device), **found}
        row["over"] = {other: own.over(theirs) for other, theirs in times.items() if other != name}
    benchmark.pedantic(lambda: None)  # its record is what the rows travel in
    benchmark.extra_info["rows"] = list(rows.values())
    if named := os.environ.get(ROWS):
        path = Path(named)
        so_far = json.loads(path.read_text()) if path.exists() else []
        write_text(path, json.dumps([*so_far, *rows.values()]))
    if failed:
        raise failed[0]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the whole table."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"{name}: copy {bandwidth() / 1e9:.0f} GB/s, float32 product {matrix_rate(torch.float32) / 1e9:.0f} GFLOP/s",
        f"{'op':<20} {'size':<35} {'variant':<20} {'ms':>9} {'fastest':>9} {'rate':>14} {'of floor':>8} "
        f"{'x reference':>11} {'extra MiB':>9}" + f" {'host ms':>9}" * (DEVICE.type == "cuda"),
    ]
    for row in rows:
        work, unit = (row["flops"], "GFLOP/s") if row["flops"] else (row["bytes"], "GB/s")
        peak = "" if row["peak_extra_mib"] is None else f"{row['peak_extra_mib']:.1f}"
        over = row["over"].get("reference")
        speedup = "" if over is None else f"{over:.2f}"
        rate = f"{work / row['median_ms'] / 1e6:.1f} {unit}"
        lines.append(
            f"{row['op']:<20} {row['size']:<35} {row['variant']:<20} {row['median_ms']:>9.3f} "
            f"{row['fastest_ms']:>9.3f} {rate:>14} {row['floor_ms'] / row['median_ms']:>8.0%} {speedup:>11} {peak:>9}"
            + (f" {row['host_ms']:>9.3f}" if "host_ms" in row else "")
        )
    lines.append("first call, what it compiles included:")
    for row in rows:
        lines.append(f"{row['op']:<20} {row['size']:<35} {row['variant']:<20} {row['first_call_ms']:>9.1f}")
    return lines
