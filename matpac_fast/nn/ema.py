"""Exponential moving averages of parameters, over all of them in a few launches."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from ..errors import ConfigError


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
def ema_update(average: nn.Module, model: nn.Module, decay: float | Tensor, skip: Tensor | None = None) -> None:
    """average <- decay * average + (1 - decay) * model, parameter by parameter, in the average's dtype.

    With a number and without `skip` it has the official arithmetic, bit for bit. `decay` may be a float64 scalar on the
    device, and `skip`, a bool scalar there, leaves the average as it is where it is true: neither is told to the host,
    and the result is that of the formula to one rounding.

    Raises:
        ConfigError: layers of one were replaced or parametrized, so that its parameters are not those of the other; or
            the average is of 16 bits, in which it would stand still.
    """
    pairs = _pairs(average, model)
    targets: list[Tensor] = [local(p) for p, _ in pairs]
    if coarse := [t.dtype for t in targets if t.dtype.itemsize < 4]:
        raise ConfigError(
            f"the teacher's parameters are {str(coarse[0]).removeprefix('torch.')}, in which an average hardly moves: "
            "each step is rounded away; expected float32: keep the model in float32 and train it under torch.autocast"
        )
    # .data, for the kernel counts as changing its gradients: a backward pass that comes later must not mind.
    sources = [local(p).data.to(t.dtype) for (_, p), t in zip(pairs, targets, strict=True)]
    if skip is None and not isinstance(decay, Tensor):
        torch._foreach_mul_(targets, decay)
        torch._foreach_add_(targets, sources, alpha=1 - decay)
        return
    # A step of SGD that maximises, with the model as gradient and a weight decay of 1, moves the average a by
    # lr * (model - a). So torch's fused SGD does it in one pass, and knows how to skip on the device.
    lr: Any = 1 - decay
    if isinstance(lr, Tensor):
        lr = lr.float()  # subtracted in float64: of 1 - 0.99999 float32 would keep five bits less
    sgd(
        targets,
        sources,
        [None] * len(targets),
        fused=True,
        found_inf=None if skip is None else skip.float(),
        weight_decay=1.0,
        momentum=0.0,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=True,
    )


def _pairs(average: nn.Module, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each parameter of `average` with that of `model` in its place; what compiles or wraps a whole layer renames the
    layer, but neither what its parameters are called in it nor their order."""
    pairs = list(zip_longest(average.named_parameters(), model.named_parameters()))
    for pair in pairs:
        if None in pair or len({(name.rpartition(".")[2], parameter.shape) for name, parameter in pair}) > 1:
            names = ["none" if place is None else f"{place[0]} {tuple(place[1].shape)}" for place in pair]
            raise ConfigError(
                f"the teacher's parameter {names[0]} stands beside the student's {names[1]}: layers were replaced, "
                "pruned or parametrized; do the same to the teacher's, or put them back before update_teachers"
            )
    return [(teacher, student) for (_, teacher), (_, student) in pairs]
