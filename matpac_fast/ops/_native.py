"""What the ops hand to the native functions: numbers of dtypes, and addresses."""

from __future__ import annotations

import torch
from torch import Tensor

# As csrc/ops.h numbers them.
DTYPE = {torch.float32: 0, torch.float64: 1, torch.int16: 2, torch.bfloat16: 3, torch.float16: 4}


def address(tensor: Tensor | None) -> int:
    """Of the first number; 0 stands for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()
