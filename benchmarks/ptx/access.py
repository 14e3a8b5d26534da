"""Loads, stores and asynchronous copies."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import decode
from .arithmetic import KINDS
from .machine import Machine
from .memory import WARP, Fault, Threads, granules, sectors, wavefronts
from .source import Instruction, Kernel

Action = Callable[[Machine, "Threads | None"], object]
RACE = "another thread of the launch touches the same bytes, and no barrier lies between"


def action(instruction: Instruction, kernel: Kernel) -> Action | None:
    name, *rest = instruction.opcode
    if name in ("ld", "st"):
        kind = rest[-1]
        spaces = [each for each in ("param", "shared", "global") if each in rest]
        known = {"param", "shared", "global", "v2", "v4", "volatile", "nc", "L1", "evict_last", "evict_first", kind}
        if len(spaces) != 1 or set(rest) - known:
            raise ValueError(f"{'.'.join(instruction.opcode)} is not known here")
        first, second = instruction.operands if name == "ld" else reversed(instruction.operands)
        registers = [part.strip() for part in first.strip("{} ").split(",")]
        where = address(second, kernel)
        if name == "ld":
            load = {"param": _load_param, "shared": _load_shared, "global": _load_global}[spaces[0]]
            return lambda machine, who: _into(machine, who, registers, load(machine, who, where, kind, len(registers)))
        values = [decode.getter(register, kind, kernel) for register in registers]
        store = {"shared": _store_shared, "global": _store_global}[spaces[0]]
        return lambda machine, who: store(machine, who, where, kind, [value(machine, who) for value in values])
    if name == "cp":
        return _copy(instruction, kernel)
    if name == "fence" and rest[:2] == ["proxy", "async"]:
        return _fence
    if name in ("membar", "fence"):
        raise ValueError("fences of memory are not known here")
    return None


def address(operand: str, kernel: Kernel) -> Callable[[Machine, Threads | None], np.ndarray]:
    """The place that `[%rd1+16]` names, for every thread."""
    base, sign, offset = re.match(r"\[\s*([%\w$]+)\s*(?:([+-])\s*(-?\d+)\s*)?\]$", operand).groups()  # pyright: ignore
    more = int(offset or 0) * (-1 if sign == "-" else 1)
    wide = kernel.registers.get(base) == 8
    value = decode.getter(base, "s64" if wide else "u32", kernel)

    def of(machine: Machine, who: Threads | None) -> np.ndarray:
        found = value(machine, who).astype(np.int64) + more
        return np.broadcast_to(found, machine.size if who is None else who.size)

    return of


def _into(machine: Machine, who: Threads | None, registers: list[str], values: list[np.ndarray]) -> None:
    for register, value in zip(registers, values, strict=True):
        if register != "_" and machine.registers[register].itemsize > value.itemsize:  # extended as its type is signed
            value = value.astype(f"{value.dtype.kind}{machine.registers[register].itemsize}")
        decode.put(machine, register, who, value)


def _load_param(machine: Machine, who: Threads | None, where, kind: str, count: int) -> list[np.ndarray]:
    dtype = np.dtype(KINDS[kind])
    start = where(machine, who)
    flat = machine.params
    if (start % dtype.itemsize).any() or (start + count * dtype.itemsize > flat.size).any():
        raise Fault("no parameter is there")
    values = flat[start[:, None] + np.arange(count * dtype.itemsize)]
    return list(np.ascontiguousarray(values).view(dtype).T)


# shared memory


def place_of(machine: Machine, who: Threads | None, where: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in `machine.shared` a block's own addresses lie, and whose they are."""
    those = machine.those(who)
    if (where % size).any():
        raise Fault(f"shared address {int(where[where % size != 0][0])} is no multiple of {size} bytes")
    if where.size and (int(where.min()) < 0 or int(where.max()) + size > machine.shared_bytes):
        worst = int(where.max()) if int(where.min()) >= 0 else int(where.min())
        raise Fault(f"{size} bytes at {worst} of shared memory, of which a block has {machine.shared_bytes}")
    return those // machine.threads * machine.stride + where, those


def charge(machine: Machine, how: Callable, where: np.ndarray, size: int, those: np.ndarray) -> None:
    if machine.report is not None:
        taken, least = how(where, size, those)
        machine.current.taken += taken
        machine.current.least += least


def read_shared(machine: Machine, place: np.ndarray, size: int, those: np.ndarray) -> np.ndarray:
    """(n, size) bytes, after all checks."""
    cells = granules(place, size)
    if machine.strict and machine.fresh[cells].any():
        raise Fault("shared memory is read that nothing has written")
    if machine.shared_watch.read(cells, those + machine.clock.first, machine.clock).any():
        raise Fault(f"shared memory is read: {RACE}")
    return machine.shared[place[:, None] + np.arange(size)]


def write_shared(machine: Machine, place: np.ndarray, data: np.ndarray, those: np.ndarray) -> None:
    """`data`: (n, bytes)."""
    size = data.shape[1]
    cells = granules(place, size)
    if machine.pending.products:
        machine.pending.check_write(cells)
    if machine.tensor_memory is not None:
        machine.tensor_memory.check_write(cells)
    bytes_of = place[:, None] + np.arange(size)
    changed = (machine.shared[bytes_of] != data).any(1) | machine.fresh[cells].any(1)
    machine.shared[bytes_of] = data
    lost = (machine.shared[bytes_of] != data).any(1)
    machine.fresh[cells] = False
    machine.unfenced[cells] = True
    if machine.shared_watch.write(cells, those + machine.clock.first, machine.clock, changed, lost).any():
        raise Fault(f"shared memory is written: {RACE}")


def _load_shared(machine: Machine, who: Threads | None, where, kind: str, count: int) -> list[np.ndarray]:
    dtype = np.dtype(KINDS[kind])
    size = count * dtype.itemsize
    offset = where(machine, who)
    place, those = place_of(machine, who, offset, size)
    charge(machine, wavefronts, offset, size, those)
    return list(read_shared(machine, place, size, those).view(dtype).T)


def _store_shared(machine: Machine, who: Threads | None, where, kind: str, values: list[np.ndarray]) -> None:
    offset = where(machine, who)
    data = _bytes(values, kind, offset.size)
    place, those = place_of(machine, who, offset, data.shape[1])
    charge(machine, wavefronts, offset, data.shape[1], those)
    write_shared(machine, place, data, those)


def _bytes(values: list[np.ndarray], kind: str, n: int) -> np.ndarray:
    """(n, bytes) of values next to each other."""
    columns = np.stack([np.broadcast_to(value, n) for value in values], 1)
    return np.ascontiguousarray(columns, KINDS[kind]).view(np.uint8).reshape(n, -1)


def _fence(machine: Machine, who: Threads | None) -> None:
    """What these threads have written to shared memory may be read by products from here on."""
    mine = np.zeros(machine.size, bool)
    mine[slice(None) if who is None else who] = True
    cells = np.flatnonzero(machine.unfenced)
    writers = machine.shared_watch.writer[cells] - machine.clock.first
    machine.unfenced[cells[mine[writers]]] = False


# global memory


def _load_global(machine: Machine, who: Threads | None, where, kind: str, count: int) -> list[np.ndarray]:
    dtype = np.dtype(KINDS[kind])
    those = machine.those(who)
    data = _read_global(machine, where(machine, who).view(np.uint64), count * dtype.itemsize, those)
    return list(data.view(dtype).T)


def _read_global(machine: Machine, start: np.ndarray, size: int, those: np.ndarray) -> np.ndarray:
    data = np.empty((start.size, size), np.uint8)
    for region, here in machine.memory.find(start, size):
        part = slice(None) if here is None else here
        place = start[part].astype(np.int64) - region.start + region.shift
        data[part] = region.bytes[place[:, None] + np.arange(size)]
        if region.watch is not None:
            who = those[part] + machine.clock.first
            if region.watch.read(granules(place, size), who, machine.clock).any():
                raise Fault(f"global memory is read: {RACE}")
    charge(machine, sectors, start, size, those // WARP)
    return data


def _store_global(machine: Machine, who: Threads | None, where, kind: str, values: list[np.ndarray]) -> None:
    those = machine.those(who)
    start = where(machine, who).view(np.uint64)
    data = _bytes(values, kind, start.size)
    size = data.shape[1]
    for region, here in machine.memory.find(start, size):
        part = slice(None) if here is None else here
        place = start[part].astype(np.int64) - region.start + region.shift
        bytes_of = place[:, None] + np.arange(size)
        changed = (region.bytes[bytes_of] != data[part]).any(1)
        region.bytes[bytes_of] = data[part]
        lost = (region.bytes[bytes_of] != data[part]).any(1)
        if region.watch is not None:
            who_here = those[part] + machine.clock.first
            if region.watch.write(granules(place, size), who_here, machine.clock, changed, lost).any():
                raise Fault(f"global memory is written: {RACE}")
    charge(machine, sectors, start, size, those // WARP)


# asynchronous copies


def _copy(instruction: Instruction, kernel: Kernel) -> Action:
    rest = instruction.opcode[1:]
    if rest[:2] == ("async", "commit_group"):
        return lambda machine, who: machine.pending.commit_copies(machine.those(who))
    if rest[:2] in (("async", "wait_group"), ("async", "wait_all")):
        left = int(instruction.operands[0]) if instruction.operands else 0

        def wait(machine: Machine, who: Threads | None) -> None:
            for those, place, data in machine.pending.wait_copies(machine.those(who), left):
                write_shared(machine, place, data, those)

        return wait
    if rest[0] != "async" or rest[2:4] != ("shared", "global") or rest[1] not in ("ca", "cg"):
        raise ValueError("only cp.async from global to shared memory is known here")
    to, source = (address(operand, kernel) for operand in instruction.operands[:2])
    size = int(instruction.operands[2], 0)
    taken = decode.getter(instruction.operands[3], "u32", kernel) if len(instruction.operands) > 3 else None

    def copy(machine: Machine, who: Threads | None) -> None:
        offset = to(machine, who)
        place, those = place_of(machine, who, offset, size)
        start = source(machine, who).view(np.uint64)
        data = np.zeros((those.size, size), np.uint8)
        length = np.full(those.size, size) if taken is None else np.broadcast_to(taken(machine, who), those.size)
        if ((length != 0) & (length != size)).any():
            raise Fault("a copy that fills up a part is not known here")
        some = np.flatnonzero(length)
        if some.size:
            data[some] = _read_global(machine, start[some], size, those[some])
        # Until it is waited for, what will be there is undefined.
        write_shared(machine, place, np.full_like(data, 0xFF), those)
        machine.pending.copy(those, place, data)

    return copy
