"""Compile Triton kernels ahead of time, for a GPU that need not be here, and read what they cost.

Every kernel module lists its launch configurations as `AOT: list[Launch]`; tests/test_compile_ahead.py compiles them
for each supported architecture and bounds registers, shared memory and spills.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from ._sass import overwritten_factors, unwritten_reads

# Shared memory that one block may have, in bytes, by compute capability (CUDA programming guide, table of limits).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
TENSOR_LIMIT = 512  # columns of tensor memory on Blackwell's data-centre GPUs; a kernel that takes more does not launch
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


@dataclass(frozen=True)
class Cost:
    """Read off a compiled kernel: registers a thread, bytes of stack a thread (spills), bytes of shared memory, columns
    of tensor memory, and on Hopper the instructions that ptxas got wrong (see _sass.py): those that read a register
    which nothing has written, and those that overwrite one which a product still reads."""

    registers: int
    spills: int
    shared: int
    tensor: int
    unwritten: list[str]
    overwritten: list[str]


def compiled_ahead(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel for compute capability `capability` (90 is sm_90); no GPU or driver needed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as triton_compile

    return triton_compile(
        _source(launch),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )


def compile_ahead(launch: Launch, capability: int) -> Cost:
    """What the compiled kernel costs."""
    compiled = compiled_ahead(launch, capability)
    cubin = compiled.asm["cubin"]
    # Running `ptxas -v` again would not do: Triton chooses among several ptxas and adds flags of its own.
    usage = re.findall(r"\b([A-Z]+):(\d+)", _told("cuobjdump", "--dump-resource-usage", cubin))
    used = {name: int(value) for name, value in usage}
    listing = _told("nvdisasm", "-c", cubin) if capability == 90 else ""
    wrong = (unwritten_reads(listing), overwritten_factors(listing)) if listing else ([], [])
    tensor = getattr(compiled.metadata, "tmem_size", 0)  # from Triton 3.3 on
    return Cost(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, tensor, *wrong)


def _source(launch: Launch) -> Any:
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    # A list of launches may share one dictionary of constants; each kernel takes those it has.
    constexprs = {name: value for name, value in launch.constexprs.items() if name in names}
    types = {name: launch.signature[name] for name in names if name not in constexprs}
    divisible = [
        position
        for position, name in enumerate(names)
        if name in types and (name not in launch.unaligned if types[name].startswith("*") else name in launch.divisible)
    ]
    try:
        # Up to Triton 3.2, torch 2.6.
        from triton.backends.compiler import AttrsDescriptor  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        signature = {name: types.get(name, "constexpr") for name in names}
        attrs = {(position,): [["tt.divisibility", 16]] for position in divisible}
        return ASTSource(launch.kernel, signature, constexprs, attrs)
    attrs = {"cls": "AttrsDescriptor", "arg_properties": {"tt.divisibility": divisible}}
    return ASTSource(launch.kernel, types, constexprs, AttrsDescriptor.from_dict(attrs))


def _told(tool: str, option: str, cubin: bytes) -> str:
    """What a tool that Triton bundles says of machine code: the very binary a GPU would run."""
    import triton.backends

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(Path(triton.backends.__file__).parent / "nvidia" / "bin" / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
