"""Products of 16-bit matrices with a float32 result, which is then rounded once less."""

from __future__ import annotations

import torch
from torch import Tensor

_TAKES_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()  # from torch 2.8 on


def widens(tensor: Tensor) -> bool:
    """Whether torch multiplies 16-bit matrices there, on a GPU, into float32."""
    return tensor.is_cuda and _TAKES_DTYPE


def mm(a: Tensor, b: Tensor, work: torch.dtype, out: Tensor | None = None) -> Tensor:
    """a @ b in `work`; `out` is where the result may go."""
    return torch.mm(a, b, out=out) if a.dtype == work else torch.mm(a, b, out_dtype=work, out=out)
