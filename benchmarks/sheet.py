"""Run the tests that matter for speed, every benchmark and a profile, and keep it all in one JSON.

    python benchmarks/sheet.py                 on this machine, with a GPU or without: it says what it left out
    python benchmarks/sheet.py --minutes 10    what has not begun by then is left out, what runs is ended
    python benchmarks/sheet.py --only ops      some of tests, sanitizer, ops, step, attention, embed, profile,
                                               temporal_support
    python benchmarks/sheet.py --dry-run       one op and the smallest sizes: checks this script itself

The JSON goes to benchmarks/results/<device>/<date>-<commit>.json. Into --out go the same, as sheet.json, the stages'
whole output in one log.txt, the profile's trace.json.gz and, on a GPU, memory.pickle.gz, and temporal_support.png.
Nothing goes into results/ from a tree with changes, with a failing stage, or from a dry run; `report.py` makes tables
of what does. MATPAC_OFFICIAL=PATH names a checkout of aurianworld/matpac to compare with; librosa and torchaudio take
part where they are installed.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
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
from matpac_fast.study.cost import device_name

HERE = Path(__file__).parent
GPU = torch.cuda.is_available()


STAGES = ("ops", "step", "attention", "embed", "profile", "temporal_support")  # those that leave a JSON or files


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: int  # at most
    command: list[str]
    lines: int = 15  # of its end that are shown


def stages(out: Path, dry: bool) -> tuple[list[Stage], dict[str, str]]:
    """What can run here, and why the rest does not. The long and least urgent comes last."""
    python, pytest = [sys.executable], [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    some = ["-k", "mask_shuffle"] if dry else []
    # Files by name: the others import what a machine with nothing but torch lacks.
    gpu_tests = ["tests/test_gpu.py", "tests/ops/test_prototype_loss_gpu.py"]
    gpu_tests += [f"tests/train/test_{name}.py" for name in ("graph", "step", "waits")]
    tests = [*gpu_tests, "-m", "gpu"] if GPU else ["tests/ops", "tests/test_model.py"]
    preset, batch = ("tiny", 2) if dry else ("base", 256 if GPU else 8)
    model = ["--preset", preset, "--batch-size", str(batch)]
    rounds = ["--rounds", "2" if dry else "5"]
    compiled = ([] if dry else ["--compile"]) + (["--cuda-graph"] if GPU else [])
    one_clip = ["--encoder", "untrained-tiny", "--clips", "1", "--seconds", "1"] if dry else []
    shortest = ["--preset", "tiny", "--seconds", "0.16", "0.32", "--batch-sizes", "1", "2"] if dry else []

    def script(name: str, *options: str) -> list[str]:
        return [*python, f"benchmarks/bench_{name}.py", *options, "--json", str(out / f"{name}.json")]

    op_table = [*pytest, "benchmarks/bench_ops.py", "--benchmark-only", "--benchmark-quiet", *some]
    plot = ["--plot", str(out / "temporal_support.png")] if installed("matplotlib") else []
    supports = script("temporal_support", "--limit", "5" if dry else "150" if GPU else "420", *shortest, *plot)
    # `matpac-fast bench --profile` without its command line, whose libraries a machine with a GPU may lack.
    profile = f"from pathlib import Path; from matpac_fast.cli.bench import main; main({preset!r}, {batch}, "
    profile += f"{0.1 if dry else 6.0}, profile=Path({str(out / 'profile')!r}))"
    found = [
        Stage("tests", 600, [*pytest, *tests, *some]),
        Stage("ops", 600, [*op_table, f"--benchmark-json={out / 'ops.json'}"], lines=90),
        Stage("step", 400, script("step", *model, *rounds, *compiled)),
        Stage("attention", 90, script("attention", *model)),
        Stage("embed", 300, script("embed", *one_clip, *rounds)),
        Stage("profile", 240, [*python, "-c", profile], lines=25),
        Stage("temporal_support", 600, supports, lines=90),
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
        left_out["GPU kernels"] = "no CUDA device: all of it is the CPU's"
    if not os.environ.get("MATPAC_OFFICIAL"):
        left_out["official code"] = "MATPAC_OFFICIAL names no checkout of aurianworld/matpac"
    for package in ("torchaudio",) if GPU else ("librosa", "torchaudio"):
        if not installed(package):
            left_out[package] = f"{package} is not installed, or does not load"
    if not plot:
        left_out["curves"] = "matplotlib is not installed"
    return found, left_out


def run(stage: Stage, seconds: float, log: Path) -> tuple[int, str]:
    """Its exit code, 124 where it took longer than `seconds`, and what it said, which is added to `log` too."""
    began = time.monotonic()
    print(f"\n== {stage.name}", flush=True)
    with tempfile.TemporaryFile("w+") as file:
        try:
            code = subprocess.run(
                stage.command, cwd=HERE.parent, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
        file.seek(0)
        said = file.read()
    end = f"== {stage.name}: exit code {code}, {time.monotonic() - began:.0f} s"
    with open(log, "a") as whole:
        whole.write(f"== {stage.name}: {' '.join(stage.command)}\n{said}{end}\n\n")
    print("\n".join(said.splitlines()[-stage.lines :]))
    print(end, flush=True)
    return code, said


def told(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def installed(package: str) -> bool:
    """Whether it imports, in a process of its own."""
    return not subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True).returncode


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Device, driver, clocks where they can be read, and versions."""
    query = ("--format=csv,noheader", "--id=0")
    if GPU:
        name = device_name(torch.device("cuda"))
    else:  # processors of several generations call themselves "AMD EPYC"
        name = f"{device_name(torch.device('cpu'))} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "driver": told("nvidia-smi", "--query-gpu=driver_version", *query) if GPU else None,
        "clocks": told("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", *query) if GPU else None,
        "versions": {
            "matpac_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: version(name) for name in ("triton", "librosa", "torchaudio")},
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
    for name in STAGES:
        path = out / f"{name}.json"
        if path.exists():
            text = path.read_text()
            path.unlink()
            if text:
                found[name] = json.loads(text)
    if "ops" in found:
        found["ops"] = [op_row(bench) for bench in found["ops"]["benchmarks"]]
    return found


def op_row(bench: dict[str, Any]) -> dict[str, Any]:
    median, fastest, q1, q3 = (1e3 * bench["stats"][name] for name in ("median", "min", "q1", "q3"))
    return bench["extra_info"] | {"median_ms": median, "fastest_ms": fastest, "spread_ms": [q1, q3]}


def table_of(said: str) -> list[str]:
    """The lines of the profile's table, without where it was written."""
    lines = said.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith("a training step")), len(lines))
    return [line for line in lines[begin:] if not line.startswith("written")]


def keep_profile(out: Path) -> None:
    """The files of the profile, packed, beside the rest."""
    for path in sorted((out / "profile").glob("*")):
        with open(path, "rb") as source, gzip.open(out / f"{path.name}.gz", "wb", compresslevel=5) as packed:
            shutil.copyfileobj(source, packed)
    shutil.rmtree(out / "profile", ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the stages' output; default: a temporary one")
    parser.add_argument("--only", nargs="+", help="these stages")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all of it")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    out = (options.out or Path(tempfile.mkdtemp())).resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.unlink(missing_ok=True)

    changes = told("git", "status", "--porcelain").splitlines()
    chosen, left_out = stages(out, options.dry_run)
    names = [stage.name for stage in chosen]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"no stage {', '.join(sorted(unknown))} here; there are {', '.join(names)}")
    codes, said = {}, {}
    for stage in chosen:
        if options.only and stage.name not in options.only:
            continue
        left = end - time.monotonic()
        if left < 5:
            left_out[stage.name] = f"{stage.name} had no time left of {options.minutes:g} minutes"
            continue
        codes[stage.name], said[stage.name] = run(stage, min(stage.seconds, left), log)
    keep_profile(out)
    sheet = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": told("git", "rev-parse", "HEAD") or os.environ.get("COMMIT", "unknown"),
        "changes": changes,
        "command": " ".join(["python", "benchmarks/sheet.py", *sys.argv[1:]]),
        **machine(),
        "exit_codes": codes,
        "left_out": left_out,
        "tests": said["tests"].strip().splitlines()[-1] if said.get("tests", "").strip() else "",
        "profile": table_of(said.get("profile", "")),
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
