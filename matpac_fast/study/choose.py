"""Which temporal support to take, so that no test clip has a say in what its score is told of.

Where folds rotate, the clips that one fold tests on validate another. A temporal support that is chosen by the mean
validation score of all folds is then chosen on the test clips, and its score on them lies too high. So each fold has a
choice of its own, by its own validation clips, which it does not test on; the choices' scores, put together, say what
choosing like this is worth. The one to recommend is chosen by all folds. With one fold the two are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cell import Cell

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Choice:
    """Numbers of cells: `taken` by all folds' validation clips, `by_fold[f]` by those of fold f alone."""

    taken: int
    by_fold: list[int]

    def together(self, by_fold: Sequence[Tensor]) -> Tensor:
        """Of each cell's scores by fold (1 + B, F) those of the choice: of each fold the cell that it chose."""
        return torch.stack([by_fold[i][:, f] for f, i in enumerate(self.by_fold)], 1)


def choose(cells: Sequence[Cell], costs: Sequence[float | None], margin: float) -> tuple[Choice, Choice | None]:
    """The best of one encoder's cells, by rising temporal support, and the cheapest within `margin` of it.

    Of cells that see every clip whole, whose embeddings are the same, only the first is chosen; of equal ones the
    first. The cheapest is None where costs of cells that might be it are not known. A fold without a validation score,
    as of a mAP without a positive clip, holds all cells for equal.
    """
    whole = [i for i, cell in enumerate(cells) if cell.sees_all]
    usable = [i for i in range(len(cells)) if i not in whole[1:]]
    parts = _valid(cells)
    best = [max(usable, key=lambda i, part=part: part[i]) for part in parts]  # the first of several
    near = [
        [i for i in usable if part[i] >= part[top] - margin - _ROUNDING] for part, top in zip(parts, best, strict=True)
    ]
    known = {i: cost for i, cost in enumerate(costs) if cost is not None}
    if not all(i in known for some in near for i in some):
        return Choice(best[0], best[1:]), None
    cheapest = [min(some, key=lambda i: known[i]) for some in near]
    return Choice(best[0], best[1:]), Choice(cheapest[0], cheapest[1:])


def best_encoder(encoders: Sequence[tuple[Sequence[Cell], Choice]]) -> Choice:
    """Of several encoders' cells and choices, by number, whose choice is the best."""
    parts = [_valid([cells[i] for i in (choice.taken, *choice.by_fold)]) for cells, choice in encoders]
    # Of all folds the cell that all have chosen, of fold f the one that it has.
    scores = [[part[place] for place, part in enumerate(each)] for each in parts]
    best = [max(range(len(encoders)), key=lambda n, place=place: scores[n][place]) for place in range(len(scores[0]))]
    return Choice(best[0], best[1:])


def _valid(cells: Sequence[Cell]) -> list[list[float]]:
    """Validation scores of the cells: of all folds together, then of each alone."""
    by_fold = torch.stack([cell.valid_by_fold for cell in cells]).nan_to_num(-1.0)
    return [[cell.valid_score for cell in cells], *by_fold.T.tolist()]
