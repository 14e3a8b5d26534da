"""Memory and compute against temporal support and batch size: embedding and training, from 0.16 s to 30 s.

    python benchmarks/bench_temporal_support.py --json ts.json --plot ts.png
    python benchmarks/bench_temporal_support.py --preset tiny --backends reference --batch-sizes 1 16

Of every backend and temporal support, for each batch size: time, peak memory and counted multiply-adds a clip; and the
largest batch that fits. On a GPU that is tried, from a guess by the growth of memory on: a training step, and of
embedding the network alone, over log-mels that are ready, since `embed` halves a batch that does not fit by itself. On
a CPU, where running out would take the machine down, it is the guess itself, for half of the memory that is free, and
marked with ~. The peak is the allocator's on a GPU, and on a CPU what resident memory grows by, in a process of its
own, from before there is a model: weights, and in training gradients and moments, count in both. The JSON is written
anew after every point, so that what is known is there however the script ends.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import _options
import _timing
from _plots import temporal_support as plot

from matpac_fast import __version__, ops, use_backend
from matpac_fast.backend import BACKENDS, unavailable
from matpac_fast.config import PRESETS, MatpacConfig
from matpac_fast.encoder import load_encoder
from matpac_fast.files import write_text
from matpac_fast.model import Matpac
from matpac_fast.oom import is_out_of_memory
from matpac_fast.reference import LogMelConfig
from matpac_fast.study.cost import macs_of
from matpac_fast.train.config import TrainConfig, resolve_precision
from matpac_fast.train.flops import step_flops
from matpac_fast.train.step import make_optimizer, train_step
from matpac_fast.vit_encoder import Encoder

KINDS = ("embed", "train")
SECONDS = (0.16, 0.32, 0.64, 1.28, 2.56, 6.08, 10.08, 20.0, 30.08)
COLUMNS = ("ms", "ms_per_second", "peak_mib", "gmacs", "gmacs_per_second", "largest_batch")
ROUNDS = 3
MOST = 2**15  # crops a batch; more are of no use, and past what some kernels' launches can count


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="base" if gpu else "small")
    parser.add_argument("--seconds", type=in_patches, nargs="+", default=SECONDS)
    parser.add_argument("--device", type=_options.device, default="cuda" if gpu else "cpu")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["auto", "reference"])
    parser.add_argument("--batch-sizes", type=_options.count, nargs="+", default=[1, 64] if gpu else [1, 4])
    parser.add_argument("--limit", type=_options.positive, help="begin no further one after this many seconds")
    parser.add_argument("--json", type=_options.output, help="also write the numbers here")
    parser.add_argument("--plot", type=_options.output, help="also draw the curves here")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)  # kind, seconds, backend: one process's work
    options = parser.parse_args()
    if options.point:
        kind, seconds, backend = options.point
        print(json.dumps(next(measure(kind, float(seconds), [backend], options))))
        return
    for name in options.backends:
        if reason := unavailable(name):
            parser.error(f"--backends {name} cannot run here: {reason}")
    if options.plot and not _timing.installed("matplotlib"):
        parser.error("--plot needs matplotlib: pip install 'matpac_fast[plots]'")
    device: torch.device = options.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.preset}, {where}, torch {torch.__version__}")
    heads = ("", "backend", "s", "batch", "ms", "ms per s", "peak MiB", "GMAC", "a second", "largest")
    print("".join(f"{head:>10}" for head in heads))
    began, rows, left_out = time.monotonic(), [], []
    result = {"preset": options.preset, "device": where, "torch": torch.__version__, "matpac_fast": __version__}
    result |= {"rows": rows, "left_out": left_out}
    # The shortest first, and of each all backends: what a limit cuts off is the long end.
    for seconds in sorted(options.seconds):
        if options.limit and time.monotonic() - began > options.limit:
            left_out.append(f"{seconds:g} s")
            continue
        for kind in KINDS:
            for found in points(kind, seconds, options):
                rows += found
                for row in found:
                    cells = [f"{row[c]:,.1f}" if c != "largest_batch" else row[c] for c in COLUMNS]
                    cells = [kind, row["backend"], f"{seconds:g}", str(row["batch_size"]), *cells]
                    print("".join(f"{cell:>10}" for cell in cells), flush=True)
                save(result, options.json)
    if left_out:
        print(f"left out for want of time: {', '.join(left_out)}")
    save(result, options.json)
    if options.plot:
        plot(result, options.plot)


def in_patches(text: str) -> float:
    seconds, mels = _options.positive(text), LogMelConfig()
    frames = round(seconds * mels.sample_rate / mels.hop)
    if frames < 16 or frames % 16:
        raise argparse.ArgumentTypeError(f"{text} s are {frames} frames; expected a multiple of 16, 0.16 s")
    return seconds


def save(result: dict[str, Any], path: Path | None) -> None:
    if path:
        write_text(path, json.dumps(result, indent=1) + "\n")


Rows = list[dict[str, Any]]


def points(kind: str, seconds: float, options: argparse.Namespace) -> Iterator[Rows]:
    """Of each backend a row a batch size: here on a GPU, whose allocator tells the peak of a call; on a CPU in a
    process of its own.
    """
    if options.device.type != "cpu":
        yield from measure(kind, seconds, options.backends, options)
        return
    for backend in options.backends:
        command = [sys.executable, __file__, "--point", kind, str(seconds), backend, "--device", "cpu"]
        command += ["--preset", options.preset, "--batch-sizes", *map(str, options.batch_sizes)]
        yield json.loads(_timing.answer(*command).splitlines()[-1])


def measure(kind: str, seconds: float, backends: list[str], options: argparse.Namespace) -> Iterator[Rows]:
    """The rows of each backend, all with one model: to build one takes longer than to time it on a GPU."""
    device, mels = options.device, LogMelConfig()
    frames = round(seconds * mels.sample_rate / mels.hop)
    idle = _timing.status_mib("VmRSS") if device.type == "cpu" else 0.0
    if device.type == "cuda":  # the model of the point before
        gc.collect()
        torch.cuda.empty_cache()
    with use_backend(backends[0]):
        made = make(kind, frames, options.preset, device)
    largest = ""
    for backend in backends:
        with use_backend(backend):
            rows = timed_rows(made, kind, seconds, backend, sorted(options.batch_sizes), device, idle)
            if device.type == "cpu":
                guess = largest_guess([(row["batch_size"], row["peak_mib"]) for row in rows], device)
                largest = f"~{float(f'{guess:.2g}'):.0f}"
            elif kind == "train" or not largest:  # the network alone is the same on every backend
                sizes = (rows[0]["batch_size"], rows[-1]["batch_size"])
                peaks = [(n, peak_mib(lambda n=n: made.fits(n), device)) for n in sizes]
                fits = largest_that_fits(made.fits, min(largest_guess(peaks, device), MOST))
                largest = f">{fits}" if fits == MOST else str(fits)
        yield [row | {"largest_batch": largest} for row in rows]


class Made(NamedTuple):
    call: Callable[[torch.Tensor], Any]  # what is timed, from waves (B, S) on the device
    fits: Callable[[int], Any]  # a batch of so many; fails where memory runs out
    gmacs: float  # multiply-adds a clip, in thousand millions


def timed_rows(
    made: Made, kind: str, seconds: float, backend: str, batch_sizes: list[int], device: torch.device, idle: float
) -> Rows:
    rows, mels = [], LogMelConfig()
    samples = mels.n_samples(round(seconds * mels.sample_rate / mels.hop))
    for batch in batch_sizes:
        wave = 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(0))
        wave = wave.to(device)
        made.call(wave)
        times = []
        for _ in range(ROUNDS):
            start = _timing.clock()
            made.call(wave)
            times.append((_timing.clock() - start) / batch)
        row = {"kind": kind, "seconds": seconds, "backend": backend, "batch_size": batch, **_timing.summary(times)}
        row |= {"ms_per_second": row["ms"] / seconds, "gmacs": made.gmacs, "gmacs_per_second": made.gmacs / seconds}
        rows.append(row | {"peak_mib": peak_mib(lambda wave=wave: made.call(wave), device) - idle})
    return rows


def make(kind: str, frames: int, preset: str, device: torch.device) -> Made:
    mels = LogMelConfig()
    samples = mels.n_samples(frames)
    if kind == "embed":
        encoder = load_encoder(f"untrained-{preset}", device)
        assert isinstance(encoder, Encoder)
        one = torch.zeros(1, samples, device=device)

        def embed(wave: torch.Tensor) -> Any:
            return encoder.embed(wave, mels.sample_rate, batch_size=len(wave))

        def network(batch: int) -> Any:
            # What a clip is cut into, of so many clips: one pass, as `embed` makes one of a batch.
            shapes = Counter(piece.shape for piece in encoder.pieces(one[0], np.array([[0, samples]])))
            with torch.no_grad():
                groups = [torch.zeros(batch * n, *shape, device=device) for shape, n in shapes.items()]
                return encoder.forward_groups(groups, "mean", "last")

        return Made(embed, network, macs_of(lambda: embed(one)) / 1e9)
    config = MatpacConfig.preset(preset, n_frames=frames)
    model = Matpac(config).to(device).train()
    optimizer = make_optimizer(model, TrainConfig())
    precision = resolve_precision("auto", device)

    def train(wave: torch.Tensor) -> Any:
        ids_shuffle = ops.mask_shuffle(0, 7, torch.arange(len(wave), device=device), config.n_tokens)
        return train_step(model, optimizer, [(ops.log_mel(wave), ids_shuffle)], 7, 3e-4, 3.0, precision)

    return Made(train, lambda batch: train(torch.zeros(batch, samples, device=device)), step_flops(config) / 2e9)


def largest_guess(peaks: list[tuple[int, float]], device: torch.device) -> float:
    """The batch at which memory, growing as between the least and the largest batch measured, would run out.

    `peaks` are batches and MiB.
    """
    (least, first), (most, last) = peaks[0], peaks[-1]
    if device.type == "cuda":
        room = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 2**20
    else:
        room = _timing.status_mib("MemAvailable", "/proc/meminfo") / 2
    growth = (last - first) / (most - least) if most > least else last / most
    return max(0.0, least + (room - first) / max(growth, 0.01))


def largest_that_fits(fits: Callable[[int], Any], guess: float) -> int:
    """The largest of guess, 0.97 guess, 0.94 guess ... that runs: a few trials, and a few hundredths off at most."""
    batch = max(1, int(guess))
    while batch > 1:
        try:
            fits(batch)
            torch.cuda.synchronize()
            return batch
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, which keeps the frames and tensors of what failed.
        torch.cuda.empty_cache()
        batch = min(batch - 1, int(0.97 * batch))
    return batch


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
    return _timing.status_mib("VmHWM")


if __name__ == "__main__":
    main()
