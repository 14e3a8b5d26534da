"""Render the embedded audio of matpac_fast/samples from a General MIDI SoundFont.

    python benchmarks/make_samples.py              # needs fluidsynth and Debian's fluid-soundfont-gm (MIT licence)

Notes of ten General MIDI families for training and for testing, and short multi-instrument mixtures for pre-training.
A SoundFont plays neighbouring pitches by transposing one recording, so different pitches alone would put the same
recording on both sides. Here the recordings are split: along each instrument's range its recordings go to train and
test in turn, and a pitch goes where its recordings went. So train and test share no pitch of an instrument and no
recording at all, and the mixtures (drums apart, which no note uses) play train pitches only.

Everything is drawn from fixed seeds and fluidsynth renders without reverb, chorus and dither, so on one version of
fluidsynth, soxr and libsndfile a run repeats its audio to the bit (an Ogg file's serial number is random).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

sys.path.insert(0, str(Path(__file__).parent))
import _options

SOUNDFONT = Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")
SAMPLES = Path(__file__).parents[1] / "matpac_fast" / "samples"

RATE = 16_000
# fluidsynth's interpolation does not low-pass, so it renders at 48 kHz and soxr brings that down.
RENDER_RATE = 48_000
NOTE_SECONDS = 2.5
MIXTURE_SECONDS = 6.2  # one official crop (608 frames, 6.095 s) fits
NOTES = {"train": 40, "test": 40}  # of each family
MIXTURES = 64
# Silence between clips: in the render so that no tail rings on, in the file so that no codec block holds two clips.
RENDER_GAP = 0.5
FILE_GAP = 0.064
SEEDS = {"train": 1, "test": 2, "mixtures": 3}

# family -> General MIDI program -> lowest and highest pitch it is played at. General MIDI's own families; left out are
# programs with hardly a recording to split (timpani, whistle) and those that borrow another program's recordings
# (tremolo strings are the ensemble's, the bandoneon is accordion and harmonica).
INSTRUMENTS = {
    "piano": {0: (28, 96), 2: (36, 90), 4: (36, 90), 5: (48, 90), 6: (36, 86), 7: (36, 84)},
    "mallets": {8: (56, 100), 9: (76, 103), 10: (56, 96), 11: (53, 89), 12: (48, 90), 13: (58, 98), 15: (55, 90)},
    "organ": {17: (36, 90), 18: (36, 90), 19: (30, 90), 20: (48, 88), 21: (53, 90), 22: (55, 90)},
    "guitar": {24: (40, 80), 25: (40, 80), 26: (40, 78), 27: (40, 80), 28: (40, 72), 29: (40, 80), 30: (40, 80)},
    "bass": {32: (28, 60), 33: (28, 55), 34: (28, 55), 36: (28, 55), 37: (28, 55)},
    "strings": {40: (55, 93), 41: (48, 86), 42: (36, 76), 43: (28, 57), 45: (36, 84), 46: (36, 92)},
    "ensemble": {48: (31, 90), 52: (40, 84), 53: (48, 84), 54: (48, 88)},
    "brass": {56: (58, 86), 57: (40, 74), 58: (26, 56), 59: (55, 84), 60: (38, 77), 61: (38, 80)},
    "reed": {64: (56, 86), 65: (49, 80), 66: (44, 75), 67: (36, 66), 68: (58, 88), 69: (50, 78), 70: (34, 70)}
    | {71: (50, 86)},
    "pipe": {72: (74, 100), 73: (60, 94), 74: (70, 92), 75: (54, 92)},
}  # fmt: skip
FAMILIES = list(INSTRUMENTS)
BASS, CHORDS, MELODY = (
    ["bass"],
    ["piano", "guitar", "organ", "ensemble"],
    ["mallets", "strings", "brass", "reed", "pipe"],
)


@dataclass(frozen=True)
class Event:
    """One note of a clip; times in seconds from the clip's start."""

    channel: int
    program: int
    pitch: int
    velocity: int
    start: float
    end: float


def recordings(soundfont: Path) -> dict[int, dict[int, frozenset[int]]]:
    """program -> pitch -> the recordings (sample numbers, all velocities) that bank 0 plays it with."""
    tables = {}
    with soundfont.open("rb") as file:
        data = file.read()
    position = 12  # past "RIFF", size, "sfbk"
    while position < len(data):
        name, size = data[position : position + 4], struct.unpack_from("<I", data, position + 4)[0]
        if name == b"LIST" and data[position + 8 : position + 12] == b"pdta":
            inner = position + 12
            while inner < position + 8 + size:
                length = struct.unpack_from("<I", data, inner + 4)[0]
                tables[data[inner : inner + 4]] = data[inner + 8 : inner + 8 + length]
                inner += 8 + length
        position += 8 + size + (size & 1)

    def records(name: bytes, layout: str) -> list[tuple]:
        return list(struct.iter_unpack(layout, tables[name]))

    key_range, instrument, sample = 43, 41, 53  # generator numbers of the SoundFont 2 specification

    def zones(bags: list[tuple], generators: list[tuple], first: int, last: int, final: int) -> list[dict[int, int]]:
        """The zones that end in generator `final`, each over the defaults of a leading global zone."""
        found = [dict(generators[bags[i][0] : bags[i + 1][0]]) for i in range(first, last)]
        default = {} if not found or final in found[0] else found[0]
        return [{**default, **zone} for zone in found if final in zone]

    def keys(zone: dict[int, int]) -> range:
        bounds = zone.get(key_range, 127 << 8)
        return range(bounds & 255, (bounds >> 8) + 1)

    presets, instruments = records(b"phdr", "<20sHHHIII"), records(b"inst", "<20sH")
    preset_bags, preset_generators = records(b"pbag", "<HH"), records(b"pgen", "<HH")
    instrument_bags, instrument_generators = records(b"ibag", "<HH"), records(b"igen", "<HH")
    found: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for (_, program, bank, bag, *_), (_, _, _, bag_end, *_) in itertools.pairwise(presets):
        if bank != 0:
            continue
        for outer in zones(preset_bags, preset_generators, bag, bag_end, instrument):
            number = outer[instrument]
            ends = instruments[number][1], instruments[number + 1][1]
            for inner in zones(instrument_bags, instrument_generators, *ends, sample):
                for key in set(keys(outer)) & set(keys(inner)):
                    found[program][key].add(inner[sample])
    return {program: {key: frozenset(ids) for key, ids in pitches.items()} for program, pitches in found.items()}


def split_pitches(soundfont: Path) -> dict[str, dict[int, list[list[int]]]]:
    """split -> program -> its pitches in lists, each list one recording's, such that no recording is in two splits."""
    sounds = recordings(soundfont)
    side: dict[int, str] = {}  # recording -> split
    pitches: dict[str, dict[int, list[list[int]]]] = {"train": defaultdict(list), "test": defaultdict(list)}
    for programs in INSTRUMENTS.values():
        for program, (low, high) in programs.items():
            zones: list[tuple[set[int], list[int]]] = []
            for pitch in range(low, high + 1):
                heard = sounds[program][pitch]
                if zones and zones[-1][0] & heard:
                    zones[-1][0].update(heard)
                    zones[-1][1].append(pitch)
                else:
                    zones.append((set(heard), [pitch]))
            for number, (heard, zone) in enumerate(zones):
                decided = {side[recording] for recording in heard if recording in side}
                if len(decided) > 1:
                    raise RuntimeError(f"program {program}, pitches {zone}: its recordings are on both sides")
                # Programs take turns at who owns the lowest recording, so that both sides see both ends of ranges.
                chosen = decided.pop() if decided else ("train", "test")[(number + program) % 2]
                side.update(dict.fromkeys(heard, chosen))
                pitches[chosen][program].append(zone)
    return pitches


def draw_notes(zones: dict[int, list[list[int]]], count: int, seed: int) -> list[Event]:
    """`count` different notes of each family: programs in turn, within a program its recordings in turn."""
    rng = np.random.default_rng(seed)
    events = []
    for programs in INSTRUMENTS.values():
        queues = {}
        for program in programs:
            shuffled = [list(rng.permutation(zone)) for zone in zones[program]]
            longest = max(map(len, shuffled))
            queues[program] = [int(zone[i]) for i in range(longest) for zone in shuffled if i < len(zone)]
        turns = range(max(map(len, queues.values())))
        order = [(program, queue[i]) for i in turns for program, queue in queues.items() if i < len(queue)]
        if len(order) < count:
            raise RuntimeError(f"programs {list(programs)} have {len(order)} notes, not {count}")
        for program, pitch in order[:count]:
            start = rng.uniform(0.05, 0.4)
            end = start + rng.uniform(0.5, 1.8)
            events.append(Event(0, program, pitch, int(rng.integers(45, 121)), start, end))
    return events


def draw_mixture(
    zones: dict[int, list[list[int]]], rng: np.random.Generator, seconds: float = MIXTURE_SECONDS
) -> tuple[list[Event], list[str]]:
    """Four chords of a major key for one to three instruments and, half the time, drums; and the families heard."""
    beat = 60 / rng.uniform(75, 150)
    tonic = int(rng.integers(12))
    degrees = [0, *rng.choice([2, 4, 5, 7, 9], size=3)]
    thirds = {0: (4, 7), 2: (3, 7), 4: (3, 7), 5: (4, 7), 7: (4, 7), 9: (3, 7)}  # the triads of the scale's degrees
    roles = [(BASS, "bass"), (CHORDS, "chords"), (MELODY, "melody")]
    picked = sorted(rng.permutation(3)[: rng.choice([2, 3], p=[0.4, 0.6])])
    events, families = [], []
    for channel, role in enumerate(picked):
        names, part = roles[role]
        family = names[rng.integers(len(names))]
        program = int(rng.choice(list(INSTRUMENTS[family])))
        allowed = np.array([pitch for zone in zones[program] for pitch in zone])
        centre = rng.uniform(np.quantile(allowed, 0.25), np.quantile(allowed, 0.75))
        step = rng.choice({"bass": [1.0, 2.0], "chords": [1.0, 2.0, 4.0], "melody": [0.5, 1.0, 2.0]}[part])  # beats
        for time in np.arange(0.05, seconds - 0.3, step * beat):
            root = (tonic + degrees[int(time / (4 * beat)) % 4]) % 12
            chord = [root, *((root + third) % 12 for third in thirds[(root - tonic) % 12])]
            classes = {"bass": chord[:1], "chords": chord, "melody": [chord[rng.integers(3)]]}[part]
            if part == "melody" and rng.random() < 0.2:
                continue
            length = step * beat * rng.uniform(0.6, 1.0)
            for pitch_class in classes:
                # A chord tone with no train pitch on this instrument is left out.
                at = allowed[allowed % 12 == pitch_class]
                if len(at):
                    pitch = int(at[np.abs(at - centre).argmin()])
                    events.append(Event(channel, program, pitch, int(rng.integers(60, 115)), time, time + length))
                    families.append(family)
    if rng.random() < 0.5:
        for i, time in enumerate(np.arange(0.05, seconds - 0.2, beat / 2)):
            kick_snare_hat = [36] * (i % 4 == 0) + [38] * (i % 4 == 2) + [42]
            events += [Event(9, 0, pitch, int(rng.integers(50, 100)), time, time + 0.1) for pitch in kick_snare_hat]
    return events, sorted(set(families), key=FAMILIES.index)


def midi(clips: list[list[Event]], seconds: float) -> bytes:
    """A format-0 MIDI file, one tick a millisecond, with the clips one after another in slots of `seconds`."""
    messages: list[tuple[int, int, bytes]] = []  # tick, rank within the tick, message
    for number, events in enumerate(clips):
        begin = round(number * seconds * 1000)
        for channel, program in sorted({(event.channel, event.program) for event in events}):
            messages.append((begin, 0, bytes([0xC0 | channel, program])))
        for event in events:
            on, off = begin + round(event.start * 1000), begin + round(event.end * 1000)
            messages.append((on, 2, bytes([0x90 | event.channel, event.pitch, event.velocity])))
            messages.append((off, 1, bytes([0x80 | event.channel, event.pitch, 0])))
        all_off = begin + round((seconds - RENDER_GAP) * 1000)
        for channel in {event.channel for event in events}:
            messages.append((all_off, 3, bytes([0xB0 | channel, 120, 0])))  # controller 120: all sound off
    messages.append((round(len(clips) * seconds * 1000), 4, b"\xff\x2f\x00"))
    track, now = b"\x00\xff\x51\x03" + (500_000).to_bytes(3, "big"), 0
    for tick, _, message in sorted(messages):
        delta, now = tick - now, tick
        length = bytes([delta & 127])
        while delta := delta >> 7:
            length = bytes([128 | (delta & 127)]) + length
        track += length + message
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, 500) + b"MTrk" + struct.pack(">I", len(track)) + track


def render(clips: list[list[Event]], seconds: float, soundfont: Path) -> list[np.ndarray]:
    """The clips as 16 kHz mono float64, `seconds` long each, faded out over the last 30 ms."""
    slot, waves, batch = seconds + RENDER_GAP, [], 100
    for first in range(0, len(clips), batch):
        part = clips[first : first + batch]
        with tempfile.TemporaryDirectory() as folder:
            score, wav = Path(folder, "score.mid"), Path(folder, "score.wav")
            score.write_bytes(midi(part, slot))
            options = ["-ni", "-q", "-R0", "-C0", "-g0.4", f"-r{RENDER_RATE}", "-Twav", "-Ofloat"]
            subprocess.run(["fluidsynth", *options, f"-F{wav}", str(soundfont), str(score)], check=True)
            audio, rate = soundfile.read(wav, always_2d=True)
        if rate != RENDER_RATE:
            raise RuntimeError(f"fluidsynth rendered at {rate} Hz, not {RENDER_RATE}")
        mono = audio.mean(1)
        mono = np.pad(mono, (0, max(0, round(len(part) * slot * rate) - len(mono))))
        for number in range(len(part)):
            begin = round(number * slot * rate)
            wave = soxr.resample(mono[begin : begin + round(seconds * rate)], rate, RATE, "VHQ")
            fade = round(0.03 * RATE)
            wave[-fade:] *= np.cos(np.linspace(0, np.pi / 2, fade)) ** 2
            waves.append(wave)
    return waves


def level(waves: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """Set each clip's peak between -18 and -2 dBFS, so that loudness says nothing about the instrument."""
    rng = np.random.default_rng([seed, 1])
    peaks = 10 ** (rng.uniform(-18, -2, size=len(waves)) / 20)
    return [wave * (peak / np.abs(wave).max()) for wave, peak in zip(waves, peaks, strict=True)]


def write_ogg(path: Path, waves: list[np.ndarray]) -> list[int]:
    """The clips as one Ogg Vorbis file, silence between them; returns each one's first sample.

    Vorbis because the package has room for about 5 MB. Of 2,450 s, FLAC would take 27 MB, and cut to 8 bits a sample
    8 MB with 0.41 standard deviations of rms error in the log-mel, where this quality has 0.18; Opus of this size has
    0.22 and decodes several times slower. One file because each Vorbis stream begins with 4 kB of code books.
    """
    starts, position = [], 0
    with soundfile.SoundFile(path, "w", RATE, 1, format="OGG", subtype="VORBIS", compression_level=0.8) as file:
        for wave in waves:
            padded = np.pad(wave, (0, round(FILE_GAP * RATE)))
            # libsndfile's Vorbis encoder overruns its stack on one long write.
            for first in range(0, len(padded), 4096):
                file.write(padded[first : first + 4096])
            starts.append(position)
            position += len(padded)
    return starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--soundfont", type=_options.there, default=SOUNDFONT)
    parser.add_argument("--out", type=_options.folder, default=SAMPLES)
    args = parser.parse_args()
    family_of = {program: family for family, programs in INSTRUMENTS.items() for program in programs}
    zones = split_pitches(args.soundfont)
    rows = []
    for split in ("train", "test", "mixtures"):
        seed = SEEDS[split]
        if split == "mixtures":
            rng = np.random.default_rng(seed)
            drawn = [draw_mixture(zones["train"], rng) for _ in range(MIXTURES)]
            clips, seconds = [events for events, _ in drawn], MIXTURE_SECONDS
            labels = [("+".join(families), "", "", "") for _, families in drawn]
        else:
            clips, seconds = [[event] for event in draw_notes(zones[split], NOTES[split], seed)], NOTE_SECONDS
            labels = [(family_of[e.program], e.program, e.pitch, e.velocity) for (e,) in clips]
        starts = write_ogg(args.out / f"{split}.ogg", level(render(clips, seconds, args.soundfont), seed))
        rows += [(split, start, round(seconds * RATE), *label) for start, label in zip(starts, labels, strict=True)]
    with (args.out / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["split", "start", "samples", "families", "program", "pitch", "velocity"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
