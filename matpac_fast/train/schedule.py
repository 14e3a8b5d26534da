"""The learning rate, and how the official schedules are stretched to a run of another length."""

from __future__ import annotations

import math

OFFICIAL_STEPS = 294_816
OFFICIAL_WARMUP = 19_654
OFFICIAL_TEACHER_TEMP_WARMUP = 9_827


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear from 0 at step 0 to `peak` at step `warmup`, then half a cosine to 0 at `steps`; fairseq's `cosine`.

    So the first step has a rate of 0 and fills Adam's moments only, as in the official run.

    Args:
        step: of the optimiser, from 0.
        peak: the largest rate, `TrainConfig.lr`.
        warmup: steps to the peak, `TrainConfig.warmup_steps`.
        steps: of the whole run; the rate is 0 from there on.
    """
    if step < warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.5 * peak * (1.0 + math.cos(math.pi * done))


def share_of_run(official: int, steps: int) -> int:
    """A number of steps that is to a run of `steps` what `official` is to the official run, at least 1."""
    return max(1, round(official * steps / OFFICIAL_STEPS))
