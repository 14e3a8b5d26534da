"""What PTX's instructions on registers compute, as functions of numpy arrays.

Bit for bit where PTX tells the bits, and correctly rounded where a GPU's `approx` may be off by one or two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

KINDS = {
    "f32": np.float32, "f64": np.float64, "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "b8": np.uint8, "b16": np.uint16,
    "b32": np.uint32, "b64": np.uint64, "bf16": np.uint16, "f16": np.float16, "bf16x2": np.uint32, "f16x2": np.uint32,
    "f32x2": np.uint64, "pred": np.bool_,
}  # fmt: skip
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers to zero."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded once: the sum in float64 is rounded to odd, which the rounding to float32 does not notice."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)  # exact
    c = np.asarray(c, np.float64)
    total = np.atleast_1d(product + c)
    part = total - product
    rest = (product - (total - part)) + (c - part)  # exact as well
    even = (total.view(np.int64) & 1 == 0) & (rest != 0) & np.isfinite(total) & np.isfinite(rest)
    step = np.where((rest > 0) == (total > 0), 1, -1)
    return (total.view(np.int64) + np.where(even, step, 0)).view(np.float64).astype(np.float32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """In 64 bits of mantissa: now and then another last bit than a GPU's."""
    return (np.asarray(a, np.longdouble) * b + c).astype(np.float64)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    return (np.asarray(x).astype(np.uint32) << 16).view(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Nearest, halves away from zero; the lower 13 bits zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits).astype(np.uint32)


def _shift(left: bool, kind: str) -> Callable:
    bits = 8 * np.dtype(KINDS[kind]).itemsize

    def shift(x, by):
        by = np.asarray(by).astype(np.uint64)
        past, by = by >= bits, np.minimum(by, bits - 1).astype(x.dtype)
        if left:
            return np.where(past, x.dtype.type(0), x << by)
        return np.where(past & (x >= 0) if kind[0] == "s" else past, x.dtype.type(0), x >> by)

    return shift


def _extract(kind: str) -> Callable:
    def extract(x, start, length):  # the bits of bfe
        size = 8 * x.dtype.itemsize
        start, length = (np.asarray(v).astype(np.int64) & 0xFF for v in (start, length))
        wide = x.astype(np.int64)
        taken = np.minimum(length, np.maximum(size - start, 0))
        value = (wide >> np.minimum(start, size - 1)) & ((np.int64(1) << taken) - 1)
        if kind[0] == "s":
            top = np.minimum(start + length - 1, size - 1)
            sign = (wide >> top) & 1
            value = np.where((sign == 1) & (length > 0), value | (np.int64(-1) << taken), value)
        return value.astype(x.dtype)

    return extract


def _quotient(a, b):
    with np.errstate(divide="ignore", invalid="ignore"):
        if np.issubdtype(np.asarray(a).dtype, np.floating):
            return a / b
        # Towards zero; what a GPU gives for a division by zero is not told, and here it is the dividend.
        wide_a, wide_b = np.asarray(a).astype(object), np.where(np.asarray(b) == 0, 1, b).astype(object)
        sign = np.where((wide_a < 0) != (wide_b < 0), -1, 1)
        return (sign * (abs(wide_a) // abs(wide_b))).astype(np.asarray(a).dtype)


def _high(a, b):
    bits = 8 * a.dtype.itemsize
    if bits == 32:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * np.asarray(b).astype(wide) >> wide(32)).astype(a.dtype)
    return ((a.astype(object) * np.asarray(b).astype(object)) >> bits).astype(a.dtype)


def _permute(a, b, selector):
    """prmt: four bytes out of eight, each by three bits, a fourth of which repeats its sign."""
    eight = np.asarray(a).astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32)
    out = np.uint64(0)
    for i in range(4):
        choice = np.asarray(selector).astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = eight >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        byte = np.where(choice & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(0xFF), byte)
        out = out | byte << np.uint64(8 * i)
    return out.astype(np.uint32)


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def compare(name: str, kind: str) -> Callable:
    """setp's comparison: with a NaN false, but true for those that end in u, as equ and geu."""
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if kind[0] != "f":
        return COMPARISONS[name]
    unordered = name.endswith("u") and name[:-1] in COMPARISONS
    plain = COMPARISONS[name.removesuffix("u") if unordered else name]
    if unordered:
        return lambda a, b: plain(a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: plain(a, b) & ~np.isnan(a) & ~np.isnan(b)


def convert(to: str, source: str, modifiers: tuple[str, ...]) -> Callable:
    """cvt."""
    known = {"rn", "rna", "rzi", "rz", "sat", "ftz", "relu"}
    if set(modifiers) - known:
        raise ValueError(f"cvt.{'.'.join(modifiers)} is not known here")
    if to == "tf32":
        return to_tf32
    if to == "bf16":
        return to_bf16
    if source == "bf16":
        return lambda x: from_bf16(x).astype(KINDS[to])
    if source[0] == "f" and to[0] != "f":
        if "rzi" not in modifiers:
            raise ValueError(f"cvt.{'.'.join(modifiers)}.{to}.{source} is not known here")
        bounds = np.iinfo(KINDS[to])
        return lambda x: np.clip(np.nan_to_num(np.trunc(x)).astype(object), bounds.min, bounds.max).astype(KINDS[to])
    return lambda x: x.astype(KINDS[to])


NUMBERS = {"add", "sub", "mul", "fma", "mad", "div", "min", "max", "neg", "abs", "ex2", "lg2", "rcp", "sqrt", "rsqrt"}

# What is computed in float32, number by number: 16 bits, rounded then, which is rounding once but for fma; and pairs.
PARTS = {"bf16": np.uint16, "bf16x2": np.uint16, "f16": np.float16, "f16x2": np.float16, "f32x2": np.float32}


def _widen(x: np.ndarray, kind: str) -> np.ndarray:
    parts = np.ascontiguousarray(x).view(PARTS[kind])
    return from_bf16(parts) if kind[0] == "b" else parts.astype(np.float32)


def _by_parts(function: Callable, kind: str) -> Callable:
    def of(*arguments):
        out = np.ascontiguousarray(function(*(_widen(x, kind) for x in arguments)))
        return (to_bf16(out) if kind[0] == "b" else out.astype(PARTS[kind])).view(KINDS[kind])

    return of


def _mixed(function: Callable, kind: str) -> Callable:
    """Of numbers of 16 bits, but for the last argument and the result, which are float32."""
    return lambda *arguments: function(*(_widen(x, kind) for x in arguments[:-1]), arguments[-1])


def operation(opcode: tuple[str, ...], count: int) -> tuple[Callable, tuple[str, ...], str] | None:
    """What computes an instruction of `count` arguments: a function, the types of its arguments and that of its result.
    None for those that do more than compute."""
    name, *rest = opcode
    kind = rest[-1] if rest else ""
    if name in NUMBERS:
        if kind in PARTS:
            mixed = "f32" in rest
            modifiers = tuple(each for each in rest[:-1] if each != "f32")
            function, arguments, _ = _number(name, modifiers, "f32")
            if mixed:
                return _mixed(function, kind), (*(kind,) * (len(arguments) - 1), "f32"), "f32"
            return _by_parts(function, kind), (kind,) * len(arguments), kind
        function, arguments, result = _number(name, tuple(rest[:-1]), kind)
        if name in ("min", "max") and count == 3:
            two = function
            function, arguments = lambda a, b, c: two(two(a, b), c), (kind,) * 3
        if "ftz" in rest:
            plain = function
            function = lambda *a: flush(plain(*map(flush, a)))  # noqa: E731
        return function, arguments, result
    if name in ("and", "or", "xor"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[name], (kind, kind), kind
    if name == "not":
        return np.invert, (kind,), kind
    if name == "cnot":
        return lambda x: (x == 0).astype(x.dtype), (kind,), kind
    if name in ("shl", "shr"):
        return _shift(name == "shl", kind), (kind, "u32"), kind
    if name == "bfe":
        return _extract(kind), (kind, "u32", "u32"), kind
    if opcode == ("prmt", "b32"):
        return _permute, ("b32", "b32", "b32"), "b32"
    if name == "selp":
        return lambda a, b, p: np.where(p, a, b), (kind, kind, "pred"), kind
    if name == "setp" and len(rest) == 2:
        return compare(rest[0], kind), (kind, kind), "pred"
    if name == "cvt":
        *modifiers, to, source = rest
        if to in ("bf16x2", "f16x2"):
            half = to_bf16 if to == "bf16x2" else lambda x: np.asarray(x, np.float32).astype(np.float16).view(np.uint16)
            return lambda a, b: half(a).astype(np.uint32) << 16 | half(b), ("f32", "f32"), "b32"
        return convert(to, source, tuple(modifiers)), (source,), "b32" if to == "tf32" else to
    return None


def _number(name: str, modifiers: tuple[str, ...], kind: str) -> tuple[Callable, tuple[str, ...], str]:
    floats = kind[0] == "f"
    if not set(modifiers) <= {"rn", "ftz", "approx", "full", "lo", "hi", "wide", "NaN", "sat"} or "sat" in modifiers:
        raise ValueError(f"{name}.{'.'.join(modifiers)}.{kind} is not known here")
    if name in ("mul", "mad") and not floats:
        how = next(each for each in ("lo", "hi", "wide") if each in modifiers)
        result = WIDER[kind] if how == "wide" else kind
        wide = KINDS[result]
        product = _high if how == "hi" else lambda a, b: np.asarray(a).astype(wide) * np.asarray(b).astype(wide)
        if name == "mul":
            return product, (kind, kind), result
        return lambda a, b, c: product(a, b) + c, (kind, kind, result), result
    nan = "NaN" in modifiers
    unary: dict[str, Callable] = {
        "neg": np.negative,
        "abs": np.abs,
        "ex2": lambda x: np.exp2(x.astype(np.float64)),
        "lg2": lambda x: np.log2(x.astype(np.float64)),
        "rcp": lambda x: 1 / x.astype(np.longdouble),
        "sqrt": lambda x: np.sqrt(x.astype(np.float64)),
        "rsqrt": lambda x: 1 / np.sqrt(x.astype(np.float64)),
    }
    if name in unary:
        return lambda x: unary[name](x).astype(KINDS[kind]), (kind,), kind
    binary: dict[str, Callable] = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "div": _quotient,
        "min": np.minimum if nan or not floats else np.fmin,
        "max": np.maximum if nan or not floats else np.fmax,
    }
    if name in binary:
        return binary[name], (kind, kind), kind
    return (fma32 if kind == "f32" else fma64), (kind, kind, kind), kind
