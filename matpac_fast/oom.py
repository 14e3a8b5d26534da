"""Telling that memory ran out from every other error."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was no memory, on a GPU or on the CPU, whose allocator has no exception of its own."""
    # What torch says of the CPU's memory; the CUDA runtime and Triton, as when a kernel is loaded while none is left;
    # cuBLAS, cuDNN and cuFFT.
    told = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    # oneDNN, which has no room for a kernel's code: these words alone. With "descriptor for ..." behind them they are
    # of a product that it cannot do.
    whole = "could not create a primitive"
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and (str(error) == whole or any(words in str(error) for words in told))
    )
