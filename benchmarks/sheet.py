"""Run the tests that matter for speed and every benchmark, and keep it all in one JSON.

    python benchmarks/sheet.py                 on this machine, with a GPU or without: it says what it left out
    python benchmarks/sheet.py --only ops      some of the stages: tests, sanitizer, ops, step, embed, temporal_support
    python benchmarks/sheet.py --dry-run       one op and the smallest sizes: checks this script itself

The JSON goes to benchmarks/results/<device>/<date>-<commit>.json, and the stages' whole output into --out. Nothing goes
into results/ from a tree with changes, with a failing stage, or from a dry run; `report.py` makes tables of what does.
MATPAC_OFFICIAL=PATH names a checkout of aurianworld/matpac to compare with.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from matpac_fast import __version__, backend

HERE = Path(__file__).parent
GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: int  # at most
    command: list[str]
    lines: int = 15  # of its end that are shown


def stages(out: Path, dry: bool) -> tuple[list[Stage], dict[str, str]]:
    """What can run here, and why the rest does not."""
    python, pytest = [sys.executable], [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    some = ["-k", "mask_shuffle"] if dry else []
    tests = ["-m", "gpu"] if GPU else ["tests/ops", "tests/test_model.py"]
    small = ["--preset", "tiny", "--batch-size", "2", "--rounds", "2"] if dry else []
    ops = out / "ops.json"
    found = [
        Stage("tests", 400, [*pytest, *tests, *some]),
        Stage(
            "ops",
            600,
            [
                *pytest,
                "benchmarks/bench_ops.py",
                "--benchmark-only",
                "--benchmark-quiet",
                *some,
                f"--benchmark-json={ops}",
            ],
            lines=70,
        ),
        Stage("step", 400, [*python, "benchmarks/bench_step.py", *small, "--json", str(out / "step.json")]),
        Stage(
            "embed",
            300,
            [*python, "benchmarks/bench_embed.py", "--json", str(out / "embed.json")]
            + (["--encoder", "untrained-tiny", "--clips", "1", "--seconds", "1", "--rounds", "2"] if dry else []),
        ),
        Stage(
            "temporal_support",
            600,
            [*python, "benchmarks/bench_temporal_support.py", "--json", str(out / "temporal_support.json")]
            + (["--preset", "tiny", "--seconds", "0.16", "0.32"] if dry else []),
            lines=30,
        ),
    ]
    left_out = {}
    if not GPU:
        left_out["sanitizer"] = "compute-sanitizer needs a GPU"
    elif shutil.which("compute-sanitizer") is None:
        left_out["sanitizer"] = "compute-sanitizer is not installed"
    else:
        command = ["compute-sanitizer", "--target-processes", "all", "--error-exitcode", "9", *pytest]
        command += ["tests/test_gpu.py", "-m", "gpu", "-k", "exact or patch_in_every"]
        found.insert(1, Stage("sanitizer", 90, command))
    if not GPU:
        left_out["GPU kernels"] = "no CUDA device: tests, ops, step and embed are the CPU's"
    if not os.environ.get("MATPAC_OFFICIAL"):
        left_out["official code"] = "MATPAC_OFFICIAL names no checkout of aurianworld/matpac"
    return found, left_out


def run(stage: Stage, out: Path) -> int:
    log, began = out / f"{stage.name}.log", time.monotonic()
    print(f"\n== {stage.name}", flush=True)
    with open(log, "w") as file:
        try:
            code = subprocess.run(
                stage.command, cwd=HERE.parent, stdout=file, stderr=subprocess.STDOUT, timeout=stage.seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    print("\n".join(log.read_text().splitlines()[-stage.lines :]))
    print(f"== {stage.name}: exit code {code}, {time.monotonic() - began:.0f} s", flush=True)
    return code


def told(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return f"{found[1] if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def machine() -> dict[str, Any]:
    """Device, driver, clocks where they can be read, and versions."""
    query = ("--format=csv,noheader", "--id=0")
    return {
        "device": torch.cuda.get_device_name() if GPU else cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": told("nvidia-smi", "--query-gpu=driver_version", *query) if GPU else None,
        "clocks": told("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", *query) if GPU else None,
        "versions": {
            "matpac_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": version("triton"),
        },
        "backends": {name: backend.unavailable(name) or "yes" for name in backend.BACKENDS[1:]},
        "cpu_isa": cpu_isa(),
    }


def cpu_isa() -> str | None:
    try:
        from matpac_fast import _C
    except ImportError:
        return None
    return _C.cpu_isa()


def results(out: Path) -> dict[str, Any]:
    """What the benchmarks wrote; a stage that did not get through has left nothing or an empty file."""
    found = {}
    for name in ("ops", "step", "embed", "temporal_support"):
        path = out / f"{name}.json"
        if path.exists() and path.stat().st_size:
            found[name] = json.loads(path.read_text())
    if "ops" in found:
        found["ops"] = [
            bench["extra_info"]
            | {"median_ms": 1e3 * bench["stats"]["median"], "fastest_ms": 1e3 * bench["stats"]["min"]}
            for bench in found["ops"]["benchmarks"]
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the stages' output; default: a temporary one")
    parser.add_argument("--only", nargs="+", help="these stages")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    out = (options.out or Path(tempfile.mkdtemp())).resolve()
    out.mkdir(parents=True, exist_ok=True)

    changes = told("git", "status", "--porcelain").splitlines()
    chosen, left_out = stages(out, options.dry_run)
    names = [stage.name for stage in chosen]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"no stage {', '.join(sorted(unknown))} here; there are {', '.join(names)}")
    codes = {stage.name: run(stage, out) for stage in chosen if not options.only or stage.name in options.only}
    log = out / "tests.log"
    sheet = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": told("git", "rev-parse", "HEAD") or os.environ.get("COMMIT", "unknown"),
        "changes": changes,
        "command": " ".join(["python", "benchmarks/sheet.py", *sys.argv[1:]]),
        **machine(),
        "exit_codes": codes,
        "left_out": left_out,
        "tests": log.read_text().strip().splitlines()[-1] if log.exists() else "",
        **results(out),
    }
    text = json.dumps(sheet, indent=1) + "\n"
    (out / "sheet.json").write_text(text)
    print(f"\n== {out / 'sheet.json'}")
    for what, reason in left_out.items():
        print(f"left out: {what}: {reason}")
    refusals = [f"{name} ended with {code}" for name, code in codes.items() if code]
    refusals += ["a dry run"] * options.dry_run
    if "tests" not in codes:
        refusals.append("no test was run")
    if changes or sheet["commit"] == "unknown":
        refusals.append("not a clean checkout")
    if refusals:
        print("not recorded under benchmarks/results: " + "; ".join(refusals))
    else:
        slug = re.sub(r"[^a-z0-9]+", "-", sheet["device"].lower()).strip("-")
        record = HERE / "results" / slug / f"{sheet['date'][:10]}-{sheet['commit'][:9]}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(text)
        print(record)
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
