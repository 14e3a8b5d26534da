"""Matrix products of the tensor cores, and the loads and stores that serve them."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from . import decode
from .access import address, charge, place_of, read_shared, write_shared
from .arithmetic import from_bf16
from .machine import Machine
from .memory import WARP, Fault, Threads, granules, wavefronts
from .source import Instruction, Kernel

Action = Callable[[Machine, "Threads | None"], object]
LANE = np.arange(WARP)
G, Q = LANE // 4, LANE % 4  # a lane's row and place in a row of four lanes


def action(instruction: Instruction, kernel: Kernel) -> Action | None:
    name, *rest = instruction.opcode
    if name == "mma":
        return _mma(instruction, kernel)
    if name in ("ldmatrix", "stmatrix"):
        return _matrix(instruction, kernel)
    if name == "wgmma":
        if rest[0] == "fence":
            return lambda machine, who: None
        if rest[0] == "commit_group":
            return lambda machine, who: machine.pending.commit_products(machine.those(who))
        if rest[0] == "wait_group":
            left = int(instruction.operands[0])
            return lambda machine, who: machine.pending.wait_products(machine.those(who), left)
        return _wgmma(instruction, kernel)
    return None


def names_in(braces: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in braces.strip("{} ").split(","))


def numbers(words: np.ndarray, kind: str) -> np.ndarray:
    """(..., words) of 32 bits -> (..., words, numbers a word) in float64, the lower first."""
    words = np.ascontiguousarray(words)
    if kind == "tf32":  # the lower 13 bits do not count
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None].astype(np.float64)
    halves = words.view(np.uint16).reshape(*words.shape, 2)
    return (from_bf16(halves) if kind == "bf16" else halves.view(np.float16)).astype(np.float64)


def _words(machine: Machine, names: tuple[str, ...], warps: np.ndarray) -> np.ndarray:
    """(warps, 32 lanes, registers)"""
    return np.stack([machine.registers[name][warps] for name in names], -1)


def _fragment(words: np.ndarray, kind: str) -> np.ndarray:
    """A's of m16: four registers a lane -> (warps, 16, k)."""
    values = numbers(words, kind)  # (warps, lane, register, each)
    each = values.shape[-1]
    a = np.empty((len(words), 16, 8 * each))
    for register in range(4):
        for i in range(each):
            a[:, G + 8 * (register % 2), each * Q + i + 4 * each * (register // 2)] = values[:, :, register, i]
    return a


def _mma(instruction: Instruction, kernel: Kernel) -> Action:
    shape, layout, kinds = instruction.opcode[3], instruction.opcode[4:6], instruction.opcode[6:]
    known = {("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")}
    if (shape, kinds[1]) not in known or layout != ("row", "col") or kinds[0] != "f32" or kinds[3] != "f32":
        raise ValueError("only products of 16 x 8 in float32 are known here")
    d, a, b, c = map(names_in, instruction.operands)
    constant = all(name not in kernel.registers for name in c)

    def multiply(machine: Machine, who: Threads | None) -> None:
        warps = decode.whole_warps(machine, who)
        first = _fragment(_words(machine, a, warps), kinds[1])
        values = numbers(_words(machine, b, warps), kinds[1])
        each = values.shape[-1]
        second = np.empty((len(warps), 8 * each, 8))
        for register in range(2):
            for i in range(each):
                second[:, each * Q + i + 4 * each * register, G] = values[:, :, register, i]
        with np.errstate(all="ignore"):
            product = first @ second
            for i in range(4):
                value = product[:, G + 8 * (i // 2), 2 * Q + i % 2]
                if not constant:
                    value = value + machine.registers[c[i]][warps].view(np.float32)
                machine.registers[d[i]][warps] = value.astype(np.float32).view(np.uint32)

    return multiply


def _matrix(instruction: Instruction, kernel: Kernel) -> Action:
    """ldmatrix and stmatrix: matrices of 8 x 8 numbers of 16 bits, whose rows the lanes name eight by eight."""
    loads = instruction.opcode[0] == "ldmatrix"
    many = int(next(part for part in instruction.opcode if re.match(r"x\d$", part))[1:])
    turned = "trans" in instruction.opcode
    if "m8n8" not in instruction.opcode or instruction.opcode[-1] != "b16":
        raise ValueError("only matrices of 8 x 8 are known here")
    named, where = instruction.operands if loads else reversed(instruction.operands)
    registers, start = names_in(named), address(where, kernel)

    def move(machine: Machine, who: Threads | None) -> None:
        warps = decode.whole_warps(machine, who)
        rows = warps[:, : 8 * many].reshape(-1)  # a thread a row
        offset = start(machine, who).reshape(-1, WARP)[:, : 8 * many].reshape(-1)
        place, _ = place_of(machine, rows, offset, 16)
        # A matrix is eight rows of 16 bytes: one turn, as a quarter of a warp that loads 16 bytes a lane.
        charge(machine, wavefronts, offset, 16, np.arange(rows.size))
        if loads:
            half = read_shared(machine, place, 16, rows).view(np.uint16).reshape(len(warps), many, 8, 8)
            if turned:
                half = half.swapaxes(2, 3)
            for i, register in enumerate(registers):
                pair = half[:, i, G[:, None], 2 * Q[:, None] + np.arange(2)]
                machine.registers[register][warps] = np.ascontiguousarray(pair).view(np.uint32)[..., 0]
            return
        half = np.empty((len(warps), many, 8, 8), np.uint16)
        for i, register in enumerate(registers):
            pair = machine.registers[register][warps].view(np.uint16).reshape(len(warps), WARP, 2)
            half[:, i, G[:, None], 2 * Q[:, None] + np.arange(2)] = pair
        if turned:
            half = half.swapaxes(2, 3)
        write_shared(machine, place, np.ascontiguousarray(half).view(np.uint8).reshape(-1, 16), rows)

    return move


# Hopper: a product of four warps, its factors in shared memory, the first one in registers as well


def offsets(descriptor: int, rows: int, depth: int, size: int, turned: bool) -> np.ndarray:
    """Where a factor's numbers lie, (rows, depth) of `size` bytes each, as its descriptor says. Rows are those of A or
    the columns of B, depth is K, and K's numbers lie next to each other unless it is turned."""
    start, leading, stride = (descriptor >> bit & 0x3FFF for bit in (0, 16, 32))
    start, leading, stride = 16 * start, 16 * leading, 16 * stride
    if descriptor >> 49 & 7:
        raise Fault("a descriptor with a base offset is not known here")
    width = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]  # bytes of a swizzled row
    r, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if turned:
        across, along = r, k
        at = across * size % width + along % 8 * width
        at = at + across * size // width * (stride if width == 16 else leading)
        at = at + along // 8 * (leading if width == 16 else stride)
    else:
        at = r % 8 * width + r // 8 * stride + k * size
        if width == 16:
            at = r % 8 * 16 + r // 8 * stride + k * size // 16 * leading + k * size % 16
        elif depth * size > width:
            raise Fault("a factor deeper than its swizzled rows is not known here")
    at = start + at
    return at ^ (at >> 3 & (width - 16))


def read_factor(
    machine: Machine, thread: int, descriptor: int, rows: int, depth: int, size: int, turned: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What `thread` finds where a descriptor points: words of 32 bits (rows, depth * size / 4), and their granules."""
    offset = offsets(descriptor, rows, depth, size, turned).reshape(-1)
    readers = np.full(offset.size, thread)
    place, _ = place_of(machine, readers, offset, size)
    cells = granules(place, size)
    if machine.unfenced[cells].any():
        raise Fault("a product reads shared memory before fence.proxy.async")
    raw = read_shared(machine, place, size, readers)
    return raw.reshape(rows, depth * size).view(np.uint32), cells.reshape(-1)


def _wgmma(instruction: Instruction, kernel: Kernel) -> Action:
    shape = next(part for part in instruction.opcode if re.match(r"m64n\d+k\d+$", part))
    n, depth = map(int, re.findall(r"\d+", shape)[1:])
    if instruction.opcode[-3] != "f32" or instruction.opcode[-2] != instruction.opcode[-1]:
        raise ValueError("only products in float32 are known here")
    kind = instruction.opcode[-1]
    size = 4 if kind == "tf32" else 2
    target, first, second, keep, *more = instruction.operands
    in_registers = first.startswith("{")
    if [each for each in more[:2] if each != "1"]:
        raise ValueError("a product with a sign is not known here")
    turns = [each == "1" for each in more[2:]]
    turn_a, turn_b = (False, *turns, False)[:2] if in_registers else (*turns, False, False)[:2]
    into = names_in(target)
    keeps = decode.getter(keep, "pred", kernel)
    columns = np.arange(len(into)) // 4 * 8 + np.arange(len(into)) % 2
    lower = np.arange(len(into)) // 2 % 2 * 8

    def factor(machine: Machine, register: str, groups: np.ndarray, rows: int, turned: bool):
        words = machine.registers[register][groups]
        if (words != words[:, :1]).any():
            raise Fault("the threads of a product tell different descriptors")
        values, reads = [], []
        for group, word in zip(groups, words[:, 0], strict=True):
            raw, cells = read_factor(machine, group[0], int(word), rows, depth, size, turned)
            machine.shared_watch.read_by_several(cells)
            values.append(raw)
            reads.append(cells)
        return numbers(np.stack(values), kind).reshape(len(groups), rows, depth), reads

    def multiply(machine: Machine, who: Threads | None) -> None:
        warps = decode.whole_warps(machine, who)
        if len(warps) % 4 or (warps[::4, 0] % (4 * WARP)).any():
            raise Fault("not all four warps of a product come here together")
        groups = warps.reshape(-1, 4 * WARP)
        if in_registers:
            fragment = _fragment(_words(machine, names_in(first), warps), kind)
            a, reads = fragment.reshape(len(groups), 64, depth), []
        else:
            a, reads = factor(machine, first, groups, 64, turn_a)
        b, reads_b = factor(machine, second, groups, n, turn_b)
        with np.errstate(all="ignore"):
            product = (a @ b.swapaxes(1, 2)).reshape(len(warps), 16, n)
            keep_it = np.broadcast_to(keeps(machine, who), warps.size).reshape(warps.shape)
            for i, register in enumerate(into):
                value = product[:, G + lower[i], 2 * Q + columns[i]]
                before = machine.registers[register][warps].view(np.float32)
                value = np.where(keep_it, value + before, value)
                machine.registers[register][warps] = value.astype(np.float32).view(np.uint32)
        held = names_in(first) if in_registers else ()
        machine.pending.product(groups.reshape(-1), np.concatenate([*reads, *reads_b]), held, into)

    return multiply
