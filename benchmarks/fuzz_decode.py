"""Decoding mutated files of every format: an AudioError with a reason or finite audio, never a crash, never a hang.

    python benchmarks/fuzz_decode.py                          # ten thousand files, a few minutes on two cores
    python benchmarks/fuzz_decode.py --files 1000 --first 5000 --keep found/

Every file follows from its number alone. They are decoded in processes of their own, under a limit of memory: one that
dies, or takes over --seconds for a file, is a finding, and so is any exception but AudioError.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import multiprocessing.connection
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import _options

from matpac_fast._cores import n_cores

KINDS = {  # name -> libsndfile's format and subtype
    "pcm16.wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "adpcm.wav": ("WAV", "MS_ADPCM"),
    "gsm.wav": ("WAV", "GSM610"),
    "extensible.wav": ("WAVEX", "PCM_24"),
    "x.w64": ("W64", "PCM_16"),
    "x.rf64": ("RF64", "PCM_16"),
    "x.aiff": ("AIFF", "PCM_16"),
    "x.au": ("AU", "PCM_16"),
    "x.caf": ("CAF", "PCM_16"),
    "alac.caf": ("CAF", "ALAC_16"),
    "x.sph": ("NIST", "PCM_16"),
    "x.flac": ("FLAC", "PCM_16"),
    "vorbis.ogg": ("OGG", "VORBIS"),
    "x.opus": ("OGG", "OPUS"),
    "x.mp3": ("MP3", "MPEG_LAYER_III"),
}
_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 1_000_000_000)
_MEMORY = 6 << 30  # bytes of address space


@cache
def originals() -> dict[str, bytes]:
    """A good file of each kind: 0.6 s of a tone and noise, in mono or stereo."""
    import soundfile

    files = {}
    for i, (name, (kind, subtype)) in enumerate(KINDS.items()):
        rate = 48_000 if subtype == "OPUS" else 8_000 if subtype == "GSM610" else 22_050
        channels = 1 if subtype == "GSM610" else 1 + i % 2
        rng = np.random.default_rng(i)
        wave = 0.3 * np.sin(np.arange(round(0.6 * rate)) / 9)[:, None] + rng.normal(0, 0.05, (1, channels))
        buffer = io.BytesIO()
        soundfile.write(buffer, np.clip(wave + rng.normal(0, 0.02, wave.shape), -1, 1), rate, subtype, format=kind)
        files[name] = buffer.getvalue()
    return files


def mutated(number: int) -> tuple[str, bytes]:
    """Name and content of a file: one of the good ones, changed in one to four ways."""
    rng = np.random.default_rng([number, 2502])
    name = list(KINDS)[number % len(KINDS)]
    data = bytearray(originals()[name])
    for _ in range(int(rng.integers(1, 5))):
        data = _change(data, rng)
    return name, bytes(data)


def _change(data: bytearray, rng: np.random.Generator) -> bytearray:
    if not data:
        return bytearray(rng.bytes(40))
    head = min(len(data), 200)  # headers are worth more than samples
    at = int(rng.integers(head if rng.random() < 0.6 else len(data)))
    length = int(rng.integers(1, 2 + len(data) // 8))
    way = int(rng.integers(9))
    if way == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif way == 1:
        for i in rng.integers(len(data), size=int(rng.integers(1, 30))):
            data[int(i)] = int(rng.integers(256))
    elif way == 2:  # a field of a header
        value = int(rng.choice(_EXTREMES))
        width = int(rng.choice([2, 4]))
        field = (value & (1 << 8 * width) - 1).to_bytes(width, str(rng.choice(["little", "big"])))  # type: ignore[arg-type]
        data[at : at + width] = field
    elif way == 3:
        del data[at + 1 :]
    elif way == 4:
        del data[at : at + length]
    elif way == 5:
        data[at:at] = rng.bytes(length)
    elif way == 6:
        data[at : at + length] = bytes(length)
    elif way == 7:
        data[at:at] = data[at : at + length]
    else:
        other = originals()[list(KINDS)[int(rng.integers(len(KINDS)))]]
        begin = int(rng.integers(len(other)))
        data[at : at + length] = other[begin : begin + length]
    return data


def check(number: int, folder: Path) -> str:
    """Decode one file: "audio" or the first words of the reason. Anything else is an AssertionError or what came."""
    from matpac_fast.audio.decode import MAX_PEAK, read_audio
    from matpac_fast.errors import AudioError

    name, data = mutated(number)
    path = folder / f"{number}-{name}"
    path.write_bytes(data)
    try:
        wave = read_audio(path)
    except AudioError as error:
        said = str(error)
        assert said.startswith(f"{path}: "), f"does not name the file: {said!r}"
        assert "\n" not in said, f"not one line: {said!r}"
        return said.removeprefix(f"{path}: ").partition(":")[0]
    finally:
        path.unlink()
    assert (wave.dtype, wave.ndim) == (np.float32, 1), f"{wave.dtype} {wave.shape}"
    assert len(wave), "no audio, and no reason"
    assert np.abs(wave).max() <= 2 * MAX_PEAK, "beyond full scale"  # which a NaN is too
    return "audio"


def _work(
    numbers: range,
    folder: Path,
    results: multiprocessing.connection.Connection,
    check: Callable[[int, Path], str],
) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the decoders remark on much
    for number in numbers:
        try:
            found = check(number, folder)
        except Exception as error:
            found = f"FINDING {type(error).__name__}: {error}"
        results.send((number, found))


def fuzz(
    numbers: range,
    folder: Path,
    processes: int = 2,
    seconds: float = 20.0,
    check: Callable[[int, Path], str] = check,
) -> tuple[Counter[str], dict[int, str]]:
    """Check files by number, each with `check`. Returns how often each outcome came, and the findings by number."""
    context = multiprocessing.get_context("spawn")
    outcomes: Counter[str] = Counter()
    findings: dict[int, str] = {}
    waiting = [numbers[i : i + 500] for i in range(0, len(numbers), 500)][::-1]
    # connection -> its process, what is left of its numbers, and when it was last heard of
    running: dict[multiprocessing.connection.Connection, list] = {}
    while waiting or running:
        while waiting and len(running) < processes:
            todo = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(todo, folder, theirs, check), daemon=True)
            process.start()
            theirs.close()
            running[ours] = [process, todo, time.monotonic() + 60]  # it has to import first
        for connection in multiprocessing.connection.wait(list(running), timeout=1.0):
            assert isinstance(connection, multiprocessing.connection.Connection)
            process, todo, _ = running[connection]
            try:
                number, found = connection.recv()
            except EOFError:
                process.join()
                del running[connection]
                if len(todo):
                    findings[todo[0]] = f"the process ended with {process.exitcode}"
                    waiting.append(todo[1:])
                continue
            running[connection][1:] = [todo[1:], time.monotonic()]
            if found.startswith("FINDING"):
                findings[number] = found
            else:
                outcomes[found] += 1
        for process, _, heard in running.values():
            if time.monotonic() - heard > seconds:
                process.kill()  # counted as one that ended
    return outcomes, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=_options.count, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first file")
    parser.add_argument("--processes", type=_options.count, default=n_cores())
    parser.add_argument("--seconds", type=_options.positive, default=20.0, help="that one file may take")
    parser.add_argument("--keep", type=_options.folder, help="a folder for the files of the findings")
    options = parser.parse_args()
    import tempfile

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        numbers = range(options.first, options.first + options.files)
        outcomes, findings = fuzz(numbers, Path(folder), options.processes, options.seconds)
    print(f"{options.files} files in {time.monotonic() - began:.0f} s")
    for outcome, count in outcomes.most_common():
        print(f"{count:>7}  {outcome}")
    for number, found in sorted(findings.items()):
        name, data = mutated(number)
        print(f"FINDING in file {number} ({name}): {found}")
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{number}-{name}").write_bytes(data)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
