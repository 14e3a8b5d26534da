"""The demo's report: report.html for people, results.json for programs, and the cells of the table on the screen."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from .. import checkpoint, ops
from ..audio.corpus import Corpus
from ..backend import versions
from ..config import MatpacConfig
from ..files import write_text
from ..reference import hz_to_mel, mel_to_hz
from ..study.cost import device_name
from ..study.probe import Interval
from ..study.report import Section, Series, facts, line_chart, mask_figure, page, table, tiles
from ..train.config import TrainConfig
from ..train.logs import Record
from ..train.sampler import Sampler
from ..train.state import read_config
from ._demo_study import CLIP_SECONDS, NAMES, STATISTICS, TRAINED, UNTRAINED, Row, verdicts


def percent(interval: Interval) -> str:
    return f"{100 * interval.mean:.1f} % ({100 * interval.low:.1f}–{100 * interval.high:.1f})"


def table_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table, the same on the screen and in the report."""
    header = ["temporal support", "windows a clip", *NAMES, "ms a clip", "ms a window"]
    body = [
        [
            f"{row.temporal_support:g} s",
            str(row.windows),
            *(percent(row.probes[name].accuracy) for name in NAMES),
            f"{row.clip_ms:.1f}",
            f"{row.window_ms:.1f}",
        ]
        for row in rows
    ]
    return header, body


def write_results(path: Path, rows: list[Row], made: dict[str, str]) -> None:
    """The numbers as JSON: what was found at each temporal support, and what made it."""
    supports = [
        {
            "temporal_support": row.temporal_support,
            "windows": row.windows,
            "clip_ms": row.clip_ms,
            "window_ms": row.window_ms,
            "accuracy": {name: dataclasses.asdict(row.probes[name].accuracy) for name in NAMES},
            "l2": {name: row.probes[name].l2 for name in NAMES},
            "gain": {name: dataclasses.asdict(row.gain(name)) for name in (UNTRAINED, STATISTICS)},
        }
        for row in rows
    ]
    write_text(path, json.dumps({"made": made, "temporal_supports": supports}, indent=2) + "\n")


def write_report(
    path: Path,
    rows: list[Row],
    corpus: Corpus,
    model: MatpacConfig,
    train: TrainConfig,
    log: list[Record],
    made: dict[str, str],
) -> None:
    """report.html: one file that needs nothing else."""
    n_test = len(rows[0].probes[TRAINED].correct)
    longest = max(rows, key=lambda row: row.temporal_support)
    top = [
        (f"{100 * longest.probes[name].accuracy.mean:.1f} %", f"{name}, {longest.temporal_support:g} s")
        for name in NAMES
    ]
    top.append((made["training time"], f"of pre-training, {train.steps} steps"))
    lead = (
        f"Which of ten instrument families plays? A linear probe answers for {n_test} notes of recordings that neither "
        "pre-training nor the probe has heard. A guess would be right one time in ten."
    )
    header, body = table_cells(rows)
    best = [
        (i, 2 + max(range(len(NAMES)), key=lambda j: row.probes[NAMES[j]].accuracy.mean)) for i, row in enumerate(rows)
    ]
    sections = [
        Section(
            "What the student sees",
            "A crop and its mask, as training draws them. The student gets the patches that are left; the predictor "
            "must guess what the teacher makes of the covered ones.",
            [_crop_figure(corpus, model, train)],
        ),
        Section(
            "Pre-training",
            f"{train.steps} steps of {train.batch_size} crops of {_lengths(train)}, from {len(corpus)} clips "
            f"({corpus.seconds / 60:.0f} minutes). The targets move with the teacher, so a loss need not keep falling.",
            [
                _curve(log, "loss_pred", "prediction loss"),
                _curve(log, "loss_cls", "classification loss"),
            ],
        ),
        Section(
            "Temporal support",
            f"The seconds of audio that one embedding sees. Every clip is {CLIP_SECONDS:g} s, cut into windows whose "
            "embeddings are averaged. Bars are 95 % bootstrap intervals over the test notes' instruments.",
            [_accuracy(rows), _time(rows)],
        ),
        Section("The numbers", " ".join(verdicts(rows)), [table(header, body, best)]),
        Section("How this was made", "", [facts(list(made.items()))]),
    ]
    write_text(path, page("matpac-fast demo", lead, sections, tiles(top)))


def _lengths(train: TrainConfig) -> str:
    seconds = [f"{frames / 100:g}" for frames in train.crop_frames or ()]
    return (" or ".join([", ".join(seconds[:-1]), seconds[-1]]) if len(seconds) > 1 else seconds[0]) + " s"


def _crop_figure(corpus: Corpus, model: MatpacConfig, train: TrainConfig) -> str:
    """The longest crop of a mixture, or else of a note, in the first step that draws the longest crops."""
    mel = model.log_mel
    crops = [mel.n_samples(frames) for frames in train.crop_frames or (model.n_frames,)]
    sampler = Sampler(corpus.frames, crops, train.batch_size, train.seed)
    plan = next(plan for plan in map(sampler.plan, range(1000)) if plan.crop == max(crops))
    row = int(corpus.frames[plan.clips].argmax())
    wave = torch.from_numpy(corpus.gather(plan.clips[row : row + 1], plan.starts[row : row + 1], plan.crop))
    spec = ops.log_mel(wave, mel)[0].numpy()  # (n_mels, T)
    n_tokens = model.freq * (spec.shape[1] // model.patch_size)
    order = ops.mask_shuffle(train.seed, plan.step, torch.from_numpy(plan.index[row : row + 1]), n_tokens)[0].numpy()
    masked = np.ones(n_tokens, bool)
    masked[order[: model.n_visible(n_tokens)]] = False
    low, high = hz_to_mel(torch.tensor([mel.f_min, mel.f_max], dtype=torch.float64)).tolist()
    centres = mel_to_hz(torch.linspace(low, high, mel.n_mels + 2, dtype=torch.float64))[1:-1].numpy()
    return mask_figure(spec, masked.reshape(model.freq, -1), spec.shape[1] * mel.hop / mel.sample_rate, centres)


def _curve(log: list[Record], key: str, name: str) -> str:
    points = [(record["step"], record[key]) for record in log if key in record]
    steps, values = zip(*points, strict=True)
    return line_chart([Series(name, steps, values, marks=False)], "step", name, from_zero=False)


def _accuracy(rows: list[Row]) -> str:
    ts = [row.temporal_support for row in rows]
    found = {name: [row.probes[name].accuracy for row in rows] for name in NAMES}
    series = [
        Series(name, ts, [i.mean for i in found[name]], [i.low for i in found[name]], [i.high for i in found[name]])
        for name in NAMES
    ]
    label = "temporal support (s)"
    return line_chart(series, label, "accuracy", log_ticks=ts, y_format="{:.0%}")


def _time(rows: list[Row]) -> str:
    ts = [row.temporal_support for row in rows]
    series = [
        Series("a clip, among 16", ts, [row.clip_ms for row in rows]),
        Series("one window alone", ts, [row.window_ms for row in rows]),
    ]
    return line_chart(series, "temporal support (s)", "milliseconds", log_ticks=ts)


def made_by(train: TrainConfig, run: Path, device: torch.device) -> dict[str, str]:
    """What made the numbers: command, time, machine, versions."""
    state = json.loads((checkpoint.find_weights(run).parent / "state.json").read_text(encoding="utf-8"))
    precision = (read_config(run) or {})["train"]["precision"]
    machine = device_name(device) + ("" if device.type == "cuda" else f", threads: {torch.get_num_threads()}")
    again = shlex.join(["matpac-fast", *sys.argv[1:]])
    return {
        "command": again,
        "steps": f"{train.steps}; --steps {train.steps} on a machine like this finds the same numbers",
        "training time": str(timedelta(seconds=round(state["seconds"]))),
        "device": f"{machine}, {precision}",
        **versions(),
    }
