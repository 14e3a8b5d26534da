"""Each call of the system that a command makes below its output fails in turn, or is its last; then it runs again.

    python benchmarks/faults/run.py prepare                        # all calls in all ways: some minutes
    python benchmarks/faults/run.py pretrain --how kill EIO --every 5

Ways: `kill` ends the process before the call, `cut` in the middle of a write; EIO, ENOSPC and other names of errno(3)
are what the call fails with, and ENOSPC+ what all that follow fail with, too, as on a full disk. Of a row of writes
into one file the first and the last are taken. A finding is a traceback, a run that hangs, and an output that is not,
once the command has run again, that of an undisturbed run. Linux, with a C++ compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import _options

HERE = Path(__file__).parent
SECONDS = 120  # that one run may take
# Of each command the arguments; what is in {out} afterwards is compared.
COMMANDS = {
    "prepare": "{audio} {out}",
    "embed": "{audio} --out {out} --encoder untrained-nano --temporal-support 2 --files-per-shard 4 --lease-seconds 3"
    " --device cpu",
    "pretrain": "{corpus} --out {out} --preset nano --steps 5 --batch-size 2 --save-every 2 --log-every 1"
    " --crop-seconds 0.96 --precision float32 --device cpu",
    "study": "--encoders logmel-stats --tasks folder:{audio} --temporal-support 0.5,1 --no-cost --seeds 1 --decays 0"
    " --partial --out {out}",
}
# What no two runs have alike: times, and what is drawn or named by them.
_CLOCKS = {"mtime_ns", "seconds", "worker", "time", "elapsed"}
_PASSED = re.compile(r"\.lock$|\.png$|report\.html$|^leases/")
_TORN = re.compile(r"(^|/)\.[^/]*\.tmp$")  # which a study clears away after a day: another may be at work


class Run(NamedTuple):
    """An exit code, below 0 a signal; what the command printed; and its calls, in their order."""

    code: int
    said: str
    calls: list[str]


class Commands:
    """Runs the package's commands in processes that are forked from this one, in which all is imported already."""

    def __init__(self, folder: Path):
        import torch

        from matpac_fast import cli
        from matpac_fast.cli import embed, prepare, pretrain, study  # noqa: F401

        torch.set_num_threads(1)
        self._main, self._folder = cli.main, folder
        self._begin = ctypes.CDLL(os.environ["LD_PRELOAD"]).faults_begin

    def run(self, arguments: list[str], out: Path, number: int = -1, how: int = 0, all_after: bool = False) -> Run:
        said, calls = self._folder / "said", self._folder / "calls"
        process = os.fork()
        if not process:
            with open(said, "wb") as printed, open(calls, "wb") as listed:
                os.dup2(printed.fileno(), 1)
                os.dup2(printed.fileno(), 2)
                signal.alarm(SECONDS)
                self._begin(os.fsencode(out), ctypes.c_long(number), how, all_after, listed.fileno())
                sys.argv = ["matpac-fast", *arguments]
                code = self._main()
                sys.stdout.flush()
                os._exit(code)
        status = os.waitpid(process, 0)[1]
        # Threads may have listed them in another order than their numbers'.
        in_order = [line[9:] for line in sorted(calls.read_text().splitlines())]
        return Run(os.waitstatus_to_exitcode(status), said.read_text(errors="replace"), in_order)


def contents(folder: Path) -> dict[str, Any]:
    """All that is in it but clocks, by the files' names."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_dir() and not _PASSED.search(name):
            try:
                found[name] = _content(path)
            except (OSError, ValueError) as error:  # Arrow's, too: what is torn is like no other
                found[name] = str(error)
    return found


def _content(path: Path) -> Any:
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        return _timeless(pq.read_table(path).to_pylist())
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.name == "log.jsonl":  # what was done again stands there twice
        records = map(json.loads, path.read_text().splitlines())
        return {record["step"]: record["loss"] for record in records if "event" not in record}
    return path.read_bytes()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(each) for key, each in value.items() if key not in _CLOCKS}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def chosen(calls: list[str], every: int) -> list[int]:
    """Their numbers, from 1 on, without the writes between the first and the last of a row."""
    alike = [None, *calls, None]
    within = (alike[i - 1] == alike[i] == alike[i + 1] for i in range(1, len(calls) + 1))
    return [number for number, passed in enumerate(within, 1) if not passed][::every]


def sweep(name: str, ways: list[str], every: int, folder: Path) -> int:
    """The number of findings."""
    _make_audio(folder / "audio")
    commands, out = Commands(folder), folder / "out"
    given = {"audio": folder / "audio", "corpus": folder / "corpus", "out": out}
    if name == "pretrain":
        shutil.rmtree(folder / "audio/bad")
        commands.run(["prepare", str(folder / "audio"), str(folder / "corpus")], folder / "nothing")
    arguments = [name, *shlex.split(COMMANDS[name].format(**given))]
    plain = commands.run(arguments, out)
    want = contents(out)
    if plain.code or not want:
        sys.exit(f"undisturbed it ended with {plain.code}:\n{plain.said}")
    numbers, seen, findings = chosen(plain.calls, every), Counter[tuple[str, ...]](), 0
    print(f"{name}: {len(plain.calls)} calls, of which {len(numbers)} are tried in each of {len(ways)} ways")
    for way in ways:
        how = {"kill": -1, "cut": -2}.get(way) or getattr(errno, way.rstrip("+"))
        for number in numbers if way != "cut" else [n for n in numbers if plain.calls[n - 1].startswith("write ")]:
            shutil.rmtree(out, ignore_errors=True)
            first = commands.run(arguments, out, number, how, way.endswith("+"))
            again = commands.run(arguments, out)
            got = contents(out)
            left = [file for file in got if name == "study" and _TORN.search(file)]
            wrong = [file for file in sorted({*got, *want}.difference(left)) if got.get(file) != want.get(file)]
            call = first.calls[number - 1] if len(first.calls) >= number else "a call that was not made this time"
            told = "" if first.code == 0 or how < 0 else (first.said.strip().splitlines() or [""])[-1]
            row = tuple(_plain(text.replace(str(out), "OUT")) for text in (way, call, f"ends with {first.code}", told))
            seen[row] += 1
            bad = "Traceback" in first.said + again.said or first.code == -signal.SIGALRM or again.code or wrong
            if bad or seen[row] == 1:
                print("  ".join(text for text in row if text), flush=True)
            if bad:
                findings += 1
                print(
                    f"FINDING: again it ends with {again.code}, and these differ: {wrong}\n{first.said}\n{again.said}"
                )
    print(f"{seen.total()} runs, findings: {findings}")
    return findings


def _plain(text: str) -> str:
    """Without what is drawn, so that a row stands for all that are like it."""
    return re.sub(r"\.tmp\w{6}\b|[0-9a-f]{8,}|\d{2,}", "#", text)


def _make_audio(folder: Path) -> None:
    """Twelve clips of two labels, and a file that is none."""
    import soundfile

    random = np.random.default_rng(0)
    for label, pitch in {"low": 200, "high": 400}.items():
        (folder / label).mkdir(parents=True)
        for i in range(6):
            time = np.arange(int(16_000 * random.uniform(1.2, 3.5))) / 16_000
            wave = 0.2 * np.sin(2 * np.pi * (pitch + 30 * i) * time) + 0.02 * random.standard_normal(len(time))
            soundfile.write(folder / label / f"{i}.wav", wave, 16_000)
    (folder / "bad").mkdir()
    (folder / "bad" / "none.wav").write_bytes(b"RIFF none")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--how", nargs="+", default=["kill", "cut", "EIO", "ENOSPC+"])
    parser.add_argument("--every", type=_options.count, default=1, help="try one call of so many")
    options = parser.parse_args()
    for way in options.how:
        if way not in ("kill", "cut") and not hasattr(errno, way.rstrip("+")):
            parser.error(f"--how {way}: expected kill, cut or a name of errno(3), such as EIO")
    if (folder := os.environ.get("MATPAC_FAST_FAULTS")) is not None:
        return 1 if sweep(options.command, options.how, options.every, Path(folder)) else 0
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "system.so")
        build = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-fPIC", "-shared", "-o", str(library)]
        subprocess.run([*build, str(HERE / "system.cpp"), "-ldl"], check=True)
        preloaded = {"LD_PRELOAD": str(library), "MATPAC_FAST_FAULTS": folder, "OMP_WAIT_POLICY": "passive"}
        return subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=os.environ | preloaded).returncode


if __name__ == "__main__":
    sys.exit(main())
