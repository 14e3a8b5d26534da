"""One optimiser step, in the official order of effects, without ever waiting for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..model import Matpac, Schedule
from ..nn.ema import local
from ..nn.statistics import Sums, added, summarise
from ..spans import span
from .config import TrainConfig
from .distributed import ALONE, Ranks, is_sharded


class Step(NamedTuple):
    """What one step measured, over all pieces and ranks, still on the device."""

    loss: Tensor
    loss_pred: Tensor
    loss_cls: Tensor
    grad_norm: Tensor  # before clipping
    bad: Tensor  # bool: loss or gradient not finite, so nothing was changed
    statistics: dict[str, Tensor] | None
    gram: Tensor | None  # of the teacher's latents, (D, D): `effective_rank` tells theirs


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> what the optimiser moves, in its order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(model: Matpac, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all that is trained; fused, on the CPU too, so that it clips and skips as it goes (see `train_step`).

    Of a model that FSDP has cut it moves this rank's shards, as the plain tensors that they are.

    Args:
        model: on its device already.
        config: its `lr`, `betas`, `eps` and `weight_decay`; the rate of each step is `learning_rate`'s.

    Returns:
        One group of parameters: all that require a gradient, so neither teachers nor positions.
    """
    trained = [nn.Parameter(local(p)) if is_sharded(p) else p for p in trained_parameters(model).values()]
    return torch.optim.AdamW(
        trained,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def train_step(
    model: Matpac,
    optimizer: torch.optim.AdamW,
    pieces: Sequence[tuple[Tensor, Tensor]],
    step: int,
    lr: float | Tensor,
    clip_norm: float,
    precision: str = "float32",
    statistics: bool = False,
    ranks: Ranks = ALONE,
    forward: nn.Module | None = None,
    schedule: Schedule | None = None,
) -> Step:
    """Forward, backward, teachers, clipping and optimiser for one batch.

    Args:
        pieces: (spec, ids_shuffle) of equal size: the batch, or this rank's part of it, in as many parts as its
            gradient is accumulated over.
        step: from 0; it sets temperatures and decays.
        precision: "bf16" runs the forward pass under autocast.
        statistics: measure those of the batch too.
        ranks, forward: where several processes share the batch: they, and the model as `distribute` wrapped it.
        schedule: temperatures and decays in place of those of `step`; as `lr` they may be tensors () on the device.

    Teachers and centre move once, by the weights from before the optimiser, as official; they move after the backward
    pass, so that a step whose loss or gradient is not finite leaves them, the weights and Adam's moments as they are.
    """
    forward = model if forward is None else forward
    losses, sums = [], {}
    for i, (spec, ids_shuffle) in enumerate(pieces):
        # DDP sums gradients over ranks in the last piece's backward pass; FSDP holds shards only, and does so in each.
        waits = i + 1 < len(pieces) and isinstance(forward, nn.parallel.DistributedDataParallel)
        with forward.no_sync() if waits else contextlib.nullcontext():  # pyright: ignore[reportCallIssue]
            with torch.autocast(spec.device.type, torch.bfloat16, enabled=precision == "bf16"):
                out = forward(spec, ids_shuffle, step=step, statistics=statistics, schedule=schedule)
            with span("backward"):
                (out.loss / len(pieces)).backward()
        losses.append(torch.stack([out.loss.detach(), out.loss_pred.detach().mean(), out.loss_cls.detach().mean()]))
        sums = added(sums, out.sums or {})
    loss = _over_ranks(model, torch.stack(losses).mean(0), sums, ranks)  # (3,)

    norm = _hand_gradients(model, optimizer, ranks)
    bad = ~(loss.isfinite().all() & norm.isfinite())
    with span("EMA"):
        model.update_teachers(step, bad, schedule)
    with span("clip and optimiser"):
        _optimise(optimizer, norm, bad, lr, clip_norm)
        optimizer.zero_grad(set_to_none=True)
    return Step(loss[0], loss[1], loss[2], norm, bad, summarise(sums) if sums else None, sums.get("gram"))


def _optimise(optimizer: torch.optim.AdamW, norm: Tensor, bad: Tensor, lr: float | Tensor, clip_norm: float) -> None:
    # The fused kernel divides the gradients as it reads them, which clips them, and does nothing where found_inf is 1.
    # It wants both in float32, whatever the model's own dtype is.
    scale = ((norm + 1e-6) / clip_norm).clamp(min=1.0)
    optimizer.grad_scale = scale.float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def _over_ranks(model: Matpac, loss: Tensor, sums: Sums, ranks: Ranks) -> Tensor:
    """Make the centre's sum and the statistics those of the whole batch, and return its losses."""
    if ranks.world == 1:
        return loss
    means = ranks.sum_(torch.cat([loss, model.center_sum])) / ranks.world
    model.center_sum.copy_(means[len(loss) :])
    if sums:
        together = ranks.sum_(torch.cat([value.flatten() for value in sums.values()]))
        parts = together.split([value.numel() for value in sums.values()])
        for (name, value), part in zip(list(sums.items()), parts, strict=True):
            sums[name] = part.view_as(value)
    return means[: len(loss)]


def _hand_gradients(model: Matpac, optimizer: torch.optim.AdamW, ranks: Ranks) -> Tensor:
    """Give the optimiser its shards of weights and gradients, where FSDP cut them; return the whole gradient's norm."""
    held = optimizer.param_groups[0]["params"]
    sharded = is_sharded(next(model.parameters()))  # then all are
    if sharded:
        for parameter, part in zip(trained_parameters(model).values(), held, strict=True):
            part.data = local(parameter)  # FSDP may have moved it
            part.grad = None if parameter.grad is None else local(parameter.grad)
            parameter.grad = None
    gradients = [part.grad for part in held if part.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return ranks.sum_(norm.square()).sqrt() if sharded else norm
