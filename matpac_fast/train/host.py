"""Copies of what a GPU holds in the host's memory, for which training waits as shortly as the bus allows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNED = 64  # bytes


def copies_on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each in host memory; from a GPU all of them behind one wait, into memory that it reaches by itself.

    Into other memory the driver copies through a small buffer of its own, at a fraction of the bus's rate, and waits
    for each tensor; a checkpoint of `base` is 1,197 of them.
    """
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    if device is None:
        return [tensor.to("cpu", copy=True) for tensor in tensors]
    # One block: torch keeps such memory for the next time, each block as large as the next power of two.
    try:
        block = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError:  # the system gives no more of it: slower, but no reason to end a run
        return [tensor.to("cpu", copy=True) for tensor in tensors]
    copies = places_for(tensors, block)
    for tensor, place in zip(tensors, copies, strict=True):
        place.copy_(tensor, non_blocking=True)
    torch.cuda.synchronize(device)
    return copies


def places_for(tensors: Sequence[Tensor], block: Tensor) -> list[Tensor]:
    """Parts of `block`, bytes, each of the shape and dtype of a tensor, contiguous and aligned."""
    parts = block.split([_room(tensor) for tensor in tensors])
    pairs = zip(tensors, parts, strict=True)
    return [part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape) for tensor, part in pairs]


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED
