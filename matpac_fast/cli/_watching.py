"""What a run is watched by, kept in its folder, so that a command which goes on with it need not say it again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..files import write_text
from ..train.logs import Record, Reporter, Reporters
from ._words import count

if TYPE_CHECKING:
    import torch

    from ..study.live import LiveProbe

_FILE = "watching.json"


@dataclass(frozen=True)
class Watching:
    """The folder of labelled audio to score on, as an absolute path, and of how many clips; whether for TensorBoard."""

    probe_data: str | None = None
    probe_clips: int = 500
    tensorboard: bool = False

    def but(self, probe_data: Path | None, probe_clips: int | None, tensorboard: bool | None) -> Watching:
        """With what a command line gives; "none" for a folder ends the scores."""
        given: dict[str, object] = {}
        if probe_data is not None:
            ends = str(probe_data) == "none" and not probe_data.exists()
            given["probe_data"] = None if ends else os.path.abspath(probe_data)
        if probe_clips is not None:
            given["probe_clips"] = probe_clips
        if tensorboard is not None:
            given["tensorboard"] = tensorboard
        return dataclasses.replace(self, **given)  # pyright: ignore[reportArgumentType]


def read_watching(run: Path) -> Watching:
    """Of a run; of a new one, or one that Python began, the defaults.

    Raises:
        ConfigError: the file is damaged.
    """
    path = run / _FILE
    try:
        return Watching(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Watching()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}): remove it, and give what it held anew") from None


class Keeper(Reporter):
    """Writes it down once the run has begun, which makes its folder."""

    def __init__(self, run: Path, watching: Watching):
        self._run, self._watching = run, watching

    def record(self, record: Record) -> None:
        if record.get("event") in ("start", "resume") and self._watching != read_watching(self._run):
            write_text(self._run / _FILE, json.dumps(dataclasses.asdict(self._watching), indent=2) + "\n")


def reporters(run: Path, watching: Watching, first: Reporter, say: Callable[[str], None]) -> Reporter:
    """`first`, and all that writes into the run's folder."""
    from ..train.reporters import Curves, TensorBoard

    found = [first, Keeper(run, watching)]
    try:
        found.append(Curves())
    except ConfigError as error:  # the run is worth as much without its picture
        say(f"note: {error}")
    if watching.tensorboard:
        found.append(TensorBoard(run / "tensorboard"))
    return Reporters(*found)


def live_probe(
    watching: Watching, device: torch.device, sample_rate: int, say: Callable[[str], None]
) -> LiveProbe | None:
    """What scores the encoders as they are trained, None where nothing shall."""
    if watching.probe_data is None:
        return None
    from ..study.live import LiveProbe

    probe = LiveProbe(watching.probe_data, watching.probe_clips, device=device, sample_rate=sample_rate)
    say(f"probing on {count(len(probe), 'clip')} of {count(len(probe.labels), 'label')}, {watching.probe_data}")
    for line in probe.left_out:
        say(f"left out of the probe: {line}")
    return probe
