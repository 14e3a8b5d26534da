"""Run the tests that matter for speed, every benchmark and a profile, and keep it all in one JSON.

    python benchmarks/sheet.py                 on this machine, with a GPU or without: it says what it left out
    python benchmarks/sheet.py --minutes 10    what has not begun by then is left out, what runs is ended
    python benchmarks/sheet.py --only ops      some of tests, step, profile, attention, ops, embed, sanitizer,
                                               temporal_support, which is the order they run in
    python benchmarks/sheet.py --join A B      one sheet of several of one device and commit, recorded if it may be
    python benchmarks/sheet.py --dry-run       one op and the smallest sizes: checks this script itself

The JSON goes to benchmarks/results/<device>/<date>-<commit>.json. Into --out go the same, as sheet.json, the stages'
whole output in one log.txt, the profile's trace.json.gz and, on a GPU, memory.pickle.gz, and temporal_support.png.
Nothing goes into results/ from a tree with changes, with a failing stage, or from a dry run; `report.py` makes tables
of what does. A benchmark that is cut off for want of time is none that failed, and what compute-sanitizer finds is
told in the sheet. Where a GPU is and a kernel for it is not, nothing runs: the tests would skip, and rows be missing,
without a word; --incomplete runs the rest, and does not record it. COMMIT=SHA names the commit of a clean tree that
comes without its .git. MATPAC_OFFICIAL=PATH names a checkout of aurianworld/matpac to compare with; librosa and
torchaudio take part where they are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import _options
from _timing import ROWS

from matpac_fast import __version__, backend
from matpac_fast.study.cost import device_name

HERE = Path(__file__).parent
GPU = torch.cuda.is_available()
CUT = 124  # the exit code of what took too long

# By stage, seconds at most: on a CPU, on a GPU; and those that a GPU's stages before it leave to it.
BOUNDS = {
    "tests": (600, 150, 60),
    "step": (700, 190, 100),
    "profile": (240, 75, 30),
    "attention": (90, 45, 15),
    "ops": (600, 200, 60),
    "embed": (450, 60, 20),
    "sanitizer": (0, 90, 30),
    "temporal_support": (600, 200, 30),
}
# Each of eight processes would start a pool of compilers, and as many threads as there are cores.
MANY = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "2"}


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    seconds: float = 600  # at most
    least: float = 0  # what the stages before it leave to it of the time, if they can
    lines: int = 15  # of its end that are shown
    limit: float = 0  # the `--limit` that it takes, in seconds; less where it has less time
    env: dict[str, str] = field(default_factory=dict)


def stages(out: Path, dry: bool) -> tuple[list[Stage], dict[str, str]]:
    """What can run here, and why the rest does not. The most urgent comes first."""
    python, pytest = [sys.executable], [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    some = ["-k", "mask_shuffle"] if dry else []
    # Files by name: the others import what a machine with nothing but torch lacks.
    gpu_tests = ["tests/test_gpu.py", "tests/ops/test_prototype_loss_gpu.py"]
    gpu_tests += [f"tests/train/test_{name}.py" for name in ("graph", "step", "waits")]
    tests = [*gpu_tests, "-m", "gpu"] if GPU else ["tests/ops", "tests/test_model.py"]
    many = GPU and (os.cpu_count() or 1) >= 8 and installed("xdist")
    if many:
        tests += ["-n", "8"]
    preset, batch = ("tiny", 2) if dry else ("base", 256 if GPU else 8)
    model = ["--preset", preset, "--batch-size", str(batch)]
    # A shared CPU is restless: the ratios of five rounds have been seen to move by a tenth.
    rounds = ["--rounds", "2" if dry else "5" if GPU else "11"]
    compiled = ([] if dry else ["--compile"]) + (["--cuda-graph"] if GPU else [])
    one_clip = ["--encoder", "untrained-tiny", "--clips", "1", "--seconds", "1"] if dry else []
    shortest = ["--preset", "tiny", "--seconds", "0.16", "0.32", "--batch-sizes", "1", "2"] if dry else []
    plot = ["--plot", str(out / "temporal_support.png")] if installed("matplotlib") else []
    # `matpac-fast bench --profile` without its command line, whose libraries a machine with a GPU may lack.
    profile = f"from pathlib import Path; from matpac_fast.cli.bench import main; main({preset!r}, {batch}, "
    profile += f"{0.1 if dry else 6.0}, profile=Path({str(out / 'profile')!r}))"
    op_table = [*pytest, "benchmarks/bench_ops.py", "--benchmark-only", "--benchmark-quiet", *some]

    def stage(name: str, command: list[str], **options: Any) -> Stage:
        on_cpu, on_gpu, least = BOUNDS[name]
        return Stage(name, command, on_gpu if GPU else on_cpu, least if GPU else 0, **options)

    def script(name: str, *options: str, **more: Any) -> Stage:
        command = [*python, f"benchmarks/bench_{name}.py", *options, "--json", str(out / f"{name}.json")]
        return stage(name, command, **more)

    found = [
        stage("tests", [*pytest, *tests, *some], env=MANY if many else {}),
        script("step", *model, *rounds, *compiled),
        stage("profile", [*python, "-c", profile], lines=25),
        script("attention", *model),
        stage("ops", op_table, lines=90, env={ROWS: str(out / "ops.json")}),
        script("embed", *one_clip, *rounds),
        script("temporal_support", *shortest, *plot, lines=90, limit=5 if dry else 150 if GPU else 420),
    ]
    left_out = {}
    if not GPU:
        left_out["sanitizer"] = "compute-sanitizer needs a GPU"
    elif shutil.which("compute-sanitizer") is None:
        left_out["sanitizer"] = "compute-sanitizer is not installed"
    else:
        # torch asks the driver what it may not answer, and goes on: no error of ours.
        command = ["compute-sanitizer", "--target-processes", "all", "--report-api-errors", "no"]
        command += ["--error-exitcode", "9", *pytest, "tests/test_gpu.py", "-m", "gpu", "-k", SANITIZED]
        # Inside of torch's own blocks of memory it would not see where a tensor ends.
        found.insert(-1, stage("sanitizer", command, env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))
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


# Every kernel once, and the one that has the most shapes in all of them.
SANITIZED = "as_exact_as or patch_embed_in_every_dtype"


def missing_kernels() -> dict[str, str]:
    """The back ends of the GPU that is here which cannot run on it, and why."""
    names = {name for table in backend.LAUNCHERS.values() for name in table.get("cuda", ())} if GPU else set()
    return {name: reason for name in sorted(names) if (reason := backend.unavailable(name))}


def share(stage: Stage, later: Sequence[Stage], left: float) -> float:
    """Seconds for `stage` of those that are left: not what later ones need least, unless it has no less itself."""
    return min(stage.seconds, left, max(stage.least, left - sum(other.least for other in later)))


def run(stage: Stage, seconds: float, log: Path) -> tuple[int, str]:
    """Its exit code, CUT where it took longer than `seconds`, and what it said, which is added to `log` too."""
    began = time.monotonic()
    print(f"\n== {stage.name}", flush=True)
    command = stage.command
    if stage.limit:
        command = [*command, "--limit", f"{max(1, min(stage.limit, seconds - 20)):.0f}"]
    # The package that is installed here, which has the extension, and not the sources beside it: `python -m` and `-c`
    # would put this folder first.
    env = {**os.environ, "PYTHONSAFEPATH": "1", **stage.env}
    with tempfile.TemporaryFile("w+") as file:
        # A group of its own, so that what the stage has started ends with it; not a session of its own, which would
        # outlive this script where that is killed.
        process = subprocess.Popen(
            command, cwd=HERE.parent, env=env, stdout=file, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )
        try:
            code = process.wait(seconds)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = CUT
        file.seek(0)
        said = file.read()
    end = f"== {stage.name}: exit code {code}, {time.monotonic() - began:.0f} s of {seconds:.0f}"
    with open(log, "a") as whole:
        whole.write(f"== {stage.name}: {' '.join(command)}\n{said}{end}\n\n")
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
    """What the benchmarks wrote; a stage that did not get through may have left nothing, or half a file."""
    found = {}
    for name in BOUNDS:
        path = out / f"{name}.json"
        if path.exists():
            text = path.read_text()
            path.unlink()
            with contextlib.suppress(ValueError):
                found[name] = json.loads(text)
    return found


def table_of(said: str) -> list[str]:
    """The lines of the profile's table, without where it was written."""
    lines = said.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith("a training step")), len(lines))
    return [line for line in lines[begin:] if not line.startswith("written")]


def last_line(said: str, of: str = "") -> str:
    """The last line that holds `of`, else the last one."""
    lines = said.strip().splitlines() or [""]
    return next((line for line in reversed(lines) if of in line), lines[-1]).strip("= ")


def keep_profile(out: Path) -> None:
    """The files of the profile, packed, beside the rest."""
    for path in sorted((out / "profile").glob("[!.]*")):
        with open(path, "rb") as source, gzip.open(out / f"{path.name}.gz", "wb", compresslevel=5) as packed:
            shutil.copyfileobj(source, packed)
    shutil.rmtree(out / "profile", ignore_errors=True)


def refusals(sheet: dict[str, Any]) -> list[str]:
    """Why it cannot be recorded. What the sanitizer finds is told, and the rest is as good as without it."""
    found = [f"{name} ended with {code}" for name, code in sheet["exit_codes"].items() if code and name != "sanitizer"]
    found += [words for option, words in NOT_KEPT.items() if option in sheet["command"].split()]
    if "tests" not in sheet["exit_codes"]:
        found.append("no test was run")
    if sheet["changes"] or sheet["commit"] == "unknown":
        found.append("not a clean checkout")
    return found


NOT_KEPT = {"--dry-run": "a dry run", "--incomplete": "kernels are missing"}


def record(sheet: dict[str, Any], out: Path) -> None:
    """Write it into `out`, and into results/ if it may be there."""
    text = json.dumps(sheet, indent=1) + "\n"
    (out / "sheet.json").write_text(text)
    print(f"\n== {out / 'sheet.json'}")
    for what, reason in sheet["left_out"].items():
        print(f"left out: {what}: {reason}")
    if code := sheet["exit_codes"].get("sanitizer"):
        print(f"SANITIZER ended with {code}: {sheet['sanitizer']}")
    if found := refusals(sheet):
        print("not recorded under benchmarks/results: " + "; ".join(found))
        return
    slug = re.sub(r"[^a-z0-9]+", "-", sheet["device"].lower()).strip("-")
    path = HERE / "results" / slug / f"{sheet['date'][:10]}-{sheet['commit'][:9]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(path)


def join(sheets: list[dict[str, Any]]) -> dict[str, Any]:
    """One sheet of several; of a stage that more than one has run, the last one's that was not cut off."""
    whole = sheets[0]
    for other in sheets[1:]:
        for key in ("device", "commit", "changes", "versions"):
            if other[key] != whole[key]:
                sys.exit(f"--join: {key} differs: {whole[key]} and {other[key]}")
        codes, left_out = (whole[key] | other[key] for key in ("exit_codes", "left_out"))
        cut = whole["exit_codes"].keys() & other["left_out"].keys()
        whole = whole | {stage: other[stage] for stage in BOUNDS if other.get(stage) and stage not in cut}
        whole["exit_codes"] = codes
        whole["left_out"] = {what: why for what, why in left_out.items() if what not in codes}
        whole["command"] += f" and {other['command']}"
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=_options.folder, help="folder for the stages' output; default: a temporary one")
    parser.add_argument("--only", nargs="+", help="these stages")
    parser.add_argument("--minutes", type=_options.positive, default=60.0, help="for all of it")
    parser.add_argument("--join", nargs="+", type=_options.there, metavar="SHEET", help="sheet.json of several runs")
    parser.add_argument("--incomplete", action="store_true", help="also where kernels for the GPU are missing")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    out = (options.out or Path(tempfile.mkdtemp())).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.join:
        record(join([json.loads(path.read_text()) for path in options.join]), out)
        return 0
    if (missing := missing_kernels()) and not (options.incomplete or options.dry_run):
        for name, reason in missing.items():
            print(f"sheet: {name}: {reason}", file=sys.stderr)
        print("sheet: nothing was run; --incomplete runs what there is, and does not record it", file=sys.stderr)
        return 2
    log = out / "log.txt"
    for old in (log, *(out / f"{name}.json" for name in BOUNDS)):
        old.unlink(missing_ok=True)

    changes = told("git", "status", "--porcelain").splitlines()
    chosen, left_out = stages(out, options.dry_run)
    left_out |= {f"{name} kernels": reason for name, reason in missing.items()}
    names = [stage.name for stage in chosen]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"no stage {', '.join(sorted(unknown))} here; there are {', '.join(names)}")
    chosen = [stage for stage in chosen if stage.name in (options.only or names)]
    codes, said = {}, {}
    for i, stage in enumerate(chosen):
        left = end - time.monotonic()
        if left < 5:
            left_out[stage.name] = f"{stage.name} had no time left of {options.minutes:g} minutes"
            continue
        seconds = share(stage, chosen[i + 1 :], left)
        code, said[stage.name] = run(stage, seconds, log)
        if code == CUT and stage.name != "tests":
            left_out[stage.name] = f"{stage.name} was cut off after {seconds:.0f} s, and has what it had by then"
        else:
            codes[stage.name] = code
    keep_profile(out)
    sheet = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("COMMIT") or told("git", "rev-parse", "HEAD") or "unknown",
        "changes": changes,
        "command": " ".join(["python", "benchmarks/sheet.py", *sys.argv[1:]]),
        **machine(),
        "exit_codes": codes,
        "left_out": left_out,
        "tests": last_line(said.get("tests", "")),
        "sanitizer": last_line(said.get("sanitizer", ""), "ERROR SUMMARY"),
        "profile": table_of(said.get("profile", "")),
        **results(out),
    }
    record(sheet, out)
    return int(any(codes.values()) or any(name in left_out for name in said))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not before the stage that runs has been ended
    sys.exit(main())
