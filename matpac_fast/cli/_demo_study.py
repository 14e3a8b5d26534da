"""What the demo asks of an encoder: its worth to a linear probe, and its cost, at each temporal support."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..audio_encoder import AudioEncoder
from ..samples import SAMPLE_RATE, Samples
from ..study.probe import Interval, ProbeResult, bootstrap_interval, linear_probe
from ..weights import DEFAULT

STATISTICS, UNTRAINED, TRAINED = "log-mel statistics", "untrained encoder", "pre-trained encoder"
PACKAGED = f"{DEFAULT}, of this package"
NAMES = (STATISTICS, UNTRAINED, TRAINED, PACKAGED)
# Of each note, so that windows of every temporal support are whole and all of them hear the same audio.
CLIP_SECONDS = 2.4
_CLIPS = 16  # embedded together


@dataclass(frozen=True)
class Row:
    """What was found at one temporal support, in seconds."""

    temporal_support: float
    windows: int  # of a clip
    clip_ms: float  # to embed a clip, 16 clips at a time
    window_ms: float  # to embed one window on its own
    probes: dict[str, ProbeResult]
    instrument: Tensor  # (N,) of each test note: its notes are right or wrong together

    def gain(self, over: str) -> Interval:
        """Accuracy that pre-training gains over a baseline, clip by clip on the same test clips."""
        difference = self.probes[TRAINED].correct.double() - self.probes[over].correct.double()
        return bootstrap_interval(difference, groups=self.instrument)


def compare(
    encoders: Mapping[str, AudioEncoder],
    train: Samples,
    test: Samples,
    temporal_supports: tuple[float, ...],
    update: Callable[[int, int], None],
) -> list[Row]:
    """Probe each encoder, by its name of NAMES, at each temporal support; `update` hears of (done, total) parts.

    A clip's features are the mean over its windows. Costs are those of the pre-trained encoder on its device.
    """
    clips = [torch.from_numpy(np.stack(part.waves))[:, : round(CLIP_SECONDS * SAMPLE_RATE)] for part in (train, test)]
    labels = [torch.from_numpy(part.labels) for part in (train, test)]
    instrument = torch.from_numpy(test.program)
    rows, done = [], 0
    for ts in temporal_supports:
        probes, clip_ms = {}, 0.0
        for name in NAMES:
            features = []
            for waves in clips:
                clock = time.perf_counter()
                features.append(embed(encoders[name], waves, ts))
                if name == TRAINED:
                    clip_ms = 1e3 * (time.perf_counter() - clock) / len(waves)
            probes[name] = linear_probe(features[0], labels[0], features[1], labels[1], groups=instrument)
            done += 1
            update(done, len(NAMES) * len(temporal_supports))
        n_windows = round(CLIP_SECONDS / ts)
        rows.append(Row(ts, n_windows, clip_ms, window_ms(encoders[TRAINED], clips[1][0], ts), probes, instrument))
    return rows


def embed(encoder: AudioEncoder, waves: Tensor, temporal_support: float) -> Tensor:
    """(N, S) -> (N, E): the mean over its windows of each clip."""
    together = _CLIPS * round(CLIP_SECONDS / temporal_support)
    found = [
        encoder.embed(some, SAMPLE_RATE, temporal_support, batch_size=together).values.mean(1)
        for some in waves.split(_CLIPS)
    ]
    return torch.cat(found).cpu()


def window_ms(encoder: AudioEncoder, wave: Tensor, temporal_support: float) -> float:
    """Median milliseconds from one window of audio to its embedding."""
    window, times = wave[: round(temporal_support * SAMPLE_RATE)], []
    for _ in range(15):
        clock = time.perf_counter()
        encoder.embed(window, SAMPLE_RATE, temporal_support).values.cpu()
        times.append(time.perf_counter() - clock)
    return 1e3 * float(np.median(times))


def verdicts(rows: list[Row]) -> list[str]:
    """One plain sentence a temporal support: what pre-training gained, or that the test cannot tell."""
    sentences = []
    for row in rows:
        parts = []
        for name in (UNTRAINED, STATISTICS):
            gain = row.gain(name)
            points = f"{100 * gain.mean:+.1f} points ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
            told = "" if gain.low > 0 or gain.high < 0 else ", which is within chance"
            parts.append(f"{points} against the {name}{told}".replace("the log-mel", "log-mel"))
        sentences.append(f"At {row.temporal_support:g} s pre-training makes {parts[0]}, and {parts[1]}.")
    return sentences
