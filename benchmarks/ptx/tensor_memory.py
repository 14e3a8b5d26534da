"""The products of data-centre Blackwell (tcgen05): one thread asks for them, sums lie in a memory of their own, and a
barrier in shared memory tells that they are done.

What is waited for is checked; whether a block's barrier lies between two warps that touch tensor memory is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from . import decode
from .access import address, place_of, read_shared, write_shared
from .machine import Machine
from .memory import WARP, Fault, Threads
from .products import names_in, numbers, read_factor
from .source import Instruction, Kernel

Action = Callable[[Machine, "Threads | None"], object]
LANES, COLUMNS = 128, 512


@dataclass
class Product:
    """Under way: of which block, where its sums go, and the barrier that will tell, once it is asked to."""

    block: int
    columns: slice
    cells: np.ndarray  # granules of shared memory that it reads
    barrier: int | None = None


@dataclass
class TensorMemory:
    """Of every block of a machine."""

    blocks: int
    words: np.ndarray = field(init=False)
    written: np.ndarray = field(init=False)
    storing: np.ndarray = field(init=False)  # the thread that stores there and has not waited, or -1
    end: np.ndarray = field(init=False)  # columns given out
    phases: dict[int, int] = field(default_factory=dict)  # of barriers, by their place in `machine.shared`
    products: list[Product] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = (self.blocks, LANES, COLUMNS)
        self.words, self.written = np.full(shape, 0x7FC0DEAD, np.uint32), np.zeros(shape, bool)
        self.storing, self.end = np.full(shape, -1, np.int32), np.zeros(self.blocks, int)

    def check_write(self, cells: np.ndarray) -> None:
        """Granules of shared memory that are about to be written."""
        if any(np.isin(cells, product.cells).any() for product in self.products):
            raise Fault("shared memory is written that a product under way reads: its mbarrier is not waited for")

    def check(self, block: np.ndarray, lane: np.ndarray, column: np.ndarray, reads: bool) -> None:
        if (column >= self.end[block]).any() or (lane >= LANES).any():
            raise Fault("tensor memory is touched that the block has not been given")
        if (self.storing[block, lane, column] >= 0).any():
            raise Fault("tensor memory is touched while it is stored to: tcgen05.wait::st is missing")
        if reads and not self.written[block, lane, column].all():
            raise Fault("tensor memory is read that nothing has written")
        for product in self.products:
            here = column[block == product.block]
            if ((here >= product.columns.start) & (here < product.columns.stop)).any():
                raise Fault("tensor memory is touched while a product writes to it: its mbarrier is not waited for")


def memory_of(machine: Machine) -> TensorMemory:
    if machine.tensor_memory is None:
        machine.tensor_memory = TensorMemory(machine.blocks)
    return machine.tensor_memory


def action(instruction: Instruction, kernel: Kernel) -> Action | None:
    name, *rest = instruction.opcode
    if name == "elect":
        return _elect(instruction)
    if name == "mbarrier":
        return _barrier(instruction, kernel)
    if name != "tcgen05":
        return None
    if rest[0] in ("alloc", "dealloc", "relinquish_alloc_permit"):
        return _allocation(instruction, kernel)
    if rest[0] == "commit":
        where = address(instruction.operands[0], kernel)
        return lambda machine, who: _commit(machine, who, where)
    if rest[0] == "wait::ld":
        return lambda machine, who: machine.pending.loads.clear()
    if rest[0] == "wait::st":
        return _settle
    if rest[0] in ("ld", "st"):
        return _access(instruction, kernel)
    if rest[0] == "mma":
        return _multiply(instruction, kernel)
    raise ValueError(f"{'.'.join(instruction.opcode)} is not known here")


def _elect(instruction: Instruction) -> Action:
    target, _, chosen = instruction.operands[0].partition("|")

    def elect(machine: Machine, who: Threads | None) -> None:
        warps = decode.whole_warps(machine, who)
        decode.put(machine, target, who, np.zeros(warps.size, np.uint32))  # the first lane
        decode.put(machine, chosen, who, np.tile(np.arange(WARP) == 0, len(warps)))

    return elect


def _barrier(instruction: Instruction, kernel: Kernel) -> Action:
    """Barriers of one arrival, which a commit is."""
    what = instruction.opcode[1]
    place = next(operand for operand in instruction.operands if operand.startswith("["))
    where = address(place, kernel)
    if what == "init" and instruction.operands[1] == "1":

        def init(machine: Machine, who: Threads | None) -> None:
            at, those = place_of(machine, who, where(machine, who), 8)
            write_shared(machine, at, np.zeros((at.size, 8), np.uint8), those)
            memory_of(machine).phases.update(dict.fromkeys(at.tolist(), 0))

        return init
    if what == "inval":

        def invalidate(machine: Machine, who: Threads | None) -> None:
            at, _ = place_of(machine, who, where(machine, who), 8)
            for each in at.tolist():
                del memory_of(machine).phases[each]

        return invalidate
    if what == "try_wait" and "parity" in instruction.opcode:
        target = instruction.operands[0]
        parity = decode.getter(instruction.operands[2], "u32", kernel)

        def wait(machine: Machine, who: Threads | None) -> Threads:
            memory = memory_of(machine)
            at, those = place_of(machine, who, where(machine, who), 8)
            read_shared(machine, at, 8, those)
            if not set(at.tolist()) <= memory.phases.keys():
                raise Fault("a barrier is waited for that is none")
            phase = np.array([memory.phases[each] for each in at.tolist()])
            done = phase % 2 != parity(machine, who)
            decode.put(machine, target, who, done)
            told = set(at[done].tolist())
            memory.products = [product for product in memory.products if product.barrier not in told]
            return those[~done]  # they sleep until something arrives

        return wait
    raise ValueError(f"{instruction.text} is not known here")


def _allocation(instruction: Instruction, kernel: Kernel) -> Action:
    what = instruction.opcode[1]
    if what == "relinquish_alloc_permit":
        return lambda machine, who: None
    columns = int(instruction.operands[1])
    where = address(instruction.operands[0], kernel) if what == "alloc" else None

    def allocate(machine: Machine, who: Threads | None) -> None:
        memory, warps = memory_of(machine), decode.whole_warps(machine, who)
        block = warps[:, 0] // machine.threads
        if where is None:
            memory.end[block] = 0
            return
        if (memory.end[block] + columns > COLUMNS).any() or len(np.unique(block)) < len(block):
            raise Fault("a block asks for more columns of tensor memory than there are")
        at, _ = place_of(machine, warps[:, 0], where(machine, who).reshape(-1, WARP)[:, 0], 4)
        write_shared(machine, at, memory.end[block].astype(np.uint32)[:, None].view(np.uint8), warps[:, 0])
        memory.end[block] += columns

    return allocate


def _commit(machine: Machine, who: Threads | None, where: Callable) -> None:
    """All products so far of these threads' blocks arrive at a barrier when they are done, which is at once here, but
    nobody knows until the barrier is asked."""
    memory = memory_of(machine)
    at, those = place_of(machine, who, where(machine, who), 8)
    for each, thread in zip(at.tolist(), those, strict=True):
        if each not in memory.phases:
            raise Fault("products are to arrive at a barrier that is none")
        memory.phases[each] += 1
        machine.asleep[:] = False
        for product in memory.products:
            if product.block == thread // machine.threads and product.barrier is None:
                product.barrier = each


def _settle(machine: Machine, who: Threads | None) -> None:
    memory, mine = memory_of(machine), np.zeros(machine.size + 1, bool)
    mine[machine.those(who)] = True
    memory.storing[mine[memory.storing]] = -1


def _access(instruction: Instruction, kernel: Kernel) -> Action:
    """Words of a warp's 32 lanes; or of 16 lanes, the upper half of the warp taking columns further on."""
    loads, shape = instruction.opcode[1] == "ld", instruction.opcode[4]
    if shape not in ("32x32b", "16x32bx2"):
        raise ValueError(f"{shape} is not known here")
    operands = [operand for operand in instruction.operands if operand[0] in "{["]
    registers, where = (operands if loads else operands[::-1])[:2]
    names, where = names_in(registers), address(where, kernel)
    split = int(next(o for o in instruction.operands if o[0] not in "{[")) if shape == "16x32bx2" else 0

    def move(machine: Machine, who: Threads | None) -> None:
        memory, warps = memory_of(machine), decode.whole_warps(machine, who)
        base = where(machine, who).reshape(warps.shape)
        lane = np.arange(WARP)
        row = (base >> 16) + (lane % 16 if split else lane)
        if (row // WARP != (warps // WARP % 4)).any():
            raise Fault("a warp touches lanes of tensor memory that are another's")
        start = (base & 0xFFFF) + (lane >= 16) * split
        block = (warps // machine.threads)[..., None]
        shape = (*warps.shape, len(names))
        at = np.broadcast_arrays(block, row[..., None], start[..., None] + np.arange(len(names)))
        memory.check(*(each.reshape(-1) for each in at), reads=loads)
        if loads:
            found = memory.words[tuple(at)]
            for i, name in enumerate(names):
                machine.registers[name][warps] = found[..., i]
            machine.pending.loads.append(frozenset(names))
            return
        words = [np.broadcast_to(decode.getter(name, "b32", kernel)(machine, who), warps.size) for name in names]
        memory.words[tuple(at)] = np.stack(words, -1).reshape(shape)
        memory.written[tuple(at)] = True
        memory.storing[tuple(at)] = np.broadcast_to(warps[..., None], shape)

    return move


def _multiply(instruction: Instruction, kernel: Kernel) -> Action:
    kind = instruction.opcode[3].removeprefix("kind::")
    if kind not in ("f16", "tf32") or "cta_group::1" not in instruction.opcode:
        raise ValueError("only products of 16 bits or TF32 of one block are known here")
    depth, size = (16, 2) if kind == "f16" else (8, 4)
    target, first, second, form, keep = instruction.operands
    into = address(target, kernel)
    of_tensor_memory = first.startswith("[")
    a_at = address(first, kernel) if of_tensor_memory else decode.getter(first, "u64", kernel)
    b_at, described = decode.getter(second, "u64", kernel), decode.getter(form, "u32", kernel)
    keeps = decode.getter(keep, "pred", kernel)

    def shared(machine: Machine, thread: int, descriptor: int, rows: int, turned: bool):
        swizzle = {0: 0, 2: 1, 4: 2, 6: 3}[descriptor >> 61]  # as Hopper's descriptors have it
        plain = descriptor & (1 << 46) - 1 | swizzle << 62
        return read_factor(machine, thread, plain, rows, depth, size, turned)

    def one(machine: Machine, thread: int, values: tuple[int, ...]) -> None:
        d_at, a_where, descriptor, word, keep_it = values
        m, n = 16 * (word >> 24 & 31), 8 * (word >> 17 & 63)
        formats = word >> 7 & 7, word >> 10 & 7
        if word >> 4 & 3 != 1 or word & 0x600F or m not in (64, 128) or formats[0] != formats[1]:
            raise Fault(f"a product described by {word:#x} is not known here")
        of_numbers = kind if kind == "tf32" else "bf16" if formats[0] == 1 else "f16"
        memory, block = memory_of(machine), thread // machine.threads
        row = np.arange(m)
        # Of 64 rows each warp has 16, in either half of its lanes.
        lane = row if m == 128 else row // 16 * WARP + row % 16
        if of_tensor_memory:
            column = (a_where & 0xFFFF) + np.arange(depth * size // 4)
            at = np.broadcast_arrays(block, lane[:, None] + (a_where >> 16), column[None, :])
            memory.check(*(each.reshape(-1) for each in at), reads=True)
            words, cells = memory.words[tuple(at)], []
        else:
            words, read = shared(machine, thread, a_where, m, bool(word >> 15 & 1))
            cells = [read]
        a = numbers(words, of_numbers).reshape(m, depth)
        words, read = shared(machine, thread, descriptor, n, bool(word >> 16 & 1))
        columns = slice(d_at & 0xFFFF, (d_at & 0xFFFF) + n)
        at = np.broadcast_arrays(block, lane[:, None] + (d_at >> 16), np.arange(n)[None, :] + columns.start)
        under_way, memory.products = memory.products, []  # products of one thread are done in their order
        memory.check(*(each.reshape(-1) for each in at), reads=bool(keep_it))
        memory.products = under_way
        with np.errstate(all="ignore"):
            value = a @ numbers(words, of_numbers).reshape(n, depth).T
            if keep_it:
                value = value + memory.words[tuple(at)].view(np.float32)
        memory.words[tuple(at)] = np.ascontiguousarray(value, np.float32).view(np.uint32)
        memory.written[tuple(at)] = True
        memory.products.append(Product(block, columns, np.concatenate([*cells, read])))

    def multiply(machine: Machine, who: Threads | None) -> None:
        those = machine.those(who)
        columns = [into(machine, who), a_at(machine, who), b_at(machine, who), described(machine, who)]
        columns = [np.broadcast_to(each, those.size) for each in (*columns, keeps(machine, who))]
        for i, thread in enumerate(those.tolist()):
            one(machine, thread, tuple(int(each[i]) for each in columns))

    return multiply
