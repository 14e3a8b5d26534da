"""Render the audio that the packaged encoder is pre-trained on, from fixed seeds.

    apt-get install fluidsynth fluid-soundfont-gm musescore-general-soundfont-lossless flite wamerican \
        sonic-pi-samples freedoom
    python benchmarks/make_corpus.py AUDIO --hours 20        # FLAC, 16 kHz mono, ten seconds each
    matpac-fast prepare AUDIO CORPUS

A scene is music (two to three instruments, drums), notes of one instrument after another, speech (synthetic voices that
read words or babble syllables), or sounds (samples and noises). Each is heard `TAKES` times: another speed and with it
pitch and formants, another room, device, noise and gain, sometimes another scene beside it.

| source | Debian package | licence |
|---|---|---|
| FluidR3, General MIDI | fluid-soundfont-gm | MIT |
| MuseScore General, drums and programs from 80 on | musescore-general-soundfont-lossless | MIT, parts CC0 |
| the voices of Flite, reading the words of wamerican | flite, wamerican | CMU's, as BSD; public domain |
| samples of Sonic Pi | sonic-pi-samples | CC0 |
| sounds of Freedoom | freedoom | BSD, 3 clauses |

What encoders are tested on is not in it: of FluidR3 only the recordings of the training side of make_samples.py, of
MuseScore, which has FluidR3's recordings too, only kits and programs that no test asks for, nothing of TimGM6mb, and no
voice of make_study_sets.py.
"""

from __future__ import annotations

import argparse
import itertools
import struct
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import _options
import numpy as np
import soundfile
import soxr
from make_samples import INSTRUMENTS, RATE, SOUNDFONT, Event, draw_mixture, recordings, render, split_pitches

MUSESCORE = Path("/usr/share/sounds/sf2/MuseScore_General_Full.sf2")
SONIC_PI = Path("/usr/share/sonic-pi/samples")
FREEDOOM = Path("/usr/share/games/doom/freedoom2.wad")
WORDS = Path("/usr/share/dict/words")

SECONDS = 10.0
SCENES = 40  # of a part: one process renders them with one start of fluidsynth
TAKES = 4
KINDS = {"mixture": 14, "notes": 6, "synths": 4, "speech": 11, "sounds": 5}  # of SCENES
DRUM_KITS = (0, 8, 16, 24, 25, 32, 40, 48)
VOICES = ("kal", "kal16", "awb", "rms", "slt")
CONSONANTS = [
    "b",
    "d",
    "f",
    "g",
    "hh",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "sh",
    "t",
    "v",
    "w",
    "y",
    "z",
    "ch",
    "jh",
    "th",
]
VOWELS = ["aa", "ae", "ah", "ao", "aw", "ay", "eh", "er", "ey", "ih", "iy", "ow", "oy", "uh", "uw"]


@cache
def zones() -> dict[int, list[list[int]]]:
    """The training side's pitches of FluidR3, its other programs where they play no recording of the testing side."""
    sides, sounds = split_pitches(SOUNDFONT), recordings(SOUNDFONT)
    tested = {n for program, parts in sides["test"].items() for part in parts for p in part for n in sounds[program][p]}
    found = dict(sides["train"])
    for program in set(sounds) - {p for of in INSTRUMENTS.values() for p in of}:
        pitches = [p for p in range(36, 97) if (heard := sounds[program].get(p)) and not heard & tested]
        if program < 120 and len(pitches) >= 12:
            found[program] = [pitches]
    return found


def notes(rng: np.random.Generator, programs: dict[int, list[int]]) -> list[Event]:
    """Notes and chords of one program after the other, each long enough to be heard alone; or a drum kit's."""
    events, time = [], rng.uniform(0, 0.3)
    drums = rng.random() < 0.15
    program = int(rng.choice(DRUM_KITS if drums else list(programs)))
    while time < SECONDS - 0.5:
        if not drums and rng.random() < 0.3:
            program = int(rng.choice(list(programs)))
        length = float(rng.choice([0.15, 0.3, 0.6, 1.2, 2.5]) * rng.uniform(0.8, 1.25))
        count = int(rng.choice([1, 2, 3], p=[0.7, 0.15, 0.15]))
        for pitch in rng.choice(range(35, 82) if drums else programs[program], size=count):
            channel = 9 if drums else program % 9
            events.append(Event(channel, program, int(pitch), int(rng.integers(45, 121)), time, time + length))
        time += length * rng.uniform(0.5, 1.3)
    # One program a channel: the first of those that share one keeps it.
    owner: dict[int, int] = {}
    return [event for event in events if owner.setdefault(event.channel, event.program) == event.program]


def speech(rng: np.random.Generator) -> np.ndarray:
    """A voice that reads words, or syllables of no language."""
    options = ["-voice", str(rng.choice(VOICES)), "--setf", f"duration_stretch={rng.uniform(0.8, 1.4):.2f}"]
    options += ["--setf", f"int_f0_target_mean={rng.uniform(85, 220):.0f}"]
    if rng.random() < 0.5:
        text = ["-t", " ".join(rng.choice(words(), size=14)) + "."]
    else:
        phones = ["pau"]
        for _ in range(rng.integers(18, 30)):
            phones += [rng.choice(CONSONANTS), rng.choice(VOWELS)] + [rng.choice(CONSONANTS)] * (rng.random() < 0.3)
            phones += ["pau"] * (rng.random() < 0.12)
        text = ["-p", " ".join([*phones, "pau"])]
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder, "speech.wav")
        subprocess.run(["flite", *options, *text, "-o", wav], check=True, stdout=subprocess.DEVNULL)
        audio, rate = soundfile.read(wav)
    return soxr.resample(audio, rate, RATE, "VHQ")


@cache
def words() -> list[str]:
    return [word for word in WORDS.read_text().split() if word.isalpha() and word.isascii()]


@cache
def samples() -> list[np.ndarray]:
    """Sonic Pi's samples and Freedoom's sounds, at 16 kHz."""
    found = [read(path) for path in sorted(SONIC_PI.glob("*.flac"))]
    data = FREEDOOM.read_bytes()
    count, position = struct.unpack_from("<II", data, 4)
    for start, size, name in itertools.islice(struct.iter_unpack("<II8s", data[position:]), count):
        if name.startswith(b"DS") and size > 2000:  # format 3, rate, length; 16 bytes of padding at both ends
            kind, rate, length = struct.unpack_from("<HHI", data, start)
            pcm = np.frombuffer(data, np.uint8, min(length, size - 8) - 32, start + 24)
            if kind == 3:
                found.append(soxr.resample(pcm / 128.0 - 1, rate, RATE, "VHQ"))
    return [sound / np.abs(sound).max() for sound in found if len(sound) and np.abs(sound).max() > 0]


def read(path: Path) -> np.ndarray:
    audio, rate = soundfile.read(path, always_2d=True)
    return soxr.resample(audio.mean(1), rate, RATE, "VHQ")


def colored(rng: np.random.Generator, n: int) -> np.ndarray:
    """Noise of a power law, through a band."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    f = np.maximum(np.fft.rfftfreq(n, 1 / RATE), 20)
    spectrum *= f ** -rng.uniform(0, 1.2)
    if rng.random() < 0.5:
        centre, octaves = np.exp(rng.uniform(np.log(100), np.log(6000))), rng.uniform(0.3, 3)
        spectrum *= np.exp(-0.5 * (np.log2(f / centre) / octaves) ** 2)
    noise = np.fft.irfft(spectrum, n)
    return noise / np.abs(noise).max()


def sounds(rng: np.random.Generator) -> np.ndarray:
    """Samples at any speed, some repeated as steps and engines are; bursts of noise; sweeps."""
    n = round(SECONDS * RATE)
    wave = np.zeros(n)
    for _ in range(rng.integers(2, 9)):
        kind = rng.random()
        if kind < 0.7:
            sound = samples()[rng.integers(len(samples()))]
            sound = soxr.resample(sound, RATE, RATE * float(np.exp(rng.uniform(-0.6, 0.5))), "HQ")[: n // 2]
        elif kind < 0.85:
            sound = colored(rng, round(rng.uniform(0.05, 3) * RATE))
            sound *= np.exp(-np.linspace(0, rng.uniform(0, 8), len(sound)))
        else:
            t = np.arange(round(rng.uniform(0.2, 4) * RATE)) / RATE
            begin, end = np.log(rng.uniform(80, 6000, size=2))
            f = np.exp(np.linspace(begin, end, len(t)))
            sound = np.sign(np.sin(2 * np.pi * np.cumsum(f) / RATE)) * rng.uniform(0.1, 0.5)
            sound = sound if rng.random() < 0.5 else np.sin(2 * np.pi * np.cumsum(f) / RATE)
        times = rng.integers(1, 6)
        every = round(max(len(sound) * rng.uniform(0.5, 1.5), 0.08 * RATE))
        start = rng.integers(0, n)
        for at in range(start, min(n, start + times * every), every):
            part = sound[: n - at]
            wave[at : at + len(part)] += part * rng.uniform(0.2, 1)
    return wave


def room(rng: np.random.Generator, wave: np.ndarray) -> np.ndarray:
    """The wave in a room (decaying noise), and through a device that is not flat."""
    n = len(wave)
    spectrum = np.fft.rfft(wave, 2 * n)
    f = np.maximum(np.fft.rfftfreq(2 * n, 1 / RATE), 20)
    if rng.random() < 0.6:
        rt60 = np.exp(rng.uniform(np.log(0.1), np.log(2.0)))
        tail = np.arange(round(min(rt60, 2) * RATE))
        response = rng.standard_normal(len(tail)) * 10 ** (-3 * tail / (rt60 * RATE))
        response *= 10 ** (rng.uniform(-25, -3) / 20) / np.sqrt((response**2).sum())
        response[0] += 1
        spectrum *= np.fft.rfft(response, 2 * n)
    if rng.random() < 0.6:
        knots = np.log([20, 100, 300, 1000, 3000, 8000])
        spectrum *= 10 ** (np.interp(np.log(f), knots, rng.uniform(-9, 9, size=6)) / 20)
        if rng.random() < 0.3:
            spectrum /= np.sqrt(1 + (f / rng.uniform(2000, 7000)) ** 8)
        if rng.random() < 0.3:
            spectrum /= np.sqrt(1 + (rng.uniform(60, 400) / f) ** 4)
    return np.fft.irfft(spectrum, 2 * n)[:n]


def take(rng: np.random.Generator, dry: np.ndarray, other: np.ndarray | None) -> np.ndarray:
    """A scene at another speed and place: at most ten seconds, its peak between -25 and -1 dBFS."""
    speed = float(np.exp(rng.uniform(-0.25, 0.25)))
    wave = room(rng, soxr.resample(dry, RATE * speed, RATE, "HQ")[: round(SECONDS * RATE)])
    wave /= max(np.abs(wave).max(), 1e-6)
    if other is not None:
        beside = room(rng, other)[: len(wave)]
        wave[: len(beside)] += beside * 10 ** (rng.uniform(-20, 0) / 20) / max(np.abs(beside).max(), 1e-6)
    if rng.random() < 0.5:
        wave += colored(rng, len(wave)) * 10 ** (rng.uniform(-60, -15) / 20)
    return wave * 10 ** (rng.uniform(-25, -1) / 20) / np.abs(wave).max()


def make_part(out: Path, part: int, seed: int) -> int:
    """SCENES scenes in TAKES takes each, as files; a part that is there whole is left as it is. Returns the files."""
    paths = [out / f"{part:04d}" / f"{i:03d}.flac" for i in range(SCENES * TAKES)]
    if paths[-1].exists():
        return len(paths)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, part])
    flat = {program: [p for part in parts for p in part] for program, parts in zones().items()}
    synths = {program: list(range(36, 97)) for program in range(80, 120)}
    dry = render([draw_mixture(zones(), rng, SECONDS)[0] for _ in range(KINDS["mixture"])], SECONDS, SOUNDFONT)
    dry += render([notes(rng, flat) for _ in range(KINDS["notes"])], SECONDS, SOUNDFONT)
    dry += render([notes(rng, synths) for _ in range(KINDS["synths"])], SECONDS, MUSESCORE)
    dry += [speech(rng) for _ in range(KINDS["speech"])]
    dry += [sounds(rng) for _ in range(KINDS["sounds"])]
    # The last file is written last: with it the part is whole.
    for path, i in zip(paths, [i for _ in range(TAKES) for i in range(SCENES)], strict=True):
        other = dry[rng.integers(SCENES)] if rng.random() < 0.2 else None
        soundfile.write(path, take(rng, dry[i], other), RATE)
    return len(paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=_options.folder)
    parser.add_argument("--hours", type=_options.positive, default=20)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--workers", type=_options.count, default=2)
    args = parser.parse_args()
    parts = max(1, round(args.hours * 3600 / (SECONDS * SCENES * TAKES)))
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(make_part, args.out, part, args.seed) for part in range(parts)]
        for done, job in enumerate(jobs, 1):
            job.result()
            print(f"{done} of {parts} parts", flush=True)


if __name__ == "__main__":
    main()
