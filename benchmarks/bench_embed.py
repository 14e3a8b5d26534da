"""Embedding clips of ten seconds: ours and the official precise path turn by turn; and memory against length.

    python benchmarks/bench_embed.py
    MATPAC_OFFICIAL=PATH python benchmarks/bench_embed.py      # PATH: a checkout of aurianworld/matpac, to compare with
    python benchmarks/bench_embed.py --memory                  # peak memory against the length of a clip

All variants have the same weights, and their embeddings are compared before anything is timed. The rounds are
interleaved and a speed-up is the median of the rounds' ratios, so that a machine that slows down slows all of them.
"official, timm 0.4.12" stores its attention scores, as the version that the official package pins does; "official,
fused attention" is what a current timm would make of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import _official_inference
import _options
import _timing

from matpac_fast import __version__, load_encoder
from matpac_fast.train.config import resolve_precision
from matpac_fast.vit_encoder import Encoder

SECOND = 16_000
BASES = ("official, timm 0.4.12", "official, fused attention", "ours, one by one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="untrained-base")
    parser.add_argument("--seconds", type=_options.positive, default=10.0)
    parser.add_argument("--clips", type=_options.count, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=_options.count, default=7)
    parser.add_argument("--device", type=_options.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", action="store_true", help="peak memory against length, instead of time")
    parser.add_argument("--json", type=_options.output, help="also write the numbers here")
    options = parser.parse_args()
    device = options.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.encoder}, {where}, torch {torch.__version__}")
    rows = memory_rows(options) if options.memory else time_rows(options, device)
    if options.json:
        header = {"encoder": options.encoder, "device": where, "torch": torch.__version__, "matpac_fast": __version__}
        options.json.write_text(json.dumps({**header, "rows": rows}, indent=2) + "\n")


def time_rows(options: argparse.Namespace, device: torch.device) -> list[dict]:
    encoder = load_encoder(options.encoder, device)
    assert isinstance(encoder, Encoder)
    low = (
        load_encoder(options.encoder, device, dtype="bfloat16") if resolve_precision("auto", device) == "bf16" else None
    )
    official = {}
    if checkout := os.environ.get("MATPAC_OFFICIAL"):
        for name, attention in zip(BASES[:2], ("plain", "fused"), strict=True):
            official[name] = _official_inference.load(Path(checkout), encoder, attention).to(device)
    rows = []
    for clips in options.clips:
        wave = torch.randn(clips, round(options.seconds * SECOND), generator=torch.Generator().manual_seed(0)) / 10
        wave = wave.to(device)
        variants: dict[str, Callable[[], torch.Tensor]] = {
            name: lambda model=model, wave=wave: model(wave)[0] for name, model in official.items()
        }
        if clips > 1:
            variants["ours, one by one"] = lambda wave=wave: torch.cat(
                [encoder.embed(one, SECOND).values for one in wave]
            )
        variants["ours"] = lambda wave=wave: encoder.embed(wave, SECOND).values[:, 0]
        if low is not None:
            variants["ours, bfloat16"] = lambda wave=wave: low.embed(wave, SECOND).values[:, 0]
        rows += compare(variants, clips, options, device)
    return rows


@torch.no_grad()
def compare(variants: dict[str, Callable], clips: int, options: argparse.Namespace, device: torch.device) -> list[dict]:
    found = {name: run() for name, run in variants.items()}  # the first round warms up
    for name, values in found.items():
        error = float((values - found["ours"]).abs().max() / found["ours"].std())
        if not error < (0.2 if "bfloat16" in name else 1e-4):
            sys.exit(f"{name} differs from ours by {error:.1e} deviations")
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, run in variants.items():
            synchronize(device)
            began = time.perf_counter()
            run()
            synchronize(device)
            times[name].append(time.perf_counter() - began)
    print(f"\n{clips} x {options.seconds:g} s, {options.rounds} rounds{'':<14}{'ms':>9}", end="")
    bases = [name for name in BASES if name in times]
    print("".join(f"{f'over {base}':>32}" for base in bases))
    rows = []
    for name, seconds in times.items():
        row = {"clips": clips, "seconds": options.seconds, "variant": name, **_timing.summary(seconds)}
        for base in bases:
            row[f"over {base}"] = statistics.median(b / s for b, s in zip(times[base], seconds, strict=True))
        print(f"{name:<36}{row['ms']:>9.1f}" + "".join(f"{row[f'over {base}']:>31.2f}x" for base in bases))
        rows.append(row)
    return rows


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# Run in a process of its own: it prints what the peak of resident memory grows by, in MiB, after a first clip of 60 s.
_MEMORY = """
import resource, sys, numpy as np
from matpac_fast import load_encoder
encoder, seconds, way = load_encoder(sys.argv[1], "cpu"), float(sys.argv[2]), sys.argv[3]
support = None if "whole" in way else 2.0
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
encoder.embed(np.zeros((1, 16_000 * 60), np.float32), 16_000, 2.0)
before = peak()
rng = np.random.default_rng(0)
if "stream" in way:
    blocks = (rng.standard_normal(16_000, dtype=np.float32) / 10 for _ in range(int(seconds)))
    for found in encoder.stream(16_000, support).over(blocks):
        pass
else:
    encoder.embed(rng.standard_normal(int(seconds * 16_000), dtype=np.float32) / 10, 16_000, support)
print(peak() - before)
"""


def memory_rows(options: argparse.Namespace) -> list[dict]:
    ways = ("embed, 2 s", "embed, whole", "stream, 2 s", "stream, whole")
    print(f"peak memory beyond one minute's, MiB\n{'length':>10}" + "".join(f"{way:>16}" for way in ways))
    rows = []
    for seconds in (60, 300, 1200, 3600):
        print(f"{seconds:>8} s", end="", flush=True)
        for way in ways:
            command = [sys.executable, "-c", _MEMORY, options.encoder, str(seconds), way]
            grown = float(_timing.answer(*command))
            rows.append({"seconds": seconds, "way": way, "mib": grown})
            print(f"{grown:>16.0f}", end="", flush=True)
        print()
    return rows


if __name__ == "__main__":
    main()
