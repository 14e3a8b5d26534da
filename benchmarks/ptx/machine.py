"""Runs a kernel's PTX thread by thread on the host, several blocks at a time, each instruction for all their threads.

Threads that part go on by the lowest instruction first, which joins them again where their ways meet. What a GPU would
leave to chance is an error here: memory that is nobody's, misaligned or never written, accesses that no barrier orders,
asynchronous copies and products that are used before they are waited for, a barrier or shuffle that not all reach.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .memory import WARP, Clock, Fault, Global, Threads, Watch
from .pending import Pending
from .report import Report
from .source import Instruction, Kernel

if TYPE_CHECKING:
    from .tensor_memory import TensorMemory

POISON = 0x7FC0DEAD7FC0DEAD  # in registers that nothing has written: NaN as a float, no address as an integer
STEPS = 20_000_000  # instructions: more are a loop without an end


class Machine:
    """Some blocks of a launch, under way."""

    def __init__(
        self,
        kernel: Kernel,
        params: bytes,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        memory: Global,
        blocks: np.ndarray,
        report: Report | None,
        strict: bool,
    ):
        if threads % WARP or not 0 < threads <= 1024:
            raise ValueError(f"{threads} threads a block; expected a multiple of {WARP}, 1024 at most")
        if len(params) < kernel.param_bytes:
            raise ValueError(f"{kernel.name} takes {kernel.param_bytes} bytes of parameters, {len(params)} came")
        self.kernel, self.threads, self.memory, self.report = kernel, threads, memory, report
        self.blocks = len(blocks)
        n = self.size = self.blocks * threads
        self.id = np.arange(n)
        self.clock = Clock(threads, int(blocks[0]) * threads, np.zeros(n, np.int32), np.zeros(n, np.int32))
        self.params = np.frombuffer(params + bytes(-len(params) % 16), np.uint8)
        self.dynamic = -(-kernel.static_bytes // 128) * 128 if kernel.static_bytes else 0
        # Each block's shared memory begins at a multiple of 1024, which swizzled products ask for.
        self.shared_bytes = self.dynamic + shared_bytes
        self.stride = -(-max(self.shared_bytes, 1) // 1024) * 1024
        self.shared = np.full(self.blocks * self.stride, 0xFF, np.uint8)
        self.shared_watch = Watch(self.shared.size)
        self.strict = strict
        self.fresh = np.ones(self.shared.size // 2, bool)  # never written
        self.unfenced = np.zeros(self.shared.size // 2, bool)  # written since the writer's last fence for products
        self.registers: dict[str, np.ndarray] = {}
        for name, width in kernel.registers.items():
            kind = {1: np.bool_, 2: np.uint16, 4: np.uint32, 8: np.uint64}[width]
            self.registers[name] = np.full(n, POISON & (1 << 8 * width) - 1, kind)
        self.pc = np.zeros(n, np.int64)
        self.waiting, self.exited, self.asleep = (np.zeros(n, bool) for _ in range(3))
        number = blocks.astype(np.int64)
        self.special = {
            "%tid.x": np.tile(np.arange(threads, dtype=np.uint32), self.blocks),
            "%ctaid.x": np.repeat((number % grid[0]).astype(np.uint32), threads),
            "%ctaid.y": np.repeat((number // grid[0] % grid[1]).astype(np.uint32), threads),
            "%ctaid.z": np.repeat((number // grid[0] // grid[1]).astype(np.uint32), threads),
            "%laneid": (self.id % WARP).astype(np.uint32),
            **{f"%nctaid.{axis}": np.full(n, size, np.uint32) for axis, size in zip("xyz", grid, strict=True)},
            "%ntid.x": np.full(n, threads, np.uint32),
            **{f"%{name}": np.zeros(n, np.uint32) for name in ("tid.y", "tid.z")},
            **{f"%{name}": np.ones(n, np.uint32) for name in ("ntid.y", "ntid.z")},
        }
        self.pending = Pending(n)
        self.tensor_memory: TensorMemory | None = None

    def run(self, code: list[Callable[[Machine, Threads | None], object] | str]) -> None:
        """`code`: for each instruction what to call, or "branch", "barrier" or "exit", which are this function's."""
        instructions, labels, steps = self.kernel.instructions, self.kernel.labels, 0
        while True:
            runnable = ~(self.exited | self.waiting | self.asleep)
            if not runnable.any():
                if self.exited.all():
                    return
                self._release()
                continue
            pcs = self.pc[runnable]
            here = int(pcs.min())
            active = runnable & (self.pc == here)
            later = pcs[pcs > here]
            limit = int(later.min()) if later.size else len(code)  # where the next ones wait
            who = None if active.all() else np.flatnonzero(active)
            while here < limit:
                steps += 1
                if steps > STEPS:
                    raise Fault(f"{self.kernel.name} does not end: {STEPS} instructions")
                instruction, action = instructions[here], code[here]
                those = self._predicated(instruction, who)
                if those is not None and not those.size:
                    here += 1
                    continue
                if self.report is not None:
                    self._count(here, those)
                try:
                    if action == "branch":
                        target = labels[instruction.operands[0]]
                        if instruction.predicate is None or self._is_all(those, who):
                            here = target
                            continue
                        self.pc[self.those(who)] = here + 1
                        self.pc[those] = target
                        break
                    if action == "barrier":
                        self._arrive(instruction, here, those, who)
                        break
                    if action == "exit":
                        self.exited[self.those(those)] = True
                        if who is None or not self._is_all(those, who):
                            self.pc[self.those(who)] = here + 1
                        break
                    assert not isinstance(action, str)
                    sleep = action(self, those)  # those that are to try it again when something has happened
                    if isinstance(sleep, np.ndarray) and sleep.size:
                        self.pc[self.those(who)] = here + 1
                        self.pc[sleep], self.asleep[sleep] = here, True
                        break
                except Fault as fault:
                    where = f"{self.kernel.name}: {instruction.text}  ({instruction.source})"
                    raise Fault(f"{fault}\n  in {where}") from None
                here += 1
            else:
                self.pc[self.those(who)] = here
                if here >= len(code):
                    raise Fault(f"{self.kernel.name} runs past its end")

    def those(self, who: Threads | None) -> Threads:
        """None stands for all threads, which spares picking them out of every array."""
        return self.id if who is None else who

    def _predicated(self, instruction: Instruction, who: Threads | None) -> Threads | None:
        if instruction.predicate is None:
            return who
        name, negated = instruction.predicate
        holds = self.registers[name] if who is None else self.registers[name][who]
        if negated:
            holds = ~holds
        if holds.all():
            return who
        return np.flatnonzero(holds) if who is None else who[holds]

    def _is_all(self, those: Threads | None, who: Threads | None) -> bool:
        return those is who or (those is not None and who is not None and those.size == who.size)

    def _count(self, here: int, who: Threads | None) -> None:
        assert self.report is not None
        self.current = self.report.of(here)  # what an access to memory adds to
        self.current.warps += self.size // WARP if who is None else len(np.unique(who // WARP))

    def _arrive(self, instruction: Instruction, here: int, those: Threads | None, who: Threads | None) -> None:
        if instruction.operands and instruction.operands[0] != "0":
            raise ValueError(f"a barrier of its own number is not known here: {instruction.text}")
        everyone = self.those(who)
        self.pc[everyone] = here + 1
        self.waiting[self.those(those)] = True

    def _release(self) -> None:
        """Those blocks of which every thread waits; a GPU hangs where none does, or where some have left."""
        waiting = self.waiting.reshape(self.blocks, self.threads)
        exited = self.exited.reshape(self.blocks, self.threads)
        if self.asleep.any() and not waiting.all(1).any():
            raise Fault(f"{self.kernel.name}: a barrier is waited for that nothing will arrive at")
        stuck = waiting.any(1) & exited.any(1)
        if stuck.any():
            ended = int(exited[stuck][0].sum())
            raise Fault(f"{self.kernel.name}: {ended} threads ended, and the others of their block wait for them")
        pcs = self.pc.reshape(self.blocks, self.threads)
        for block in np.flatnonzero(waiting.all(1)):
            if (pcs[block] != pcs[block][0]).any():
                raise Fault(f"{self.kernel.name}: the threads of a block wait at different barriers")
        free = np.repeat(waiting.all(1), self.threads)
        self.waiting[free] = False
        self.clock.barriers[free] += 1


def run(
    code: list[Callable[[Machine, Threads | None], object] | str],
    kernel: Kernel,
    params: bytes,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    memory: Global,
    *,
    at_once: int = 4096,
    watch_global: bool = True,
    strict: bool = True,
    report: Report | None = None,
) -> None:
    """A launch, `at_once` threads at a time.

    Args:
        watch_global: also find races in global memory.
        strict: what nothing has written in shared memory may not be read; otherwise it is NaN.
        report: gets what each instruction did.
    """
    total = grid[0] * grid[1] * grid[2]
    if total == 0 or grid[1] > 65_535 or grid[2] > 65_535:
        raise Fault(f"{kernel.name}: no GPU launches a grid of {grid}")
    blocks = max(1, at_once // threads)
    memory.watch(watch_global)
    for first in range(0, total, blocks):
        part = np.arange(first, min(first + blocks, total))
        machine = Machine(kernel, params, grid, threads, shared_bytes, memory, part, report, strict)
        machine.run(code)
        if machine.pending.copies:
            raise Fault(f"{kernel.name} ends with copies under way")
    memory.watch(False)
