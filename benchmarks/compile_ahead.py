"""Compile Triton kernels ahead of time, for a GPU that need not be here, and read what they cost."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sass import overwritten_factors, unwritten_reads

from matpac_fast.kernels._aot import Launch

TENSOR_LIMIT = 512  # columns of tensor memory on Blackwell's data-centre GPUs; a kernel that takes more does not launch


@dataclass(frozen=True)
class Cost:
    """Read off a compiled kernel: registers a thread, bytes of stack a thread (spills), bytes of shared memory, columns
    of tensor memory, and on Hopper the instructions that ptxas got wrong (see sass.py): those that read a register
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
