"""What to do about a batch that does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable

import torch


def advice(rows: int, n: int, device: torch.device, fits: Callable[[int], bool] | None) -> str:
    """What to say of a batch of `rows` crops that does not fit in `n` pieces.

    `fits` tries it in so many pieces; None where that cannot be done, and the next number is only proposed.
    """
    message = f"{rows // n} crops at a time do not fit into the memory of {device}"
    more = [pieces for pieces in range(n + 1, rows + 1) if rows % pieces == 0]
    if fits is None:
        if not more:
            return f"{message}: choose a smaller preset or a shorter crop, or more processes"
        return f"{message}: try {rows // more[0]}, --grad-accumulation {more[0]} computes the same step"
    for pieces in more:
        if fits(pieces):
            return f"{message}, but {rows // pieces} do: --grad-accumulation {pieces} computes the same step"
    return f"{message}, nor do fewer: choose a smaller preset or a shorter crop"
