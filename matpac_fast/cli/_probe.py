"""The options of `study` and `probe` that say how probes are trained and scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..study.linear import ProbeConfig
from ..study.metrics import no_clip_differs
from ..study.study_page import NO_CLIP, NO_SCORE


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


_RATES, DECAYS = _listed(ProbeConfig.learning_rates), _listed(ProbeConfig.decays)
# In batches each feature has unit spread, where all at once they have unit length together: 0.1 is then so much that no
# pass may be better than the initial weights.
_BATCH_RATES = "1e-4,1e-3,1e-2"
_PASSES = 20  # that training in batches goes on without gain


def probe_config(
    learning_rates: str | None, decays: str, batch: int | None, seeds: int, standardize: bool
) -> ProbeConfig:
    if learning_rates is None:
        learning_rates = _RATES if batch is None else _BATCH_RATES
    grid = numbers("--learning-rates", learning_rates), numbers("--decays", decays)
    if batch is None:
        return ProbeConfig(*grid, seeds, standardize=standardize)
    return ProbeConfig(*grid, seeds, standardize=standardize, batch=batch, check_every=1, patience=_PASSES)


def probe_words(probe: ProbeConfig, attentive: bool) -> str:
    rates, decays = (", ".join(f"{value:g}" for value in values) for values in (probe.learning_rates, probe.decays))
    steps = "steps" if probe.batch is None else f"passes in batches of {probe.batch}"
    return (
        f"{'attentive' if attentive else 'linear'}; learning rates {rates}; decays {decays}; seeds: {probe.seeds}; "
        f"at most {probe.steps} {steps}, checked every {probe.check_every} and ended after {probe.patience} checks "
        f"without gain; features {'standardised' if probe.standardize else 'as they are'}"
    )


def at_the_edge(results: Sequence[Mapping[str, Any]], decays: Sequence[float]) -> list[str]:
    """A sentence for each task most of whose probes took the largest or smallest decay that was offered."""
    found = []
    for task in dict.fromkeys(row["task"] for row in results):
        taken = [decay for row in results if row["task"] == task and not row["subset"] for decay in row["decays"]]
        for edge, most, more in ((max(decays), "largest", "larger"), (min(decays), "smallest", "smaller")):
            n = sum(decay == edge for decay in taken)
            if len(decays) > 1 and edge and 2 * n > len(taken):
                found.append(
                    f"{task}: {n} of {len(taken)} probes took the {most} of the decays, {edge:g}; --decays with {more} "
                    "ones may score better."
                )
    return found


def untrained(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each task and encoder some of whose probes no step has bettered."""
    found = []
    for task, encoder in dict.fromkeys((row["task"], row["encoder"]) for row in results):
        rows = [r for r in results if (r["task"], r["encoder"], r["subset"]) == (task, encoder, "") and r["untrained"]]
        if rows:
            at = ", ".join(f"{row['temporal_support']:g} s" for row in rows)
            n, of = sum(row["untrained"] for row in rows), sum(row["folds"] * row["seeds"] for row in rows)
            found.append(
                f"{task}, {encoder}: no step lowered the validation loss of {n} of {of} probes at {at}, whose scores "
                "are those of untrained weights; smaller --learning-rates or larger --decays may train them."
            )
    return found


def bounds(low: float, high: float, form: str = ".3f", between: str = "–") -> str:
    """An interval in words; of one group of test clips there is none."""
    return "no interval: one group" if math.isnan(low) else f"{low:{form}}{between}{high:{form}}"


def scored(score: float, low: float, high: float, form: str = ".3f", between: str = "–") -> str:
    """A score and its interval in words; without a clip of any class there is no mean average precision."""
    if math.isnan(score):
        return NO_SCORE
    return f"{score:{form}} ({bounds(low, high, form, between)})"


def differs(difference: float, low: float, high: float) -> str:
    """A difference and its interval in words: of none on any clip it has no width, and says nothing of other clips."""
    same = no_clip_differs(difference, low, high)
    return f"{difference:+.3f} ({NO_CLIP if same else bounds(low, high, '+.3f', ' to ')})"


def check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise ConfigError(f"--resamples is {resamples}; expected at least 1, such as 1000")


def numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; expected numbers with commas between them") from None
