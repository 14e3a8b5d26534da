"""What a launch did to memory, counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .source import Instruction, Kernel


@dataclass
class Traffic:
    """Of one instruction: warps that executed it; what its accesses took, in sectors of 32 bytes of global memory or in
    turns of shared memory's banks, and the least that as many bytes could take."""

    warps: int = 0
    taken: int = 0
    least: int = 0

    def __iadd__(self, other: Traffic) -> Traffic:
        self.warps, self.taken, self.least = (
            self.warps + other.warps,
            self.taken + other.taken,
            self.least + other.least,
        )
        return self


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
        found: dict[str, Traffic] = {}
        for number, traffic in self.traffic.items():
            if traffic.least:
                kind = _kind(self.kernel.instructions[number])
                found[kind] = found.get(kind, Traffic())
                found[kind] += traffic
        return found

    def worst(self, count: int) -> list[tuple[str, str, Traffic]]:
        """Source lines whose accesses take most above the least: line, kind and traffic."""
        found: dict[tuple[str, str], Traffic] = {}
        for number, traffic in self.traffic.items():
            instruction = self.kernel.instructions[number]
            if traffic.least:
                key = instruction.source, _kind(instruction)
                found[key] = found.get(key, Traffic())
                found[key] += traffic
        above = [(*key, traffic) for key, traffic in found.items() if traffic.taken > traffic.least]
        return sorted(above, key=lambda each: each[2].least - each[2].taken)[:count]

    def opcodes(self) -> Counter[str]:
        """Instructions, as above, by what they are."""
        found: Counter[str] = Counter()
        for number, traffic in self.traffic.items():
            found[".".join(self.kernel.instructions[number].opcode)] += traffic.warps
        return found


def _kind(instruction: Instruction) -> str:
    name = instruction.opcode[0]
    space = "shared" if "shared" in instruction.opcode and name != "cp" else "global"
    return f"{space} {'store' if name in ('st', 'stmatrix') else 'load'}"
