"""Triton's kernels on the CPU's tensors: compiled for a GPU as a launch on it would compile them, then run from PTX."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
import struct
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from compile_ahead import compiled_ahead
from torch import Tensor
from triton.runtime.jit import JITFunction

from matpac_fast import kernels
from matpac_fast.kernels._aot import Launch

from .decode import decode
from .machine import run
from .memory import Global
from .report import Report
from .source import parse

TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
FORMATS = {"i32": "<i", "i64": "<q", "fp32": "<f"}
OPTIONS = ("num_warps", "num_stages")


@contextlib.contextmanager
def emulated(capability: int, on_report: Callable[[Report], object] | None = None, **how: Any) -> Iterator[None]:
    """While it lasts, `kernel[grid](...)` on tensors of the CPU runs for compute capability `capability` (90 is sm_90),
    and the launchers in matpac_fast.kernels choose their options for it.

    Args:
        on_report: gets the traffic of each launch.
        how: further arguments of `machine.run`.
    """

    def launch(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        bound = inspect.signature(self.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        if callable(grid):
            grid = grid(bound.arguments)
        x, y, z = (*grid, 1, 1)[:3]
        _launch(self, bound.arguments, (x, y, z), options, capability, on_report, how)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        for found in pkgutil.iter_modules(kernels.__path__):
            if not found.name.startswith("_"):
                module = importlib.import_module(f"{kernels.__name__}.{found.name}")
                if hasattr(module, "capability_of"):
                    stack.enter_context(mock.patch.object(module, "capability_of", return_value=capability))
        yield


def _launch(
    kernel: JITFunction,
    arguments: dict[str, Any],
    grid: tuple[int, int, int],
    options: dict[str, int],
    capability: int,
    on_report: Callable[[Report], object] | None,
    how: dict[str, Any],
) -> None:
    """Arguments become types and constants as Triton's own launcher makes them."""
    memory = Global()
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible, unaligned, params = [], [], b""

    def pass_on(form: str, value: Any) -> None:
        nonlocal params
        params += bytes(-len(params) % struct.calcsize(form)) + struct.pack(form, value)

    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = f"*{TYPES[value.dtype]}"
            storage = value.untyped_storage()
            memory.add(storage.data_ptr(), storage.nbytes(), storage)
            if value.data_ptr() % 16:
                unaligned.append(name)
            pass_on("<Q", value.data_ptr())
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"
            if special and isinstance(value, int) and value % 16 == 0:
                divisible.append(name)
            pass_on(FORMATS[types[name]], value)
    key = (tuple(types.items()), tuple(constants.items()), tuple(divisible), tuple(unaligned), tuple(options.items()))
    parsed, code, shared, warps = _compiled(kernel, key, capability)
    params += bytes(parsed.param_bytes - len(params))  # Triton's own, for memory that no kernel here asks for
    report = Report(parsed, grid[0] * grid[1] * grid[2]) if on_report else None
    run(code, parsed, params, grid, 32 * warps, shared, memory, report=report, **how)
    if on_report and report:
        on_report(report)


@functools.cache
def _compiled(kernel: JITFunction, key: tuple, capability: int) -> tuple[Any, ...]:
    types, constants, divisible, unaligned, options = key
    launch = Launch("", kernel, dict(types), dict(constants), divisible=divisible, unaligned=unaligned, **dict(options))
    compiled = compiled_ahead(launch, capability)
    (parsed,) = parse(compiled.asm["ptx"]).values()
    return parsed, decode(parsed), compiled.metadata.shared, compiled.metadata.num_warps
