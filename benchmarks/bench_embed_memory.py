"""Peak memory of `matpac-fast embed` against the length of a file, which it should not follow.

    python benchmarks/bench_embed_memory.py
    python benchmarks/bench_embed_memory.py --encoder runs/a --minutes 1 10 60 240 --json memory.json

Each length is a FLAC file of noise and tones, embedded in a process of its own, which says its peak of resident memory;
"above the first" is what it took more than the shortest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parent))
import _options
import _timing

from matpac_fast import __version__

RATE = 16_000
_PEAK = """
import json, resource, sys, time
from matpac_fast import load_encoder
from matpac_fast.embed.extract import embed_collection
source, out, encoder, options = *sys.argv[1:4], json.loads(sys.argv[4])
began = time.perf_counter()
report = embed_collection(source, out, load_encoder(encoder, "cpu"), **options)
assert report.failed == 0
seconds = time.perf_counter() - began
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds, report.rows, report.limit]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="untrained-tiny")
    parser.add_argument("--minutes", type=_options.positive, nargs="+", default=[1, 10, 60, 180])
    parser.add_argument("--json", type=_options.output, help="also write the numbers here")
    arguments = parser.parse_args()
    ways = {
        "2 s": dict(temporal_support=2.0),
        "2 s, all frames and layers": dict(temporal_support=2.0, pool="none", layers="all", dtype="float16"),
        "whole file": dict(),
    }
    print(f"{arguments.encoder} on the CPU, torch {torch.__version__}")
    print(f"{'':<28}{'minutes':>8}{'peak MiB':>10}{'above the first':>17}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, options in ways.items():
            first = None
            for minutes in arguments.minutes:
                peak, seconds, n, limit = measure(Path(folder), minutes, arguments.encoder, options)
                first = peak if first is None else first
                print(f"{name:<28}{minutes:>8g}{peak:>10.0f}{peak - first:>17.0f}", flush=True)
                row = {"way": name, "minutes": minutes, "peak_mib": peak, "seconds": seconds, "rows": n, "limit": limit}
                rows.append(row)
    if arguments.json:
        header = {"encoder": arguments.encoder, "torch": torch.__version__, "matpac_fast": __version__}
        arguments.json.write_text(json.dumps({**header, "rows": rows}, indent=2) + "\n")


def measure(folder: Path, minutes: float, encoder: str, options: dict) -> tuple[float, float, int, str]:
    source = folder / f"{minutes:g}"
    if not source.exists():
        source.mkdir()
        write(source / "x.flac", minutes)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        command = [sys.executable, "-c", _PEAK, str(source), out, encoder, json.dumps(options)]
        return tuple(json.loads(_timing.answer(*command)))


def write(path: Path, minutes: float) -> None:
    rng = np.random.default_rng(0)
    time = np.arange(10 * RATE) / RATE
    with soundfile.SoundFile(path, "w", RATE, 1, "PCM_16") as file:
        for left in range(round(60 * minutes * RATE), 0, -len(time)):
            tone = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 4_000) * time)
            file.write((tone + rng.normal(0, 0.02, len(time)))[:left])


if __name__ == "__main__":
    main()
