"""PTX as text, taken apart: kernels, their parameters, registers, shared memory and instructions.

What it reads is what nvcc and Triton write, and what it does not know ends in a ValueError (ISA:
https://docs.nvidia.com/cuda/parallel-thread-execution).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "8": 1, "16": 2, "32": 4, "64": 8}  # bytes of a register or a value, by the digits of its type


def width_of(kind: str) -> int:
    """Bytes of a type: 4 for f32, 2 for bf16, 1 for a predicate, which takes an element of bool."""
    digits = re.search(r"\d+$", kind)
    if kind != "pred" and not digits:
        raise ValueError(f"unknown type {kind}")
    return WIDTHS[digits[0] if digits else kind]


@dataclass(frozen=True)
class Instruction:
    """`@%p1 add.s32 %r1, %r2, 3` is ("%p1", False), ("add", "s32"), ("%r1", "%r2", "3")."""

    text: str
    predicate: tuple[str, bool] | None  # a register, and whether it is negated
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    source: str  # file and line that it comes from, as the compiler says, or ""


@dataclass
class Kernel:
    name: str
    params: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset and size in bytes
    registers: dict[str, int] = field(default_factory=dict)  # bytes of each
    shared: dict[str, int] = field(default_factory=dict)  # offset of a static array
    static_bytes: int = 0
    dynamic: str = ""  # the name of what the launch sizes; it lies behind the static arrays
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def param_bytes(self) -> int:
        return max((offset + size for offset, size in self.params.values()), default=0)


def parse(text: str) -> dict[str, Kernel]:
    """Every kernel of a PTX file by its name."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]*)"', text, re.M))
    kernels: dict[str, Kernel] = {}
    dynamic = ""
    lines = iter(re.sub(r"//.*", "", text).splitlines())
    for line in map(str.strip, lines):
        if found := re.match(r"\.extern \.shared .*?(\S+)\[\];", line):
            dynamic = found[1]
        elif found := re.match(r"(?:\.visible )?\.entry ([\w$]+)\(?", line):
            kernel = kernels[found[1]] = Kernel(found[1], dynamic=dynamic)
            _header(lines, kernel)
            _body(lines, kernel, files)
    if not kernels:
        raise ValueError("no .entry found: is this PTX?")
    return kernels


def _header(lines: Iterator[str], kernel: Kernel) -> None:
    """Parameters, up to the brace that opens the body."""
    for line in map(str.strip, lines):
        if line == "{":
            return
        if line.startswith(".param"):
            declared = line.rstrip(",")
            array = re.search(r"\[(\d+)\]$", declared)
            align = re.search(r"\.param \.align (\d+)", declared)  # of a structure; a pointer tells its target's
            size = int(array[1]) if array else width_of(re.findall(r"\.([a-z]+\d+)", declared)[0])
            unit = int(align[1]) if align else size
            offset = -(-kernel.param_bytes // unit) * unit
            kernel.params[re.sub(r"\[\d+\]$", "", declared).split()[-1]] = (offset, size)


def _body(lines: Iterator[str], kernel: Kernel, files: dict[str, str]) -> None:
    scopes: list[dict[str, str]] = []  # of braces within the body: what its own registers are called outside of it
    source, braces = "", 0
    for line in map(str.strip, lines):
        if found := re.match(r"\.loc\s+(\d+) (\d+)", line):
            source = f"{files.get(found[1], found[1])}:{found[2]}"
            continue
        if found := re.match(r"([\w$]+):(?!:)\s*(.*)", line):
            label = found[1]
            if scopes:
                scopes[-1][label] = label = f"{label}_scope{braces}"
            kernel.labels[label] = len(kernel.instructions)
            line = found[2]
        if line.startswith("{"):
            braces += 1
            scopes.append({})
            line = line[1:].strip()
        closes = line.endswith("}")
        for statement in filter(None, map(str.strip, line.removesuffix("}").split(";"))):
            for scope in reversed(scopes):
                for name, other in scope.items():
                    statement = re.sub(r"(?<!\w)" + re.escape(name) + r"\b", other, statement)
            _statement(statement, kernel, source, scopes, braces)
        if closes:
            if not scopes:
                return
            scopes.pop()
    raise ValueError(f"{kernel.name} does not end")


def _statement(text: str, kernel: Kernel, source: str, scopes: list[dict[str, str]], scope: int) -> None:
    if found := re.match(r"\.reg \.(\w+)\s+(.*)", text):
        for name in map(str.strip, found[2].split(",")):
            if many := re.match(r"(%\w+)<(\d+)>$", name):
                for i in range(int(many[2])):
                    kernel.registers[f"{many[1]}{i}"] = width_of(found[1])
            else:
                if scopes:
                    scopes[-1][name] = name = f"{name}_scope{scope}"
                kernel.registers[name] = width_of(found[1])
    elif found := re.match(r"\.shared \.align (\d+) \.b8 (\S+)\[(\d+)\]", text):
        start = -(-kernel.static_bytes // int(found[1])) * int(found[1])
        kernel.shared[found[2]] = start
        kernel.static_bytes = start + int(found[3])
    elif not text.startswith("."):
        predicate = None
        if found := re.match(r"@(!?)(%?\w+)\s+(.*)", text, re.S):
            predicate, text = (found[2], bool(found[1])), found[3]
        name, _, rest = text.partition(" ") if "\t" not in text else text.partition("\t")
        operands = tuple(part.strip() for part in re.split(r",(?![^{\[]*[}\]])", rest.strip()) if part.strip())
        opcode = tuple(name.strip().replace("shared::cta", "shared").split("."))  # of one block there is no other
        kernel.instructions.append(Instruction(text, predicate, opcode, operands, source))
    elif not text.startswith(".pragma"):
        raise ValueError(f"{kernel.name}: unknown directive {text}")
