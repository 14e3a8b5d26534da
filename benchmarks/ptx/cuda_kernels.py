"""csrc/cuda on the CPU's tensors: its host code on a runtime that hands over launches, its kernels from nvcc's PTX."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .decode import decode
from .machine import run
from .memory import Global
from .report import Report
from .source import Kernel, parse

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ON_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, *4 * [ctypes.c_uint], ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
)
FLAGS = {"log_mel": ["-fmad=false"], "prototype_loss": []}  # as CMakeLists.txt has them


class CudaKernels:
    """The functions of csrc/cuda, compiled into `folder` for compute capability `capability`, of a GPU with
    `processors` multiprocessors.

    Raises:
        FileNotFoundError: nvcc is not on the PATH.
    """

    def __init__(self, folder: Path, capability: int = 90, processors: int = 1):
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise FileNotFoundError("nvcc is not on the PATH: install CUDA's toolkit, or put its bin folder there")
        arch = f"-gencode=arch=compute_{capability},code=compute_{capability}"
        common = [nvcc, "-std=c++17", "-Xcompiler", "-fPIC", "-lineinfo", f"-I{CSRC}", arch]
        kept = folder / "kept"
        kept.mkdir(parents=True, exist_ok=True)
        objects = []
        self.kernels: dict[str, list[Kernel]] = {}  # of each file of csrc/cuda
        for name, flags in FLAGS.items():
            objects.append(str(folder / f"{name}.o"))
            source = str(CSRC / "cuda" / f"{name}.cu")
            keep = ["--keep", f"--keep-dir={kept}"]
            subprocess.run([*common, *flags, *keep, "-c", source, "-o", objects[-1]], check=True)
            self.kernels[name] = list(parse((kept / f"{name}.ptx").read_text()).values())
        library = folder / "kernels.so"
        runtime = str(HERE / "runtime.cpp")
        # A torch built with CUDA lends its runtime's names to all that is loaded later: here these are ours.
        link = ["-shared", "-cudart", "none", "-Xlinker", "-Bsymbolic"]
        subprocess.run([*common, *link, runtime, *objects, "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        self._processors = processors
        self._decoded: dict[str, tuple[Kernel, list]] = {}

    def __call__(
        self,
        function: str,
        args: Sequence[int | float],
        tensors: Sequence[Tensor],
        on_report: Callable[[Report], object] | None = None,
        **how: Any,
    ) -> None:
        """Calls `log_mel`, `prototype_loss_forward` or `prototype_loss_delta` with its positional arguments.

        Args:
            tensors: all that the kernels may touch.
            on_report: gets the traffic of each launch.
            how: further arguments of `machine.run`.

        Raises:
            Fault: what a GPU would answer with a fault or with chance.
            RuntimeError: the function's own complaint.
        """
        memory, failures = Global(), []
        for tensor in tensors:
            memory.add(tensor.data_ptr(), tensor.untyped_storage().nbytes(), tensor)

        def launch(name: bytes, x: int, y: int, z: int, threads: int, shared: int, args: Any) -> None:
            if failures:  # no exception passes C++: the first is kept for the end, and no kernel is run after it
                return
            try:
                kernel, code = self._find(name.decode())
                params = bytearray(kernel.param_bytes)
                for i, (offset, size) in enumerate(kernel.params.values()):
                    params[offset : offset + size] = ctypes.string_at(args[i], size)
                report = Report(kernel, x * y * z) if on_report else None
                run(code, kernel, bytes(params), (x, y, z), threads, shared, memory, report=report, **how)
                if on_report and report:
                    on_report(report)
            except Exception as error:
                failures.append(error)

        on_launch = ON_LAUNCH(launch)
        self._library.set_launches(on_launch, self._processors)
        called = getattr(self._library, function)
        called.restype = ctypes.c_char_p
        complaint = called(*(ctypes.c_double(a) if isinstance(a, float) else ctypes.c_int64(a) for a in args))
        if failures:
            raise failures[0]
        if complaint is not None:
            raise RuntimeError(complaint.decode())

    def _find(self, name: str) -> tuple[Kernel, list]:
        if name not in self._decoded:
            kernel = next(kernel for kernels in self.kernels.values() for kernel in kernels if kernel.name == name)
            self._decoded[name] = kernel, decode(kernel)
        return self._decoded[name]

    def without_barriers(self, file: str) -> list[CudaKernels]:
        """The same with the first barrier of every kernel of a file taken out, the same with the second, and so on."""
        found = []
        for number in range(max(len(_barriers(kernel)) for kernel in self.kernels[file])):
            other = copy.copy(self)
            other._decoded = {}
            changed = [_without(kernel, _barriers(kernel)[number : number + 1]) for kernel in self.kernels[file]]
            other.kernels = {**self.kernels, file: changed}
            found.append(other)
        return found


def _barriers(kernel: Kernel) -> list[int]:
    return [i for i, instruction in enumerate(kernel.instructions) if instruction.opcode[:2] == ("bar", "sync")]


def _without(kernel: Kernel, numbers: list[int]) -> Kernel:
    """Nothing comes in an instruction's place, so that labels stay right."""
    instructions = list(kernel.instructions)
    for number in numbers:
        instructions[number] = dataclasses.replace(instructions[number], opcode=("nop",), operands=())
    return dataclasses.replace(kernel, instructions=instructions)
