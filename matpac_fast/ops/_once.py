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


class _UnpackedOnce:
    """The context of a backward, whose saved tensors a hook of the user's, such as checkpointing's, gives but once."""

    def __init__(self, ctx: Any):
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """For the backward of an autograd.Function, as torch's decorator of that name.

    That one refuses a second derivative only where the incoming gradient requires one. Behind `loss.sum()` it requires
    none, and torch would leave out without a word how the gradient depends on the op's own inputs.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        ctx = _UnpackedOnce(ctx)
        with torch.no_grad():
            found = backward(ctx, *grads)
        # What the gradient depends on goes through too: a search for a path to it, as torch.autograd.grad and
        # backward(inputs=...) make, would else find none and leave the refusal out with the derivative.
        given = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        refuse = torch._C._functions.DelayedError(_MESSAGE, len(found) + len(given))  # type: ignore[attr-defined]
        return refuse(*(None if grad is None else grad.detach().requires_grad_() for grad in found), *given)[
            : len(found)
        ]

    return once


def implement(lib: torch.library.Library, op: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Let `function` compute `matpac_fast::op` on CPU and GPU, and `fake` say what tensors come of it."""
    for device in ("CPU", "CUDA"):
        lib.impl(op, function, device)
    torch.library.register_fake(f"matpac_fast::{op}", fake, lib=lib)


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
