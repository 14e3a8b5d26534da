"""What each architecture launches: every kernel module lists its launches as `AOT: list[Launch]`.

benchmarks/compile_ahead.py compiles them for a GPU that need not be here, and tests/test_compile_ahead.py bounds their
registers, shared memory and spills.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# Shared memory that one block may have, in bytes, by compute capability (CUDA programming guide, table of limits).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
CAPABILITIES = tuple(SHARED_LIMIT)


def capability_of(tensor: Tensor) -> int:
    """90 for sm_90; 0 for a tensor on the CPU, where Triton interprets."""
    if not tensor.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def is_data_centre(capability: int) -> bool:
    """Hopper, or Blackwell of its kind: products come out of shared memory, of which a block has 227 KiB."""
    return 90 <= capability < 120


@functools.cache
def _copies_are_fenced() -> bool:
    import triton

    return TorchVersion(triton.__version__) >= "3.7.1"


def stages(number: int, capability: int) -> int:
    """`number`, or 1 where a product would read what asynchronous copies brought to shared memory, without a fence: by
    Triton before 3.7.1, on Hopper and Blackwell of its kind. With one stage nothing is copied asynchronously.

    Source: https://github.com/triton-lang/triton/pull/10537; benchmarks/ptx finds it.
    """
    return number if _copies_are_fenced() or not is_data_centre(capability) else 1


def by_options(options_of: Callable[[int], Mapping[str, Any]]) -> list[tuple[dict[str, Any], tuple[int, ...]]]:
    """What a kernel is launched with, each with the architectures that launch it so."""
    found: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for capability in CAPABILITIES:
        found.setdefault(tuple(options_of(capability).items()), []).append(capability)
    return [(dict(options), tuple(capabilities)) for options, capabilities in found.items()]


@dataclass(frozen=True)
class Launch:
    """One launch configuration of a Triton kernel: what its launcher would pass, without the tensors.

    Attributes:
        name: for the table, such as "masked_patch_embed_fwd float32".
        kernel: the `@triton.jit` function.
        signature: Triton type by name of every argument that is no constexpr, e.g. {"x": "*fp32", "n": "i32"}.
        constexprs: value by name of every constexpr; a pointer that the launcher passes as None belongs here too.
        num_warps, num_stages: as launched.
        divisible: names of the integer arguments that are multiples of 16 in this launch.
        unaligned: names of the pointers that are no multiples of 16 bytes; torch allocates them aligned.
        capabilities: the architectures that launch this configuration.
        max_registers: the most registers a thread may take; fewer leave room for more blocks on a multiprocessor.
        max_spills: the most bytes a thread may spill, with a reason.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    capabilities: tuple[int, ...] = CAPABILITIES
    max_registers: int = 255
    max_spills: int = 0
