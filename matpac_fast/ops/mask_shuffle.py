"""mask_shuffle: which patches are visible, as a pure function of (seed, step, index)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backend import choose, device_guard
from ._check import check_int, check_tensor
from ._once import implement


def _check(seed: int, step: int, index: Tensor, n_tokens: int) -> None:
    check_tensor("mask_shuffle", "index", index, ndim=1, dtypes=(torch.int64,))
    for name, value in (("seed", seed), ("step", step), ("n_tokens", n_tokens)):
        check_int("mask_shuffle", name, value)
    if n_tokens < 1:
        raise ValueError(f"mask_shuffle: n_tokens is {n_tokens}; expected at least 1")


def _splitmix64(x: int) -> int:
    """reference.splitmix64 of a Python integer."""
    wrap = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & wrap
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
    return x ^ (x >> 31)


def _base(seed: int, step: int) -> int:
    """The part of a sample's hash that the whole batch shares."""
    return reference.wrap_int64(_splitmix64(_splitmix64(seed) ^ (step & ((1 << 64) - 1))))


def _launch_cpp(base: int, index: Tensor, n_tokens: int) -> Tensor:
    from .. import _C

    out = index.new_empty((index.shape[0], n_tokens))
    _C.mask_shuffle_cpu(base, index.data_ptr(), index.shape[0], n_tokens, out.data_ptr(), torch.get_num_threads())
    return out


def _launch_triton(base: int, index: Tensor, n_tokens: int) -> Tensor:
    from ..kernels.mask_shuffle import mask_shuffle

    with device_guard(index):
        return mask_shuffle(base, index, n_tokens)


_LAUNCHERS = {"cpp": _launch_cpp, "triton": _launch_triton}


def _impl(seed: int, step: int, index: Tensor, n_tokens: int) -> Tensor:
    launcher = choose("mask_shuffle", index.device)
    if launcher == "reference":
        return reference.mask_shuffle(seed, step, index, n_tokens)
    return _LAUNCHERS[launcher](_base(seed, step), index.contiguous(), n_tokens)


def _fake(seed: int, step: int, index: Tensor, n_tokens: int) -> Tensor:
    return index.new_empty((index.shape[0], n_tokens))


_LIB = torch.library.Library("matpac_fast", "FRAGMENT")
# SymInt, so that a compiled step is not compiled again for the next `step`.
_LIB.define("mask_shuffle(SymInt seed, SymInt step, Tensor index, SymInt n_tokens) -> Tensor")
implement(_LIB, "mask_shuffle", _impl, _fake)


def mask_shuffle(seed: int, step: int, index: Tensor, n_tokens: int) -> Tensor:
    """Random permutations of the tokens of each sample, a pure function of (seed, step, index).

    The first columns name the visible tokens of the sample, the others the masked ones. Counter-based: the same bits
    on every device, with any number of workers or ranks, and after resuming; `reference.mask_shuffle` defines them.
    It takes the place of the official code's argsort of uniform noise (2502.12031, section on masking).

    Args:
        seed: of the run; any integer, counted modulo 2**64.
        step: of the optimiser; any integer, counted modulo 2**64. In a CUDA graph it is a constant: draw the shuffle
            outside and copy it in.
        index: (B,) int64, the sample's number within the global batch. Any strides.
        n_tokens: the number of tokens N, at least 1.

    Returns:
        (B, N) int64, each row a permutation of 0..N-1, contiguous. No gradient.

    Raises:
        TypeError: `index` is no int64 tensor; `seed`, `step` or `n_tokens` is no integer.
        ValueError: `index` is not (B,); `n_tokens` is less than 1.
    """
    _check(seed, step, index, n_tokens)
    if choose("mask_shuffle", index.device) == "reference":
        return reference.mask_shuffle(seed, step, index, n_tokens)
    wrap = reference.wrap_int64
    return torch.ops.matpac_fast.mask_shuffle(wrap(seed), wrap(step), index, n_tokens)
