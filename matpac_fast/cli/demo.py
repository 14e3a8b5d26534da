"""`matpac-fast demo`: pre-train, embed and probe on the embedded audio, and write a report of it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..audio.corpus import Corpus
from ..config import MatpacConfig
from ..encoder import load_encoder
from ..errors import ConfigError
from ..files import check_no_file
from ..model import Matpac
from ..samples import load_samples
from ..train.config import TrainConfig, fit_to_run
from ..train.distributed import pick_device
from ..train.logs import Reporter, read_log
from ..train.loop import pretrain
from ..train.state import RunFolder, read_config
from . import _demo_report as report
from ._demo_study import CLIP_SECONDS, PACKAGED, STATISTICS, TRAINED, UNTRAINED, compare, verdicts
from ._progress import progress
from ._table import show
from .pretrain import _frames, _Signals


def main(
    out: Path = Path("demo"),
    minutes: float = 2.0,
    steps: int | None = None,
    temporal_supports: tuple[float, ...] = (0.16, 0.8, 2.4),
    batch_size: int = 16,
    lr: float = 1e-3,
    crop_seconds: tuple[float, ...] = (0.64, 1.28, 2.4),
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Pre-train, embed and probe on the embedded audio, offline, and write a report.

    Example: matpac-fast demo --out demo/

    Pre-trains the preset nano on 400 instrument notes and 64 mixtures, embeds other notes (other pitches, other
    recordings) at several temporal supports, and asks a linear probe for their instrument family, against log-mel
    statistics, the same encoder before training, and the pre-trained one of this package. Writes report.html,
    results.json and run/, the trained encoder. Run again on the same folder, it goes on with the run that is there;
    Ctrl-C while it pre-trains saves the run first.

    Args:
        out: folder for report and run.
        minutes: how long to pre-train; some steps are timed to find how many fit.
        steps: train so many steps instead; with the same steps the same machine finds the same accuracies.
        temporal_supports: seconds of audio that one embedding sees; each divides 2.4 s.
        batch_size: crops an optimiser step.
        lr: peak learning rate.
        crop_seconds: lengths of the crops; each step draws one.
        seed: determines the initial weights, the order of the clips, the crops and the masks.
        device: auto, cpu, cuda or cuda:1.
    """
    _check(minutes, temporal_supports, crop_seconds)
    check_no_file(out, "the demo")
    # Its report must not take the place of a file of someone else's.
    if out.is_dir() and not (out / "run" / "config.json").exists() and {p.name for p in out.iterdir()} - {"run"}:
        raise ConfigError(f"{out} is not empty and holds no demo; give a new folder to --out")
    target = pick_device(device)
    notes, mixtures = load_samples("train"), load_samples("mixtures")
    corpus = Corpus.from_arrays([*notes.waves, *mixtures.waves])
    run = out / "run"
    if stored := read_config(run):
        train, model = TrainConfig.from_dict(stored["train"]), MatpacConfig.from_dict(stored["model"])
        print(f"going on with the run in {run}: {train.steps} steps, with the options it was begun with", flush=True)
    else:
        crops = tuple(map(_frames, crop_seconds))
        preset = MatpacConfig.preset("nano", n_frames=max(crops))
        train = TrainConfig(steps=steps or 1, batch_size=batch_size, lr=lr, crop_frames=crops, seed=seed)
        if steps is None:
            RunFolder(run)  # what cannot be written is said before anything is timed
            print(f"timing a few steps on {target}", flush=True)
            steps = max(1, round(60 * minutes / _seconds_a_step(corpus, preset, train, target, 60 * minutes / 20)))
        train = dataclasses.replace(train, steps=steps, log_every=max(1, steps // 50))
        model = fit_to_run(preset, train)

    with progress("pre-training", "steps") as update, _Signals(_say) as signals:
        reporter = _Steps(update, train.steps)
        result = pretrain(corpus, run, model, train, target, reporter=reporter, stop=signals.caught)
    if not result.finished:
        print(f"stopped at step {result.step} of {train.steps}; the same command goes on from here", flush=True)
        return 128 + (signals.number or signal.SIGTERM)
    with tempfile.TemporaryDirectory() as folder:
        Matpac(model).save(Path(folder, "untrained.safetensors"))
        untrained = load_encoder(Path(folder, "untrained.safetensors"), target)
    encoders = {
        STATISTICS: load_encoder("logmel-stats", target),
        UNTRAINED: untrained,
        TRAINED: load_encoder(result.folder, target),
        PACKAGED: load_encoder(device=target),
    }
    with progress("embedding and probing", "parts") as update:
        rows = compare(encoders, notes, load_samples("test"), temporal_supports, update)
    show(*report.table_cells(rows), justify="right")
    print("\n" + "\n".join(verdicts(rows)))
    made = report.made_by(train, run, target)
    report.write_results(out / "results.json", rows, made)
    report.write_report(out / "report.html", rows, corpus, model, train, read_log(run / "log.jsonl"), made)
    print(
        f"\nopen {out / 'report.html'}; "
        f"next: matpac-fast embed AUDIO --encoder {shlex.quote(str(run))} --out embeddings/"
    )
    return 0


def _check(minutes: float, temporal_supports: tuple[float, ...], crop_seconds: tuple[float, ...]) -> None:
    for name, values in (("temporal-supports", temporal_supports), ("crop-seconds", crop_seconds)):
        if not values:
            raise ConfigError(f"--{name} has no numbers; expected one or more, such as 0.8 2.4")
    for ts in temporal_supports:
        if not 0 < ts <= CLIP_SECONDS or abs(CLIP_SECONDS / ts - round(CLIP_SECONDS / ts)) > 1e-6:
            raise ConfigError(f"--temporal-supports {ts:g}: expected seconds that divide {CLIP_SECONDS} s")
    for seconds in crop_seconds:
        if not math.isfinite(seconds):
            raise ConfigError(f"--crop-seconds {seconds:g}: expected a multiple of 0.16 s, such as 2.4")
    if not 0 < minutes < math.inf:
        raise ConfigError(f"--minutes is {minutes:g}; expected a positive number of them")


def _seconds_a_step(
    corpus: Corpus, model: MatpacConfig, train: TrainConfig, device: torch.device, budget: float
) -> float:
    """Mean over the crop lengths of what a real step takes: the median of three or more, after one that warms up.

    Steps are timed for `budget` seconds in all: a machine that is busy for a moment should not decide how many fit.
    """
    times = []
    crops = train.crop_frames or (model.n_frames,)
    for crop in crops:
        clock = _Clock(budget / len(crops))
        trial = dataclasses.replace(train, steps=10_000, crop_frames=(crop,), log_every=10_000, save_every=10_000)
        with tempfile.TemporaryDirectory() as folder:
            pretrain(corpus, folder, fit_to_run(model, trial), trial, device, reporter=clock, stop=clock.is_enough)
        times.append(float(np.median(np.diff(clock.ticks))))
    return sum(times) / len(times)


class _Clock(Reporter):
    """Notes when each step was done, until it is enough."""

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self.ticks: list[float] = []

    def step(self, step: int) -> None:
        self.ticks.append(time.perf_counter())

    def is_enough(self) -> bool:
        return len(self.ticks) >= 4 and self.ticks[-1] - self.ticks[0] >= self._budget


def _say(text: str) -> None:
    """What a signal does; by `print`, which a progress bar makes room for."""
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(text, flush=True)


class _Steps(Reporter):
    """Hands the steps to a progress bar."""

    def __init__(self, update: Callable[[int, int], None], total: int):
        self._update, self._total = update, total

    def step(self, step: int) -> None:
        self._update(step, self._total)
