"""What the op benchmarks share: cases, a clock that waits for the GPU, the machine's own limits, memory, the table."""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import floors
import torch

from matpac_fast import backend, use_backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SAMPLE = 5e-3  # seconds between two events of a GPU, at least: a few thousand times their resolution
MOST_CALLS = 100  # and calls at most
CYCLES = 2e9  # of a GPU a second, about; waiting a little long does no harm


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
    make: Callable[[], Callable[[], Any]]
    work: floors.Work
    dtype: torch.dtype = torch.float32

    def floor(self) -> float:
        """Seconds that this machine needs at least, by its measured bandwidth and matrix rate."""
        return self.work.seconds(bandwidth(), matrix_rate(self.dtype))


def variants(
    op: str,
    size: str,
    make: Callable[[Callable[..., Any]], Callable[[], Any]],
    fast: Any,
    plain: Any,
    work: floors.Work,
    dtype: torch.dtype = torch.float32,
) -> list[Case]:
    """The reference, torch.compile of it, and every launcher of `op` that runs here.

    `make(function)` builds the inputs and returns the call; `fast` is the op, `plain` its reference.
    """

    def compiled() -> Callable[[], Any]:
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
    """How a call is timed on a GPU: how many of it lie between two events, and how long the device waits for them."""

    calls: int = 1
    hold: float = 0.0  # seconds


def pace(call: Callable[[], Any]) -> Pace:
    """For a call that is warm: as many as last some milliseconds; on a CPU one, and it is not called."""
    if DEVICE.type != "cuda":
        return Pace()
    seconds, host = timed(call)
    assert host is not None
    calls = min(MOST_CALLS, math.ceil(SAMPLE / max(seconds, 1e-6)))
    return Pace(calls, 1.2 * calls * host)


def timed(call: Callable[[], Any], at: Pace = Pace()) -> tuple[float, float | None]:
    """Seconds of one call; and on a GPU, of which these are the device's, those in which the host hands it on.

    There the calls lie back to back between two events. The device is held up until the host has queued them all: a
    kernel that is shorter than its launch would have to wait for it.
    """
    if DEVICE.type != "cuda":
        start = clock()
        call()
        return clock() - start, None
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


def timed_on_gpu(call: Callable[[], Any], seconds: float = 0.5) -> dict[str, Any]:
    """What an op's row has of a call that is warm: the device's times, of five samples or more, and the host's."""
    at, samples = pace(call), []
    until = time.perf_counter() + seconds
    while len(samples) < 5 or (time.perf_counter() < until and len(samples) < 200):
        samples.append(timed(call, at))
    device, host = zip(*samples, strict=True)
    of_device = summary(list(device))
    return {
        "median_ms": of_device["ms"],
        "fastest_ms": 1e3 * min(device),
        "spread_ms": of_device["spread_ms"],
        "host_ms": 1e3 * statistics.median(host),
        "calls": at.calls,
    }


def _best(call: Callable[[], Any], rounds: int) -> float:
    return min(timed(call, Pace(calls=3))[0] for _ in range(rounds))


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


def peak_extra_mib(call: Callable[[], Any]) -> float | None:
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
        before = _status_kib("VmRSS")
        call()
        return max(0, _status_kib("VmHWM") - before) / 2**10
    except (OSError, AttributeError):
        return None


def _status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def run(benchmark: Any, case: Case) -> None:
    """Time `case` with pytest-benchmark and leave all that the table needs in its `extra_info`."""
    with use_backend(case.variant if case.variant in launchers(case.op) else "auto"):
        call = case.make()
        start = clock()
        call()
        first = clock() - start
        call()
        peak = peak_extra_mib(call)
        if DEVICE.type == "cuda":
            benchmark.extra_info.update(timed_on_gpu(call))
            benchmark.pedantic(call)  # once: its record is what the numbers travel in
        else:
            benchmark(call)
    benchmark.extra_info.update(
        op=case.op,
        size=case.size,
        variant=case.variant,
        device=DEVICE.type,
        first_call_ms=1e3 * first,
        floor_ms=1e3 * case.floor(),
        bytes=case.work.bytes,
        flops=case.work.flops,
        peak_extra_mib=peak,
    )


def told(info: dict[str, Any], median: float, fastest: float) -> tuple[dict[str, Any], float, float]:
    """A benchmark's numbers for the table: a GPU's own where it has them, else pytest-benchmark's, seconds."""
    return info, info.get("median_ms", 1e3 * median) / 1e3, info.get("fastest_ms", 1e3 * fastest) / 1e3


def table(results: list[tuple[dict[str, Any], float, float]]) -> list[str]:
    """Lines of the whole table from (extra_info, median, fastest) of each benchmark, seconds."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"{name}: copy {bandwidth() / 1e9:.0f} GB/s, float32 product {matrix_rate(torch.float32) / 1e9:.0f} GFLOP/s",
        f"{'op':<20} {'size':<35} {'variant':<20} {'ms':>9} {'fastest':>9} {'rate':>14} {'of floor':>8} "
        f"{'x reference':>11} {'extra MiB':>9}" + f" {'host ms':>9}" * (DEVICE.type == "cuda"),
    ]
    references = {(i["op"], i["size"]): median for i, median, _ in results if i["variant"] == "reference"}
    for info, median, fastest in results:
        work, unit = (info["flops"], "GFLOP/s") if info["flops"] else (info["bytes"], "GB/s")
        peak = "" if info["peak_extra_mib"] is None else f"{info['peak_extra_mib']:.1f}"
        against = references.get((info["op"], info["size"]))
        speedup = "" if against is None else f"{against / median:.2f}"
        rate = f"{work / median / 1e9:.1f} {unit}"
        lines.append(
            f"{info['op']:<20} {info['size']:<35} {info['variant']:<20} {1e3 * median:>9.3f} {1e3 * fastest:>9.3f} "
            f"{rate:>14} {info['floor_ms'] / 1e3 / median:>8.0%} {speedup:>11} {peak:>9}"
            + (f" {info['host_ms']:>9.3f}" if "host_ms" in info else "")
        )
    lines.append("first call, what it compiles included:")
    for info, _, _ in results:
        lines.append(f"{info['op']:<20} {info['size']:<35} {info['variant']:<20} {info['first_call_ms']:>9.1f}")
    return lines
