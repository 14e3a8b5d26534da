"""One task, encoder and temporal support of a study, probed and costed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tasks import Task
from .cache import View
from .cost import Cost
from .linear import Probed


@dataclass(frozen=True)
class Cell:
    """One task, encoder and temporal support: what its probes said, and what it cost at each batch size.

    `windows` and `full_windows`: of a clip, on average; the second counts each by its length over the temporal support,
    for the last or only one may be much shorter. None: all are full.
    """

    task: Task
    encoder: str
    encoder_id: str
    embedding_dim: int
    view: View
    probed: Probed
    windows: float
    shared_audio: int
    costs: list[Cost]
    full_windows: float | None = None

    @property
    def valid_score(self) -> float:
        """Mean over folds and seeds of the score on validation clips: the clips of one fold's are tested
        in another where folds rotate."""
        return self.probed.valid_score.nanmean().item()

    @property
    def valid_by_fold(self) -> Tensor:
        """(F,) of each fold alone, which does not test on these clips; NaN where it has none."""
        return torch.stack([fold.nanmean() for fold in self.probed.valid_score])

    @property
    def sees_all(self) -> bool:
        """Whether every clip is one window, and no padding in it: a longer temporal support changes nothing."""
        padded = self.view.remainder == "pad" and self.view.aggregate != "one"
        return not padded and self.view.temporal_support >= float(self.task.seconds.max())
