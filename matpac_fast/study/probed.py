"""How probes are trained, on what, and what those that are chosen say."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class ProbeConfig:
    """How the probes are trained.

    `learning_rates` x `decays` is the grid; each fold and seed takes the pair, and the step, of least validation loss.
    `decays` are strengths of an L2 penalty decay / 2 * |weight|^2 beside the mean loss of a clip. A seed draws the
    initial weights, and the validation clips where the task names none, or else a resample of their groups, by which it
    chooses: what the choice owes to chance shows between the seeds. With one seed, and in batches, all of them choose.
    `standardize`: features to zero mean and unit spread over the training clips. `attentive`: as attentive.py says; a
    study sets it. `batch`: rows of a gradient, as batches.py says, where steps are passes; None: all.
    """

    learning_rates: tuple[float, ...] = (0.1, 1.0)
    decays: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    seeds: int = 3
    steps: int = 300
    check_every: int = 10
    patience: int = 5  # checks without any probe of the grid getting better
    standardize: bool = True
    attentive: bool = False
    batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "check_every", "patience", "batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"probe: {name} is {value}; expected at least 1")
        if self.attentive and self.batch is not None:
            raise ConfigError("probe: an attentive probe is trained on all clips at once; expected no batch for it")
        rates, decays = self.learning_rates, self.decays
        usable = all(0 < rate < math.inf for rate in rates) and all(0 <= decay < math.inf for decay in decays)
        if not (rates and decays and usable):  # of NaN all comparisons are false
            raise ConfigError(f"probe: learning rates {rates}, decays {decays}; expected finite, positive ones")


@dataclass(frozen=True)
class Rows:
    """Embeddings (R, D), the clip (R,) of each and the seconds (R,) that each saw, by which a clip's rows share its
    weight: the end of a clip may be a window of a few milliseconds."""

    values: Tensor
    clip: np.ndarray
    seconds: np.ndarray

    @functools.cached_property
    def shares(self) -> np.ndarray:
        """(R,) of its clip."""
        whole = np.bincount(self.clip, self.seconds)
        return self.seconds / whole[self.clip]


@dataclass(frozen=True)
class Probed:
    """What the chosen probes say.

    `scores[f]` (S, N_f, K): probabilities for the test clips of fold f by each seed, averaged over a clip's rows.
    `valid` (F, S): loss on the validation clips; `valid_score` (F, S): their score by the task's metric;
    `chosen` (F, S, 2): learning rate and decay; `untrained` (F, S) bool: no step lowered the loss, so that the scores
    are those of weights as they were drawn; `weights[f]` (S, D + 1, K) for features as given, bias last; of an
    attentive probe (S, D + 1, K + 1), the query last.
    """

    scores: list[Tensor]
    valid: Tensor
    valid_score: Tensor
    chosen: Tensor
    untrained: Tensor
    weights: list[Tensor] = field(default_factory=list)
