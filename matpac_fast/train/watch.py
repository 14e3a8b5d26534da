"""Looks out for steps that were not finite and for representations that collapse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import MatpacFastError
from .logs import Record
from .sampler import Plan


class TrainingError(MatpacFastError, RuntimeError):
    """A run that cannot go on; its last checkpoint, where there is one, is intact."""


class BadSteps:
    """Collects on the device which steps were skipped, and tells the host when it asks.

    Args:
        window: steps between two questions, at most.
        limit: bad steps in a row that end the run.
    """

    def __init__(self, window: int, limit: int, device: torch.device):
        self._flags = torch.zeros(window, dtype=torch.bool, device=device)
        self._plans: list[Plan] = []
        self._limit = limit
        self._in_a_row = 0
        self.limit_reached = False

    def add(self, plan: Plan, bad: Tensor) -> None:
        self._flags[len(self._plans)] = bad
        self._plans.append(plan)

    def read(self) -> list[Plan]:
        """The plans of the bad steps since the last call; waits for the device."""
        flags = self._flags[: len(self._plans)].tolist()
        bad = [plan for plan, flag in zip(self._plans, flags, strict=True) if flag]
        for flag in flags:
            self._in_a_row = self._in_a_row + 1 if flag else 0
            self.limit_reached |= self._in_a_row >= self._limit
        self._plans.clear()
        return bad


def collapse(statistics: Record, width: int, prototypes: int) -> str | None:
    """One line on what has collapsed in a line of the log, or None.

    The teacher's unit latents of width D spread by about 1 / sqrt(D) a channel where they point everywhere alike.
    """
    spread = statistics.get("spread_target", 1.0) * width**0.5
    if spread < 0.05:
        return f"the teacher's latents spread over {spread:.1%} of what they could: they are collapsing to one point"
    rank = statistics.get("effective_rank", float("inf"))
    if rank < 2:
        return f"the teacher's latents have an effective rank of {rank:.2f}: they are collapsing to one direction"
    perplexity = statistics.get("teacher_perplexity", float("inf"))
    if perplexity < 1.5:
        return f"the teacher uses {perplexity:.2f} prototypes on average: the classification is collapsing to one class"
    entropy, most = statistics.get("teacher_entropy", 0.0), math.log(prototypes)
    if entropy > 0.99 * most:
        return (
            f"the teacher's distributions have an entropy of {entropy:.3f} nats of at most {most:.3f}: the "
            "classification is collapsing to all classes alike"
        )
    return None
