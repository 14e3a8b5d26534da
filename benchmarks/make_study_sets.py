"""Build three data sets for `matpac-fast study` from Debian packages, without a download beyond apt.

    apt-get install fluidsynth fluid-soundfont-gm timgm6mb-soundfont                    # gm-notes, gm-mixtures
    apt-get install tuxpaint-stamps-default klettres-data ktuberling-data               # lang, lang-shift
    python benchmarks/make_study_sets.py gm OUT     # OUT/gm-notes, OUT/gm-mixtures
    python benchmarks/make_study_sets.py lang OUT   # OUT/lang, OUT/lang-shift

Each is a folder with a clips.csv, so a task is `folder:OUT/gm-notes`.

**gm-notes** asks for the family, one of ten, of one note of 4 s; **gm-mixtures** which families play in ten seconds.
FluidR3 trains and validates (other recordings of it, by the split of make_samples.py), TimGM6mb tests: another bank,
other recordings. Csound's bank and others that share TimGM6mb's recordings, and MuseScore's, which shares FluidR3's,
must never stand on the other side.

**lang** asks for the language of a spoken word of Tux Paint's stamps; a stamp's words, in all languages, are on one
side. **lang-shift** trains on the same and tests on the words and letters of two other packages: other speakers, rooms
and formats. A language of Tux Paint has few speakers, one perhaps, so lang can be answered by the voice and lang-shift
cannot. All are brought to the same format first, or it would tell the language: one channel, silence cut off at both
ends, what is above 4 kHz removed (some files have a rate of 8 kHz), one loudness, 16 kHz.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _options
import numpy as np
import soundfile
import soxr
from make_samples import INSTRUMENTS, RATE, SOUNDFONT, Event, draw_mixture, draw_notes, level, render, split_pitches

TEST_SOUNDFONT = Path("/usr/share/sounds/sf2/TimGM6mb.sf2")
NOTE_SECONDS, NOTE_STRETCH = 4.0, 1.6  # draw_notes draws for 2.5 s
MIXTURE_SECONDS = 10.0
NOTES = {"train": 30, "valid": 10, "test": 25}  # of each family
MIXTURES = {"train": 200, "valid": 50, "test": 120}
GM_SEEDS = {"train": 11, "valid": 12, "test": 13}

STAMPS = Path("/usr/share/tuxpaint/stamps")
LETTERS = Path("/usr/share/klettres")
POTATOES = Path("/usr/share/ktuberling/sounds")
LANGUAGES = ("be", "bg", "ca", "el", "es", "fr", "ro", "ru")  # of which Tux Paint has most words
WORDS = 150  # of each language
BAND_RATE = 8_000
LOUDNESS = -26.0  # dBFS, root mean square
SILENCE = -40.0  # dB below the peak


def write(folder: Path, rows: list[dict[str, str]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def make_gm(out: Path) -> None:
    drawn = split_pitches(SOUNDFONT)
    whole = {p: [list(range(low, high + 1))] for of in INSTRUMENTS.values() for p, (low, high) in of.items()}
    zones = {"train": drawn["train"], "valid": drawn["test"], "test": whole}
    family = {program: name for name, programs in INSTRUMENTS.items() for program in programs}
    for name, seconds in (("gm-notes", NOTE_SECONDS), ("gm-mixtures", MIXTURE_SECONDS)):
        folder, rows = out / name, []
        folder.mkdir(parents=True, exist_ok=True)
        for split, seed in GM_SEEDS.items():
            if name == "gm-notes":
                clips = [[stretched(event)] for event in draw_notes(zones[split], NOTES[split], seed)]
                labels = [family[event.program] for (event,) in clips]
                groups = [f"{split}-{event.program}" for (event,) in clips]  # an instrument's notes fail together
            else:
                rng = np.random.default_rng(seed)
                mixed = [draw_mixture(zones[split], rng, seconds) for _ in range(MIXTURES[split])]
                # A lone family would look single-label; the trailing ";" says that it need not be.
                clips, labels = [events for events, _ in mixed], [";".join(families) + ";" for _, families in mixed]
                groups = [""] * len(clips)  # each of its own
            bank = TEST_SOUNDFONT if split == "test" else SOUNDFONT
            waves = level(rendered(clips, seconds, bank), seed)
            for i, (wave, label, group) in enumerate(zip(waves, labels, groups, strict=True)):
                soundfile.write(folder / f"{split}-{i:04d}.flac", wave, RATE)
                rows.append(dict(path=f"{split}-{i:04d}.flac", label=label, split=split, group=group))
        write(folder, rows)
        print(f"{folder}: {len(rows)} clips of {seconds:g} s")


def stretched(event: Event) -> Event:
    return dataclasses.replace(event, start=event.start * NOTE_STRETCH, end=event.end * NOTE_STRETCH)


def rendered(clips: list[list[Event]], seconds: float, soundfont: Path) -> list[np.ndarray]:
    """Two fluidsynths at a time."""
    parts = [clips[i : i + 50] for i in range(0, len(clips), 50)]
    with ThreadPoolExecutor(2) as pool:
        return [wave for part in pool.map(lambda part: render(part, seconds, soundfont), parts) for wave in part]


def one_format(path: Path) -> np.ndarray | None:
    """The word as 16 kHz mono of one loudness and band, without silence around it; None where nothing is heard."""
    audio, rate = soundfile.read(path, always_2d=True)
    wave = soxr.resample(soxr.resample(audio.mean(1), rate, BAND_RATE, "VHQ"), BAND_RATE, RATE, "VHQ")
    frame = RATE // 100
    if len(wave) < 20 * frame:
        return None
    loud = np.sqrt((wave[: len(wave) // frame * frame].reshape(-1, frame) ** 2).mean(1))
    heard = np.flatnonzero(loud > loud.max() * 10 ** (SILENCE / 20))
    if loud.max() < 1e-4 or len(heard) < 20:
        return None
    wave = wave[heard[0] * frame : (heard[-1] + 1) * frame]
    wave = wave * 10 ** (LOUDNESS / 20) / np.sqrt((wave**2).mean())
    return wave / max(1.0, np.abs(wave).max())


def make_lang(out: Path) -> None:
    folder, shift = out / "lang", out / "lang-shift"
    for made in (folder, shift):
        made.mkdir(parents=True, exist_ok=True)
    rows, seen = [], set[bytes]()
    for language in LANGUAGES:
        found = []
        for path in sorted(STAMPS.rglob(f"*_desc_{language}.ogg")):
            # "star_outline_desc_fr" and "star_filled_desc_fr" are one stamp.
            stamp = re.sub(r"(_outline|_filled|-\d+)*_desc_\w+$", "", path.stem)
            group = f"{path.parent.relative_to(STAMPS)}/{stamp}"
            found.append((hashlib.sha256(str(path.relative_to(STAMPS)).encode()).digest(), group, path))
        rows += collected(folder, language, [(group, path) for _, group, path in sorted(found)], WORDS, seen)
    for row in rows:
        draw = hashlib.sha256(row["group"].encode()).digest()[0] / 256
        row["split"] = "test" if draw < 0.25 else "valid" if draw < 0.4 else "train"
    write(folder, rows)
    print(f"{folder}: {len(rows)} words, {len({row['group'] for row in rows})} stamps, {len(LANGUAGES)} languages")
    learnt = [row | dict(path=f"../lang/{row['path']}") for row in rows if row["split"] != "test"]
    tested = []
    for language in LANGUAGES:
        for package, root in (("klettres", LETTERS), ("ktuberling", POTATOES)):
            paths = sorted(p for p in (root / language).rglob("*") if p.suffix in (".ogg", ".wav"))
            speaker = f"{package}-{language}"  # one, perhaps two
            some = collected(shift, language, [(speaker, path) for path in paths], WORDS // 2, seen)
            tested += [row | dict(split="test", subset=package) for row in some]
    write(shift, [row | dict(subset="") for row in learnt] + tested)
    counts = {language: sum(row["label"] == language for row in tested) for language in LANGUAGES}
    print(f"{shift}: the same words to learn from, {len(tested)} to test on: {counts}")


def collected(
    folder: Path, language: str, sources: list[tuple[str, Path]], most: int, seen: set[bytes]
) -> list[dict[str, str]]:
    """Write up to `most` words as files, one after the other, none whose wave was `seen`: some languages share one."""
    rows: list[dict[str, str]] = []
    for group, path in sources:
        if len(rows) == most:
            break
        if (wave := one_format(path)) is None or (data := hashlib.sha256(wave.tobytes()).digest()) in seen:
            continue
        seen.add(data)
        name = f"{language}-{group.split('-')[0] if folder.name == 'lang-shift' else 'w'}-{len(rows):03d}.flac"
        soundfile.write(folder / name, wave, RATE)
        rows.append(dict(path=name, label=language, group=group))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gm", "lang"])
    parser.add_argument("out", type=_options.folder)
    args = parser.parse_args()
    {"gm": make_gm, "lang": make_lang}[args.what](args.out)


if __name__ == "__main__":
    main()
