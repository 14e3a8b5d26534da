"""Exponential moving averages of parameters, over all of them in a few launches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def linear_anneal(start: float, end: float, step: int, total: int) -> float:
    """Line from `start` at step 0 to `end` at `total`, constant after it."""
    if step >= total:
        return end
    return end - (end - start) * (1 - step / total)


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this process holds, without gradient: all of it, unless FSDP has cut it into shards."""
    with torch.no_grad():
        return getattr(tensor, "to_local", tensor.detach)()


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, decay: float, skip: Tensor | None = None) -> None:
    """average <- decay * average + (1 - decay) * model, parameter by parameter, in the average's dtype.

    `skip`, a bool scalar on the device, leaves the average as it is where it is true, without telling the host.
    """
    targets: list[Tensor] = [local(p) for p in average.parameters()]
    sources = [local(p).to(t.dtype) for p, t in zip(model.parameters(), targets, strict=True)]
    if skip is None:
        torch._foreach_mul_(targets, decay)
        torch._foreach_add_(targets, sources, alpha=1 - decay)
    else:
        torch._foreach_mul_(targets, torch.where(skip, 1.0, decay))
        torch._foreach_add_(targets, torch._foreach_mul(sources, torch.where(skip, 0.0, 1 - decay)))
