"""What is done to a batch of crops before it is trained on: a function of the user's."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from .watch import TrainingError


class Transform(Protocol):
    """Changes a batch of crops on the CPU, in the thread that reads ahead; called by position, once a step and process.

    Args:
        crops: (B, S) int16, 32768 = full scale: this process's part of the batch. May be changed in place.
        index: (B,) int64, the crop's number within the batch of all processes.
        step: of the optimiser, from 0.

    Returns:
        (B, S) int16 on the CPU.

    It has to be a function of these three, or the run depends on the number of processes and on where it was
    interrupted: a step that is done again asks again. So draw from a generator of the step, for the whole batch, and
    take what belongs to `index`. Crops of one batch must not be mixed with each other, for another process may hold the
    other one: mix in what you read yourself.

    A random gain of -6 to 6 dB, in batches of 256 (another seed than 0 draws other gains):

        def gain(crops, index, step, seed=0, batch_size=256):
            generator = torch.Generator().manual_seed(1_000_000 * seed + step)
            db = (12 * torch.rand(batch_size, generator=generator) - 6)[index]  # (B,)
            wave = crops * 10 ** (db[:, None] / 20)
            return wave.round().clamp(-32768, 32767).to(torch.int16)
    """

    def __call__(self, crops: Tensor, index: Tensor, step: int, /) -> Tensor: ...


def transform_name(transform: Transform | None) -> str | None:
    """The qualified name of a function or of an object's class, without arguments that functools.partial binds.

    Without the module, which is another one where a file is run than where it is imported.
    """
    if transform is None:
        return None
    if not callable(transform):
        raise ConfigError(f"transform is {transform!r}; expected a function of (crops, index, step), or None")
    inner = transform.func if isinstance(transform, functools.partial) else transform
    return getattr(inner, "__qualname__", type(inner).__qualname__)


def transform_crops(transform: Transform, crops: Tensor, index: Tensor, step: int) -> None:
    """Put what `transform` makes of `crops` in their place.

    Raises:
        TrainingError: it failed, or what it returned is no such tensor.
    """
    name, shape = transform_name(transform), tuple(crops.shape)
    try:
        out = transform(crops, index, step)
    except Exception as error:  # a StopIteration would pass for the end of the run, its memory for that of the step
        raise TrainingError(f"transform {name} failed at step {step}: {type(error).__name__}: {error}") from error
    if not isinstance(out, Tensor):
        raise TrainingError(
            f"transform {name} returned {type(out).__name__} at step {step}; expected the crops, int16 {shape} on cpu"
        )
    if (out.dtype, tuple(out.shape), out.device) != (torch.int16, shape, torch.device("cpu")):
        dtype = str(out.dtype).removeprefix("torch.")
        raise TrainingError(
            f"transform {name} returned {dtype} {tuple(out.shape)} on {out.device} at step {step}; "
            f"expected int16 {shape} on cpu: round and clamp to -32768..32767 before .to(torch.int16)"
        )
    if out is not crops:  # which may lie in pinned memory, and must not change with what the transform keeps
        crops.copy_(out)
