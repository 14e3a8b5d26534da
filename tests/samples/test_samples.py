"""The embedded audio: what the loader promises, and that the split is as fair as it says."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from matpac_fast import samples
from matpac_fast.errors import AudioError, ConfigError
from matpac_fast.samples import FAMILIES, load_samples

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_samples.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_samples", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_samples"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("split", ["train", "test"])
def test_notes(split: str) -> None:
    notes = load_samples(split)
    assert len(notes.waves) == len(notes.labels) == len(notes.program) == len(notes.pitch) == len(notes.velocity) == 400
    assert np.array_equal(np.bincount(notes.labels), [40] * len(FAMILIES))
    for wave, program, family in zip(notes.waves, notes.program, notes.labels, strict=True):
        assert wave.dtype == np.float32
        assert wave.shape == (40_000,)
        assert program // 8 == family  # General MIDI counts its families in eights
        assert 10 ** (-19 / 20) < np.abs(wave).max() < 10 ** (-1 / 20)
        assert np.abs(wave[: 16 * 40]).max() < 0.01  # nothing before 50 ms, but for the codec's pre-echo
        assert wave.base is None


def test_sounding_pitch_is_the_labelled_one() -> None:
    # Long sustained flute and reed tones: the strongest peak of the spectrum is a harmonic of the labelled pitch.
    notes = load_samples("test")
    for index in np.flatnonzero(np.isin(notes.program, [68, 71, 73, 74])):
        power = np.abs(np.fft.rfft(notes.waves[index][8_000:14_000] * np.hanning(6_000), 64_000))
        peak = power[100:].argmax() * 0.25 + 25.0
        harmonic = peak / (440 * 2 ** ((notes.pitch[index] - 69) / 12))
        assert round(harmonic) >= 1
        assert abs(12 * np.log2(harmonic / round(harmonic))) < 0.5


def test_mixtures() -> None:
    mixtures = load_samples("mixtures")
    assert mixtures.labels.shape == (64, len(FAMILIES))
    assert mixtures.labels.dtype == bool
    assert mixtures.labels.any(1).all()
    assert mixtures.labels.sum(1).max() == 3
    assert {len(wave) for wave in mixtures.waves} == {99_200}
    assert len(mixtures.pitch) == len(mixtures.program) == len(mixtures.velocity) == 0


def test_train_and_test_share_no_pitch_of_an_instrument() -> None:
    train, test = load_samples("train"), load_samples("test")
    played = [set(zip(part.program.tolist(), part.pitch.tolist(), strict=True)) for part in (train, test)]
    assert len(played[0]) == len(played[1]) == 400
    assert not played[0] & played[1]
    # The same instruments on both sides, so the probe is asked about new recordings, not about new instruments.
    assert set(train.program.tolist()) == set(test.program.tolist())


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="'valid'"):
        load_samples("valid")  # pyright: ignore[reportArgumentType]


def test_damaged_data_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "FOLDER", tmp_path)
    with pytest.raises(AudioError, match="install matpac_fast again"):
        load_samples("train")
    shutil.copy(Path(samples.__file__).parent / "index.csv", tmp_path)
    (tmp_path / "train.ogg").write_bytes(b"not audio")
    with pytest.raises(AudioError, match="install matpac_fast again"):
        load_samples("train")


def test_the_script_cuts_ranges_by_recording(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two instruments; the second borrows recording 12 of the first, so its zone must land on the first's side.
    piano = {key: frozenset({key // 4}) for key in range(28, 97)}
    guitar = {key: frozenset({100 + key // 3}) for key in range(40, 81)} | {
        key: frozenset({12}) for key in (48, 49, 50)
    }
    monkeypatch.setattr(script, "INSTRUMENTS", {"piano": {0: (28, 96)}, "guitar": {25: (40, 80)}})
    monkeypatch.setattr(script, "recordings", lambda soundfont: {0: piano, 25: guitar})
    sides = script.split_pitches(Path("unused.sf2"))
    heard = {
        split: {
            recording
            for program, sounds in ((0, piano), (25, guitar))
            for zone in sides[split][program]
            for pitch in zone
            for recording in sounds[pitch]
        }
        for split in ("train", "test")
    }
    assert not heard["train"] & heard["test"]
    assert len(heard["train"]) > 10
    assert len(heard["test"]) > 10
    pitches = sorted(pitch for split in ("train", "test") for zone in sides[split][0] for pitch in zone)
    assert pitches == list(range(28, 97))


def test_the_script_writes_midi_that_reads_back(script: ModuleType) -> None:
    clip = [script.Event(0, 73, 60, 100, 0.1, 0.5), script.Event(9, 0, 36, 90, 0.2, 0.3)]
    data = script.midi([clip, clip], 3.0)
    assert data[:14] == b"MThd\x00\x00\x00\x06\x00\x00\x00\x01\x01\xf4"
    assert int.from_bytes(data[18:22], "big") == len(data) - 22
    now, position, notes = 0, 22 + 7, []
    while position < len(data):
        delta = 0
        while True:
            byte = data[position]
            delta, position = delta << 7 | byte & 127, position + 1
            if byte < 128:
                break
        now += delta
        status = data[position]
        if status >> 4 == 9:
            notes.append((now, status & 15, data[position + 1]))
        position += 2 if status >> 4 == 0xC else 3
    assert notes == [(100, 0, 60), (200, 9, 36), (3100, 0, 60), (3200, 9, 36)]


@pytest.mark.skipif(
    not (shutil.which("fluidsynth") and Path("/usr/share/sounds/sf2/FluidR3_GM.sf2").exists()),
    reason="needs fluidsynth and fluid-soundfont-gm",
)
def test_the_script_made_these_notes(script: ModuleType) -> None:
    zones = script.split_pitches(script.SOUNDFONT)
    events = script.draw_notes(zones["test"], script.NOTES["test"], script.SEEDS["test"])
    notes = load_samples("test")
    assert [(e.program, e.pitch, e.velocity) for e in events] == list(
        zip(notes.program.tolist(), notes.pitch.tolist(), notes.velocity.tolist(), strict=True)
    )
    picked = [3, 150, 396]
    for index, wave in zip(picked, script.render([[events[i]] for i in picked], 2.5, script.SOUNDFONT), strict=True):
        kept = notes.waves[index].astype(np.float64)
        assert (wave @ kept) / np.sqrt((wave @ wave) * (kept @ kept)) > 0.98
