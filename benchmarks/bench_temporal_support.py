"""Memory and compute against temporal support: embedding and training, from 0.16 s to 30 s.

    python benchmarks/bench_temporal_support.py --json ts.json --plot ts.png
    python benchmarks/bench_temporal_support.py --preset tiny --backend reference

Every point is measured in a process of its own, so that its peak memory is its own. "largest batch" is tried on a GPU,
by doubling and halving until memory runs out; on a CPU, where running out would take the machine down, it is the batch
at which the measured growth of memory would reach half of what is free, and marked with ~.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from matpac_fast import __version__, ops, use_backend
from matpac_fast.config import PRESETS, MatpacConfig
from matpac_fast.encoder import load_encoder
from matpac_fast.model import Matpac
from matpac_fast.reference import LogMelConfig
from matpac_fast.train.config import TrainConfig
from matpac_fast.train.flops import step_flops
from matpac_fast.train.step import make_optimizer, train_step

SECONDS = (0.16, 0.32, 0.64, 1.28, 2.56, 6.08, 10.08, 20.0, 30.08)
COLUMNS = ("ms", "ms_per_second", "peak_mib", "gmacs", "gmacs_per_second", "largest_batch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--seconds", type=float, nargs="+", default=SECONDS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch-size", type=int, default=4, help="of the timed calls")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--plot", type=Path, help="also draw the curves here")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)  # kind, seconds, batch: one process's work
    options = parser.parse_args()
    if options.point:
        kind, seconds, batch = options.point[0], float(options.point[1]), int(options.point[2])
        with use_backend(options.backend):
            print(json.dumps(measure(kind, seconds, batch, options)))
        return
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.preset}, batch {options.batch_size}, {options.backend}, {where}, torch {torch.__version__}")
    heads = ("", "s", "ms", "ms per s", "peak MiB", "GMAC", "GMAC per s", "largest batch")
    print("".join(f"{head:>{8 if i < 2 else 14}}" for i, head in enumerate(heads)))
    rows = []
    for kind in ("embed", "train"):
        for seconds in options.seconds:
            rows.append(point(kind, seconds, options))
            cells = [f"{rows[-1][c]:,.1f}" if c != "largest_batch" else rows[-1][c] for c in COLUMNS]
            print(f"{kind:>8}{seconds:>8g}" + "".join(f"{cell:>14}" for cell in cells), flush=True)
    if options.json:
        header = {"preset": options.preset, "batch_size": options.batch_size, "backend": options.backend}
        header |= {"device": where, "torch": torch.__version__, "matpac_fast": __version__}
        options.json.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    if options.plot:
        plot(rows, f"{options.preset}, batch {options.batch_size}, {where}", options.plot)


def point(kind: str, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """One temporal support: time at the batch asked for, and the largest batch."""

    def child(batch: int) -> dict[str, Any] | None:
        command = [sys.executable, __file__, "--point", kind, str(seconds), str(batch)]
        for name in ("preset", "device", "backend"):
            command += [f"--{name}", getattr(options, name)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode and "out of memory" not in run.stderr.lower():
            sys.exit(run.stderr)
        return None if run.returncode else json.loads(run.stdout.splitlines()[-1])

    row = child(options.batch_size)
    if row is None:
        sys.exit(f"{kind} at {seconds:g} s: batch {options.batch_size} does not fit")
    if options.device == "cuda":
        fits, fails = options.batch_size, None
        while fails is None or fails - fits > max(1, fits // 16):
            trial = 2 * fits if fails is None else (fits + fails) // 2
            fits, fails = (trial, fails) if child(trial) else (fits, trial)
        row["largest_batch"] = str(fits)
    else:
        single = child(1)
        assert single is not None
        growth = (row["peak_mib"] - single["peak_mib"]) / max(1, options.batch_size - 1)
        largest = 1 + (free_mib() / 2 - single["peak_mib"]) / max(growth, 0.1)
        row["largest_batch"] = f"~{float(f'{max(0.0, largest):.2g}'):.0f}"
    return {"kind": kind, "seconds": seconds, "batch_size": options.batch_size, **row}


def measure(kind: str, seconds: float, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    mels = LogMelConfig()
    frames = round(seconds * mels.sample_rate / mels.hop)
    if frames % 16:
        sys.exit(f"{seconds:g} s are {frames} frames; expected a multiple of 16, 0.16 s")
    wave = 0.1 * torch.randn(batch, mels.n_samples(frames), generator=torch.Generator().manual_seed(0))
    wave = wave.to(device)
    call: Callable[[], Any]
    if kind == "embed":
        encoder = load_encoder(f"untrained-{options.preset}", device)
        call = lambda: encoder.embed(wave, mels.sample_rate, batch_size=batch)  # noqa: E731
        gmacs = count_macs(lambda: encoder.embed(wave[:1], mels.sample_rate)) / 1e9
    else:
        config = MatpacConfig.preset(options.preset, n_frames=frames)
        model = Matpac(config).to(device).train()
        optimizer = make_optimizer(model, TrainConfig())
        index = torch.arange(batch, device=device)

        def call() -> Any:
            ids_shuffle = ops.mask_shuffle(0, 7, index, config.n_tokens)
            return train_step(model, optimizer, [(ops.log_mel(wave), ids_shuffle)], 7, 3e-4, 3.0)

        gmacs = step_flops(config) / 2e9
    call()
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    ms = 1e3 * statistics.median(times) / batch
    return {
        "ms": ms,
        "ms_per_second": ms / seconds,
        "peak_mib": peak_mib(call, device),
        "gmacs": gmacs,
        "gmacs_per_second": gmacs / seconds,
    }


def count_macs(call: Callable[[], Any]) -> float:
    """Multiply-adds of the matrix products and attention."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


def peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """The peak of one call: of the allocator on a GPU, weights included; of resident memory beyond the idle process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = status_kib("VmRSS")
    call()
    return (status_kib("VmHWM") - before) / 2**10


def status_kib(name: str, file: str = "/proc/self/status") -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise OSError(f"{file} has no {name}")


def free_mib() -> float:
    return status_kib("MemAvailable", "/proc/meminfo") / 2**10


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    labels = {"ms": "ms a clip", "ms_per_second": "ms a second of audio", "peak_mib": "peak memory, MiB"}
    labels["gmacs_per_second"] = "GMAC a second of audio"
    figure, axes = plt.subplots(1, len(labels), figsize=(4 * len(labels), 3.4), layout="constrained")
    for axis, (name, label) in zip(axes, labels.items(), strict=True):
        for kind, colour in (("embed", "#0072b2"), ("train", "#d55e00")):
            mine = [row for row in rows if row["kind"] == kind]
            axis.plot([r["seconds"] for r in mine], [r[name] for r in mine], "o-", color=colour, label=kind, ms=4)
        axis.set(xscale="log", yscale="log", xlabel="temporal support, s", title=label)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
