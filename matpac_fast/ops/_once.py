"""Gradients written by hand are right once: a second derivative through them is refused, and never silently wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MESSAGE = (
    b"the gradient of this op of matpac_fast was taken with create_graph and is once differentiable; "
    b"for second derivatives compute under matpac_fast.use_backend('reference')"
)


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """For the backward of an autograd.Function, as torch's decorator of that name.

    That one refuses a second derivative only where the incoming gradient requires one. Behind `loss.sum()` it requires
    none, and torch would leave out without a word how the gradient depends on the op's own inputs.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        refuse = torch._C._functions.DelayedError(_MESSAGE, len(found))  # type: ignore[attr-defined]
        return refuse(*(None if grad is None else grad.detach().requires_grad_() for grad in found))

    return once


def under_autograd(
    lib: torch.library.Library,
    op: str,
    function: type[torch.autograd.Function],
    differentiated: Callable[..., bool] = lambda *args: torch.is_grad_enabled(),
) -> None:
    """Let `function` differentiate `matpac_fast::op`. Where `differentiated`, of the op's arguments, is false the call
    goes past it, for it takes the host twice as long as a dispatch."""
    overload = getattr(torch.ops.matpac_fast, op).default

    def autograd(*args: Any) -> Any:
        if differentiated(*args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    lib.impl(op, autograd, "Autograd")
