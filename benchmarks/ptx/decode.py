"""Instructions into what runs them on a Machine: operands, arithmetic, and all that is neither memory nor a product."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

import numpy as np

from . import access, products, tensor_memory
from .arithmetic import KINDS, operation
from .machine import Machine
from .memory import WARP, Fault, Threads
from .source import Instruction, Kernel

Action = Callable[[Machine, "Threads | None"], object]
Getter = Callable[[Machine, "Threads | None"], np.ndarray]


def decode(kernel: Kernel) -> list[Action | str]:
    return [_action(instruction, kernel) for instruction in kernel.instructions]


def _action(instruction: Instruction, kernel: Kernel) -> Action | str:
    name = instruction.opcode[0]
    if name == "bra":
        return "branch"
    if name in ("ret", "exit"):
        return "exit"
    if instruction.opcode[:2] in (("bar", "sync"), ("barrier", "sync")):
        return "barrier"
    try:
        for make in (access.action, products.action, tensor_memory.action, _moves, _across, _computes):
            if found := make(instruction, kernel):
                return _guarded(found, instruction)
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{instruction.text} cannot be run here: {error}") from error
    raise ValueError(f"{instruction.text} is not known here")


def _guarded(action: Action, instruction: Instruction) -> Action:
    """Looks, while products are under way, whether their registers are used."""
    if instruction.opcode[0] in ("wgmma", "tcgen05"):
        return action
    first, *others = instruction.operands or ("",)
    if first.startswith("["):  # an address, which is read
        first, others = "", instruction.operands
    written, read = (frozenset(re.findall(r"%\w+", text)) for text in (first, " ".join(others)))
    renames = instruction.opcode[0] == "mov"

    def guarded(machine: Machine, who: Threads | None) -> object:
        if (machine.pending.products or machine.pending.loads) and not (
            renames and machine.pending.rename(read, written)
        ):
            machine.pending.check_registers(written, read)
        return action(machine, who)

    return guarded


def getter(operand: str, kind: str, kernel: Kernel) -> Getter:
    """An operand's value as an array of numpy's type of `kind`, of one element for a constant."""
    dtype = KINDS[kind]
    if operand in kernel.registers:
        size = np.dtype(dtype).itemsize
        if kernel.registers[operand] < size:
            raise ValueError(f"{operand} is too narrow for {kind}")
        if kernel.registers[operand] > size:  # its lower part
            whole = getter(operand, f"u{8 * kernel.registers[operand]}", kernel)
            return lambda m, who: whole(m, who).astype(f"u{size}").view(dtype)
        return lambda m, who: (m.registers[operand] if who is None else m.registers[operand][who]).view(dtype)
    if operand.startswith("!") and operand[1:] in kernel.registers:
        plain = getter(operand[1:], kind, kernel)
        return lambda m, who: ~plain(m, who)
    if operand.startswith("%"):
        return lambda m, who: (m.special[operand] if who is None else m.special[operand][who]).astype(dtype)
    if operand == kernel.dynamic:
        return lambda m, who: np.array([m.dynamic], dtype)
    constant = np.array([_constant(operand, kind, kernel)], dtype)
    return lambda m, who: constant


def _constant(text: str, kind: str, kernel: Kernel) -> object:
    if text in kernel.shared:
        return kernel.shared[text]
    if text in kernel.params:
        return kernel.params[text][0]
    if found := re.match(r"0[fF]([0-9A-Fa-f]{8})$", text):
        value = struct.unpack("<f", bytes.fromhex(found[1])[::-1])[0]
        return value if kind[0] == "f" else struct.unpack("<I", struct.pack("<f", value))[0]
    if found := re.match(r"0[dD]([0-9A-Fa-f]{16})$", text):
        value = struct.unpack("<d", bytes.fromhex(found[1])[::-1])[0]
        return value if kind[0] == "f" else struct.unpack("<Q", struct.pack("<d", value))[0]
    number = int(text.removesuffix("U"), 0)
    if kind == "pred":
        return number != 0
    bits = 8 * np.dtype(KINDS[kind]).itemsize
    if kind[0] == "f":  # the bits of one
        return np.array([number & (1 << bits) - 1], f"u{bits // 8}").view(KINDS[kind])[0]
    number &= (1 << bits) - 1
    return number - (1 << bits) if kind[0] == "s" and number >> bits - 1 else number


def put(machine: Machine, register: str, who: Threads | None, value: np.ndarray) -> None:
    if register == "_":
        return
    to = machine.registers[register]
    if value.dtype.itemsize != to.itemsize:
        raise ValueError(f"{register} takes {to.itemsize} bytes, {value.dtype} came")
    to[slice(None) if who is None else who] = np.ascontiguousarray(value).view(to.dtype)


def _computes(instruction: Instruction, kernel: Kernel) -> Action | None:
    target, *operands = instruction.operands or ("",)
    found = operation(instruction.opcode, len(operands))
    if found is None:
        return None
    function, kinds, result = found
    values = [getter(operand, kind, kernel) for operand, kind in zip(operands, kinds, strict=True)]
    dtype = stored = np.dtype(KINDS[result])
    if dtype.kind in "iu" and dtype.itemsize < kernel.registers.get(target, 0):  # by its sign or with zeros
        stored = np.dtype(f"{dtype.kind}{kernel.registers[target]}")

    def compute(machine: Machine, who: Threads | None) -> None:
        with np.errstate(all="ignore"):
            value = np.asarray(function(*(value(machine, who) for value in values)))
        put(machine, target, who, value.astype(dtype, copy=False).astype(stored, copy=False))

    return compute


def _moves(instruction: Instruction, kernel: Kernel) -> Action | None:
    name, *rest = instruction.opcode
    if name == "cvta":
        rest = [rest[-1]]
    elif name != "mov":
        return None
    kind = rest[-1]
    target, source = instruction.operands
    if source.startswith("{"):  # parts, the lowest first
        parts = [part.strip() for part in source.strip("{}").split(",")]
        each = np.dtype(KINDS[kind]).itemsize // len(parts)
        values = [getter(part, f"b{8 * each}", kernel) for part in parts]

        def join(machine: Machine, who: Threads | None) -> None:
            columns = np.broadcast_arrays(*(value(machine, who) for value in values))
            put(machine, target, who, np.stack(columns, 1).reshape(-1).view(KINDS[kind]))

        return join
    value = getter(source, kind, kernel)
    if target.startswith("{"):
        names = [part.strip() for part in target.strip("{}").split(",")]
        each = np.dtype(KINDS[kind]).itemsize // len(names)

        def split(machine: Machine, who: Threads | None) -> None:
            columns = np.ascontiguousarray(value(machine, who)).view(KINDS[f"b{8 * each}"]).reshape(-1, len(names))
            for i, name in enumerate(names):
                put(machine, name, who, columns[:, i].copy())

        return split
    return lambda machine, who: put(machine, target, who, value(machine, who))


def _across(instruction: Instruction, kernel: Kernel) -> Action | None:
    """What the lanes of a warp tell each other."""
    if instruction.opcode == ("nop",):
        return lambda machine, who: None
    if instruction.opcode[:2] == ("bar", "warp"):

        def meet(machine: Machine, who: Threads | None) -> None:
            whole_warps(machine, who)
            machine.clock.warp_barriers[slice(None) if who is None else who] += 1

        return meet
    if instruction.opcode[:2] == ("shfl", "sync"):
        mode = instruction.opcode[2]
        target, *operands = instruction.operands
        target, _, inside = target.partition("|")  # a predicate: whether the other lane is in the warp
        value, other, clamp, mask = (getter(operand, "b32", kernel) for operand in operands)

        def shuffle(machine: Machine, who: Threads | None) -> None:
            warps = whole_warps(machine, who)
            lane = np.arange(WARP)
            by = np.broadcast_to(other(machine, who).astype(np.int64), warps.size).reshape(warps.shape)
            if (np.broadcast_to(clamp(machine, who), warps.size) & 0x1F1F != (0 if mode == "up" else 31)).any():
                raise Fault("a shuffle within a part of a warp is not known here")
            if (mask(machine, who) != 0xFFFFFFFF).any():
                raise Fault("a shuffle without some lanes is not known here")
            source = {"bfly": lane ^ by, "idx": by, "down": lane + by, "up": lane - by}[mode]
            within = (source >= 0) & (source < WARP)
            source = np.where(within, source, lane)
            values = np.broadcast_to(value(machine, who), warps.size).reshape(warps.shape)
            put(machine, target, who, np.take_along_axis(values, source, 1).reshape(-1))
            if inside:
                put(machine, inside, who, np.broadcast_to(within, warps.shape).reshape(-1).copy())

        return shuffle
    if instruction.opcode[:2] == ("redux", "sync"):
        operator, kind = instruction.opcode[2:]
        target, operand, _ = instruction.operands
        value = getter(operand, kind, kernel)
        ufuncs = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
        reduce = ufuncs[operator].reduce

        def over_warp(machine: Machine, who: Threads | None) -> None:
            warps = whole_warps(machine, who)
            values = np.broadcast_to(value(machine, who), warps.size).reshape(warps.shape)
            total = reduce(values, axis=1, keepdims=True, dtype=values.dtype)
            put(machine, target, who, np.broadcast_to(total, warps.shape).reshape(-1).copy())

        return over_warp
    return None


def whole_warps(machine: Machine, who: Threads | None) -> np.ndarray:
    """The threads, a row a warp; a Fault where a warp is not all there."""
    those = machine.those(who)
    rows = those.reshape(-1, WARP) if those.size % WARP == 0 else those[:0].reshape(0, WARP)
    if not rows.size or (rows != rows[:, :1] // WARP * WARP + np.arange(WARP)).any():
        raise Fault("not all lanes of a warp come here together")
    return rows
