"""One optimiser step, in the official order of effects, without ever waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import Matpac
from .config import TrainConfig


class Step(NamedTuple):
    """What one step measured, still on the device."""

    loss: Tensor
    loss_pred: Tensor
    loss_cls: Tensor
    grad_norm: Tensor  # before clipping
    bad: Tensor  # bool: loss or gradient not finite, so nothing was changed
    statistics: dict[str, Tensor] | None


def make_optimizer(model: Matpac, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over all that is trained. Fused, on the CPU too: there it takes a seventh of the time of `foreach`."""
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(
        trained, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def train_step(
    model: Matpac,
    optimizer: torch.optim.AdamW,
    pieces: Sequence[tuple[Tensor, Tensor]],
    step: int,
    lr: float,
    clip_norm: float,
    precision: str = "float32",
    statistics: bool = False,
) -> Step:
    """Forward, backward, teachers, clipping and optimiser for one batch.

    Args:
        pieces: (spec, ids_shuffle) of equal size: the batch, in as many parts as its gradient is accumulated over.
        step: from 0; it sets temperatures and decays.
        precision: "bf16" runs the forward pass under autocast.
        statistics: measure those of the last piece too.

    Teachers and centre move once, by the weights from before the optimiser, as official; they move after the backward
    pass, so that a step whose loss or gradient is not finite leaves them, the weights and Adam's moments as they are.
    """
    losses, found = [], None
    for spec, ids_shuffle in pieces:
        with torch.autocast(spec.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = model(spec, ids_shuffle, step=step, statistics=statistics)
        (out.loss / len(pieces)).backward()
        losses.append(torch.stack([out.loss.detach(), out.loss_pred.detach().mean(), out.loss_cls.detach().mean()]))
        found = out.statistics
    loss = torch.stack(losses).mean(0)  # (3,)

    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    bad = ~(loss.isfinite().all() & norm.isfinite())
    model.update_teachers(step, skip=bad)
    # The fused kernel divides the gradients as it reads them, which clips them, and does nothing where found_inf is 1.
    optimizer.grad_scale = ((norm + 1e-6) / clip_norm).clamp(min=1.0)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue]
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(loss[0], loss[1], loss[2], norm, bad, found)
