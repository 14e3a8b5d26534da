"""Find in nvdisasm's listing of machine code for Hopper what ptxas is known to get wrong there.

ptxas 12.8, which Triton 3.6 and 3.7 bring, loses a copy between uniform registers where matrix products on Hopper take
two tables of different swizzle from one place in shared memory: the product's descriptor is then made of what happens
to lie there, and it reads anywhere. And up to CUDA 13.2 it may give a register that is a product's first factor to
another value while the product, which is asynchronous, still reads it (https://github.com/triton-lang/triton/pull/11781).
The PTX is right, so that no interpreter and no bound on registers would tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Instruction = tuple[str, str]  # address, text


def unwritten_reads(listing: str) -> list[str]:
    """Those instructions of a kernel, as `nvdisasm -c` lists it, that read a uniform register which nothing has written
    on some way to them. A predicated write counts as one."""
    instructions, labels = _parse(listing)
    follows = [list(_successors(i, instructions, labels)) for i in range(len(instructions))]
    effects = [_effects(text) for _, text in instructions]
    # What is written on every way to an instruction; None: on no way yet.
    written: list[frozenset[int] | None] = [None] * len(instructions)
    written[0] = frozenset()
    work = [0]
    while work:
        i = work.pop()
        after = (written[i] or frozenset()) | effects[i][1]
        for j in follows[i]:
            before = written[j]
            both = after if before is None else before & after
            if both != before:
                written[j] = both
                work.append(j)
    return [
        f"{address}: {text}"
        for (address, text), (reads, _), known in zip(instructions, effects, written, strict=True)
        if known is not None and not reads <= known
    ]


def overwritten_factors(listing: str) -> list[str]:
    """Those instructions that write a register which on some way to them is the factor of a product under way."""
    instructions, labels = _parse(listing)
    follows = [list(_successors(i, instructions, labels)) for i in range(len(instructions))]
    held: list[frozenset[int] | None] = [None] * len(instructions)  # before an instruction, by any way
    held[0] = frozenset()
    work, found = [0], set()
    while work:
        i = work.pop()
        before = held[i] or frozenset()
        _, name, operands = _split(instructions[i][1])
        after = before
        if name.startswith("HGMMA"):
            if factor := re.match(r"R(\d+)", operands[1]):
                after = before | {int(factor[1]) + k for k in range(4)}
        elif name.startswith("WARPGROUP.DEPBAR") and operands[-1] == "0x0":  # all products are done
            after = frozenset()
        elif _written(name, operands) & before:
            found.add(i)
        for j in follows[i]:
            both = after | (held[j] or frozenset())
            if held[j] is None or both != held[j]:
                held[j] = both
                work.append(j)
    return [": ".join(instructions[i]) for i in sorted(found)]


def _written(name: str, operands: list[str]) -> frozenset[int]:
    """Registers, not uniform ones, that an instruction writes."""
    target = re.match(r"R(\d+)", operands[0]) if operands and not name.startswith(("ST", "RED")) else None
    if target is None:
        return frozenset()
    size = 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
    return frozenset(int(target[1]) + k for k in range(size))


def _parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and which of them each label stands before."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    in_text = False
    for line in map(str.strip, listing.splitlines()):
        if re.match(r"\.section\s", line):
            in_text = ".text." in line
        elif in_text and (label := re.match(r"(\.L_x_\d+):$", line)):
            labels[label[1]] = len(instructions)
        elif in_text and (found := re.match(r"/\*([0-9a-f]+)\*/\s+(.*?)\s*;", line)):
            instructions.append((found[1], found[2]))
    if not instructions:
        raise ValueError("no instruction found: is this nvdisasm's listing?")
    return instructions, labels


def _split(text: str) -> tuple[bool, str, list[str]]:
    """Whether it is predicated, its name and its operands."""
    found = re.match(r"@!?U?P\w+\s+(.*)", text)
    name, _, rest = (found[1] if found else text).partition(" ")
    return found is not None, name, re.split(r",\s*(?![^\[]*\])", rest.strip()) if rest.strip() else []


def _successors(i: int, instructions: list[Instruction], labels: dict[str, int]) -> Iterator[int]:
    predicated, name, operands = _split(instructions[i][1])
    if name.startswith(("BRX", "CALL", "JMP", "JMX")):
        raise ValueError(f"cannot follow {instructions[i][1]}")
    conditional = predicated or any(re.match(r"!?U?P\d", operand) for operand in operands)
    target = re.search(r"`\((\.L_x_\d+)\)", instructions[i][1]) if name.startswith("BRA") else None
    if target:
        yield labels[target[1]]
    ends = name.startswith(("BRA", "EXIT", "RET")) and not (conditional if target else predicated)
    if not ends and i + 1 < len(instructions):
        yield i + 1


def _effects(text: str) -> tuple[frozenset[int], frozenset[int]]:
    """Uniform registers read and written."""
    _, name, operands = _split(text)
    if name.startswith("HGMMA"):
        # The descriptor of a factor in shared memory is two registers; of both factors, four.
        starts = [int(n) for operand in operands for n in re.findall(r"gdesc\[UR(\d+)\]", operand)]
        first_too = not re.match(r"R\d+", operands[1])
        return frozenset(n + k for n in starts for k in ((0, 1, 2, 3) if first_too else (2, 3))), frozenset()
    wide = ".64" in name or "WIDE" in name
    written: set[int] = set()
    if operands and re.match(r"UR\d+", operands[0]):
        written = _registers(operands[0], wide)
        operands = operands[1:]
    reads = {n for operand in operands for n in _registers(operand, name == "UIADD3.64")}
    return frozenset(reads), frozenset(written)


def _registers(operand: str, wide: bool) -> set[int]:
    found = set()
    for number, suffix in re.findall(r"\bUR(\d+)\b(\.64)?", operand):
        pair = wide or suffix or operand.startswith("desc[")
        found |= {int(number), int(number) + 1} if pair else {int(number)}
    return found
