"""Memory and compute against temporal support and batch size: embedding and training, from 0.16 s to 30 s.

    python benchmarks/bench_temporal_support.py --json ts.json --plot ts.png
    python benchmarks/bench_temporal_support.py --preset tiny --backends reference --batch-sizes 1 16

Of every backend and temporal support, for each batch size: time, peak memory and counted multiply-adds a clip; and the
largest batch that fits. On a GPU that is tried, from a guess by the growth of memory on; on a CPU, where running out
would take the machine down, it is the guess itself, for half of the memory that is free, and marked with ~. The peak is
the allocator's on a GPU, and on a CPU what resident memory grows by, in a process of its own, from before there is a
model: weights, and in training gradients and moments, count in both.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import _timing
from _plots import temporal_support as plot

from matpac_fast import __version__, ops, use_backend
from matpac_fast.backend import BACKENDS
from matpac_fast.config import PRESETS, MatpacConfig
from matpac_fast.encoder import load_encoder
from matpac_fast.model import Matpac
from matpac_fast.reference import LogMelConfig
from matpac_fast.train.config import TrainConfig, resolve_precision
from matpac_fast.train.flops import step_flops
from matpac_fast.train.step import make_optimizer, train_step

KINDS = ("embed", "train")
SECONDS = (0.16, 0.32, 0.64, 1.28, 2.56, 6.08, 10.08, 20.0, 30.08)
COLUMNS = ("ms", "ms_per_second", "peak_mib", "gmacs", "gmacs_per_second", "largest_batch")
ROUNDS = 3
MOST = 2**15  # crops a batch; more are of no use, and past what some kernels' launches can count


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="base" if gpu else "small")
    parser.add_argument("--seconds", type=float, nargs="+", default=SECONDS)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["auto", "reference"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64] if gpu else [1, 4])
    parser.add_argument("--limit", type=float, help="begin no further temporal support after this many seconds")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--plot", type=Path, help="also draw the curves here")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)  # kind, seconds, backend: one process's work
    options = parser.parse_args()
    if options.point:
        kind, seconds, backend = options.point
        print(json.dumps(measure(kind, float(seconds), backend, options)))
        return
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.preset}, {where}, torch {torch.__version__}")
    heads = ("", "backend", "s", "batch", "ms", "ms per s", "peak MiB", "GMAC", "a second", "largest")
    print("".join(f"{head:>10}" for head in heads))
    began, rows, left_out = time.monotonic(), [], []
    # The shortest first, and of each all backends: what a limit cuts off is the long end.
    for seconds in options.seconds:
        if options.limit and time.monotonic() - began > options.limit:
            left_out.append(f"{seconds:g} s")
            continue
        for kind in KINDS:
            for backend in options.backends:
                found = point(kind, seconds, backend, options)
                rows += found
                for row in found:
                    cells = [f"{row[c]:,.1f}" if c != "largest_batch" else row[c] for c in COLUMNS]
                    cells = [kind, backend, f"{seconds:g}", str(row["batch_size"]), *cells]
                    print("".join(f"{cell:>10}" for cell in cells), flush=True)
    if left_out:
        print(f"left out for want of time: {', '.join(left_out)}")
    result = {"preset": options.preset, "device": where, "torch": torch.__version__, "matpac_fast": __version__}
    result |= {"rows": rows, "left_out": left_out}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(result, options.plot)


def point(kind: str, seconds: float, backend: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a batch size: here on a GPU, whose allocator tells the peak of a call; on a CPU in a process of its own."""
    if options.device != "cpu":
        return measure(kind, seconds, backend, options)
    command = [sys.executable, __file__, "--point", kind, str(seconds), backend, "--device", options.device]
    command += ["--preset", options.preset, "--batch-sizes", *map(str, options.batch_sizes)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def measure(kind: str, seconds: float, backend: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(options.device)
    mels = LogMelConfig()
    frames = round(seconds * mels.sample_rate / mels.hop)
    if frames % 16:
        sys.exit(f"{seconds:g} s are {frames} frames; expected a multiple of 16, 0.16 s")
    idle = resident_mib() if device.type == "cpu" else 0.0
    if device.type == "cuda":  # the model of the point before
        gc.collect()
        torch.cuda.empty_cache()
    with use_backend(backend):
        call, gmacs = make(kind, frames, options.preset, device)
        rows = []
        for batch in sorted(options.batch_sizes):
            wave = 0.1 * torch.randn(batch, mels.n_samples(frames), generator=torch.Generator().manual_seed(0))
            wave = wave.to(device)
            call(wave)
            times = []
            for _ in range(ROUNDS):
                start = _timing.clock()
                call(wave)
                times.append((_timing.clock() - start) / batch)
            row = {"kind": kind, "seconds": seconds, "backend": backend, "batch_size": batch, **_timing.summary(times)}
            row |= {"ms_per_second": row["ms"] / seconds, "gmacs": gmacs, "gmacs_per_second": gmacs / seconds}
            rows.append(row | {"peak_mib": peak_mib(lambda wave=wave: call(wave), device) - idle})
        guess = largest_guess(rows, device)
        if device.type == "cuda":
            fits = largest_that_fits(call, min(guess, MOST), mels.n_samples(frames), device)
            largest = f">{fits}" if fits == MOST else str(fits)
        else:
            largest = f"~{float(f'{guess:.2g}'):.0f}"
    return [row | {"largest_batch": largest} for row in rows]


def make(kind: str, frames: int, preset: str, device: torch.device) -> tuple[Callable[[torch.Tensor], Any], float]:
    """What is timed, from waves (B, S) on the device, and its multiply-adds a clip in thousand millions."""
    mels = LogMelConfig()
    if kind == "embed":
        encoder = load_encoder(f"untrained-{preset}", device)
        one = torch.zeros(1, mels.n_samples(frames), device=device)

        def embed(wave: torch.Tensor) -> Any:
            return encoder.embed(wave, mels.sample_rate, batch_size=len(wave))

        return embed, count_macs(lambda: embed(one)) / 1e9
    config = MatpacConfig.preset(preset, n_frames=frames)
    model = Matpac(config).to(device).train()
    optimizer = make_optimizer(model, TrainConfig())
    precision = resolve_precision("auto", device)

    def train(wave: torch.Tensor) -> Any:
        ids_shuffle = ops.mask_shuffle(0, 7, torch.arange(len(wave), device=device), config.n_tokens)
        return train_step(model, optimizer, [(ops.log_mel(wave), ids_shuffle)], 7, 3e-4, 3.0, precision)

    return train, step_flops(config) / 2e9


def largest_guess(rows: list[dict[str, Any]], device: torch.device) -> float:
    """The batch at which memory, growing as between the least and the largest batch measured, would run out."""
    first, last = rows[0], rows[-1]
    room = torch.cuda.mem_get_info(device)[1] / 2**20 if device.type == "cuda" else free_mib() / 2
    more = last["batch_size"] - first["batch_size"]
    growth = (last["peak_mib"] - first["peak_mib"]) / more if more else last["peak_mib"] / last["batch_size"]
    return max(0.0, first["batch_size"] + (room - first["peak_mib"]) / max(growth, 0.01))


def largest_that_fits(call: Callable[[torch.Tensor], Any], guess: float, samples: int, device: torch.device) -> int:
    """The largest of guess, 0.97 guess, 0.94 guess ... that runs: a few trials, and a few hundredths off at most."""
    batch = max(1, int(guess))
    while batch > 1:
        try:
            call(torch.zeros(batch, samples, device=device))
            torch.cuda.synchronize()
            return batch
        except torch.cuda.OutOfMemoryError:
            pass
        # Outside of the handler, which keeps the frames and tensors of what failed.
        torch.cuda.empty_cache()
        batch = min(batch - 1, int(0.97 * batch))
    return batch


def count_macs(call: Callable[[], Any]) -> float:
    """Multiply-adds of the matrix products and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


def peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """The peak of one call: of the allocator on a GPU, of resident memory on a CPU; what was there before included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    call()
    return status_mib("VmHWM")


def resident_mib() -> float:
    return status_mib("VmRSS")


def free_mib() -> float:
    return status_mib("MemAvailable", "/proc/meminfo")


def status_mib(name: str, file: str = "/proc/self/status") -> float:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 2**10
    raise OSError(f"{file} has no {name}")


if __name__ == "__main__":
    main()
