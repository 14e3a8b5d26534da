"""Checks that the ops share. Every message names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What an op of real numbers takes.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shape_of(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def check_tensor(
    op: str,
    name: str,
    tensor: object,
    ndim: int | None = None,
    dtypes: Sequence[torch.dtype] = (),
    like: Tensor | None = None,
) -> None:
    """Raise TypeError or ValueError unless `tensor` has `ndim` dimensions, one of `dtypes` and the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} is a {type(tensor).__name__}; expected a torch.Tensor")
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"{op}: {name} is {shape_of(tensor)}; expected {ndim} dimensions")
    if dtypes and tensor.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: {name} is {shape_of(tensor)}; expected one of {names}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the other arguments on {like.device}; move it there")


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raise ValueError unless `tensor` has `shape`; `why` says where the expected shape comes from."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} is {shape_of(tensor)}; expected {shape} ({why})")


def check_int(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a Python integer (or one that torch.compile traces)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; expected a Python int, such as int({name})")
