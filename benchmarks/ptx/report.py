"""What a launch did to memory, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from .source import Instruction, Kernel

Key = TypeVar("Key")


@dataclass
class Traffic:
    """Of one instruction: warps that executed it; what its accesses took, in sectors of 32 bytes of global memory or in
    turns of shared memory's banks, and the least that as many bytes could take."""

    warps: int = 0
    taken: int = 0
    least: int = 0


@dataclass
class Report:
    """Sums over all blocks of a launch, by the number of the instruction."""

    kernel: Kernel
    blocks: int
    traffic: dict[int, Traffic] = field(default_factory=dict)

    def of(self, number: int) -> Traffic:
        return self.traffic.setdefault(number, Traffic())

    @property
    def warps(self) -> int:
        """Instructions, each counted once for a warp."""
        return sum(traffic.warps for traffic in self.traffic.values())

    def by_kind(self) -> dict[str, Traffic]:
        """By "global load", "global store", "shared load" and "shared store"; an asynchronous copy counts as a load."""
        return self._sums(_kind)

    def worst(self, count: int) -> list[tuple[str, str, Traffic]]:
        """Source lines whose accesses take most above the least: line, kind and traffic."""
        sums = self._sums(lambda instruction: (instruction.source, _kind(instruction)))
        above = [(*key, traffic) for key, traffic in sums.items() if traffic.taken > traffic.least]
        return sorted(above, key=lambda each: each[2].least - each[2].taken)[:count]

    def busiest(self, count: int) -> list[tuple[str, int, str]]:
        """Source lines that take most instructions: line, instructions counted as `warps`, and which these are."""
        lines: dict[str, Counter[str]] = {}
        for number, traffic in self.traffic.items():
            instruction = self.kernel.instructions[number]
            lines.setdefault(instruction.source, Counter())[".".join(instruction.opcode[:2])] += traffic.warps
        found = sorted(lines.items(), key=lambda line: -line[1].total())[:count]
        return [(line, kinds.total(), ", ".join(kind for kind, _ in kinds.most_common(5))) for line, kinds in found]

    def _sums(self, key: Callable[[Instruction], Key]) -> dict[Key, Traffic]:
        """Of the instructions that access memory."""
        found: dict[Key, Traffic] = {}
        for number, traffic in self.traffic.items():
            if traffic.least:
                total = found.setdefault(key(self.kernel.instructions[number]), Traffic())
                total.warps += traffic.warps
                total.taken += traffic.taken
                total.least += traffic.least
        return found


def _kind(instruction: Instruction) -> str:
    name = instruction.opcode[0]
    space = "shared" if "shared" in instruction.opcode and name != "cp" else "global"
    return f"{space} {'store' if name in ('st', 'stmatrix') else 'load'}"
