"""The embedded audio: notes of ten instrument families and short mixtures, rendered from an MIT-licensed SoundFont.

`benchmarks/make_samples.py` of the repository made it and says how; LICENSE.txt beside the audio is the SoundFont's.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ..errors import AudioError, ConfigError

FOLDER = Path(__file__).parent
SAMPLE_RATE = 16_000
# General MIDI's families, in its order; "mallets" is its "chromatic percussion".
FAMILIES = ("piano", "mallets", "organ", "guitar", "bass", "strings", "ensemble", "brass", "reed", "pipe")


@dataclass(frozen=True)
class Samples:
    """Clips and what is heard in them.

    `waves` are float32 in [-1, 1], mono at `sample_rate` Hz. Of notes, `labels` (N,) is the family's index in
    `families`, and `program` (N,), `pitch` (N,) and `velocity` (N,) are MIDI numbers. Of mixtures, `labels`
    (N, families) says which families play, and the other three are empty.
    """

    waves: list[np.ndarray]
    labels: np.ndarray
    families: tuple[str, ...]
    program: np.ndarray
    pitch: np.ndarray
    velocity: np.ndarray
    sample_rate: int = SAMPLE_RATE


def load_samples(split: Literal["train", "test", "mixtures"]) -> Samples:
    """The notes to train or to test on (400 each, 2.5 s), or the mixtures (64, 6.2 s) for pre-training.

    A note begins 0.05-0.4 s into its clip, is held for 0.5-1.8 s and rings out. Train and test share no pitch of an
    instrument and no recording of the SoundFont; mixtures play the train pitches. Raises ConfigError for another split
    and AudioError where the data are not as they were installed.
    """
    import soundfile

    if split not in ("train", "test", "mixtures"):
        raise ConfigError(f'split is {split!r}; expected "train", "test" or "mixtures"')
    try:
        with (FOLDER / "index.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == split]
        audio, rate = soundfile.read(FOLDER / f"{split}.ogg", dtype="float32")
    except (OSError, soundfile.LibsndfileError) as error:
        raise AudioError(f"the embedded audio cannot be read ({error}): install matpac_fast again") from error
    spans = [(int(row["start"]), int(row["samples"])) for row in rows]
    if rate != SAMPLE_RATE or not spans or sum(spans[-1]) > len(audio):
        raise AudioError(f"the embedded {split}.ogg does not fit its index: install matpac_fast again")
    waves = [audio[start : start + length].copy() for start, length in spans]
    if split == "mixtures":
        heard = [row["families"].split("+") for row in rows]
        labels = np.array([[family in names for family in FAMILIES] for names in heard])
        none = np.empty(0, dtype=np.int64)
        return Samples(waves, labels, FAMILIES, none, none, none)
    labels = np.array([FAMILIES.index(row["families"]) for row in rows])
    program, pitch, velocity = (np.array([int(row[key]) for row in rows]) for key in ("program", "pitch", "velocity"))
    return Samples(waves, labels, FAMILIES, program, pitch, velocity)
