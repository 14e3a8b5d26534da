"""The fields of a configuration, in the types that its class names."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

from .errors import ConfigError

_WORDS = {int: "a whole number", float: "a number", bool: "True or False", type(None): "None"}


def convert(config: Any, part: str = "") -> None:
    """Make the numbers in a dataclass, also a frozen one, Python's own: 1e1 steps are 10, np.float32(0.1) is a float.

    Raises:
        ConfigError: a value that is not what its field holds; `part` begins the message.
    """
    for name, kinds in _kinds(type(config)).items():
        value = getattr(config, name)
        if value is None and type(None) in kinds:
            continue
        try:
            object.__setattr__(config, name, _as(value, kinds[0]))
        except (TypeError, OverflowError):
            raise ConfigError(f"{part}{name} is {value!r}; expected {' or '.join(map(_told, kinds))}") from None


def made_of(fields: Any, config: Any, what: str) -> Any:
    """The `config`, a dataclass, of these fields by name; what is none of them, ConfigError, where `what` names it."""
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{what} is {fields!r}; expected its fields by name")
    if unknown := sorted(set(fields) - {field.name for field in dataclasses.fields(config)}):
        raise ConfigError(f"unknown fields in {what}, as a later version may have: {', '.join(unknown)}")
    return config(**fields)


@functools.cache
def _kinds(config: type) -> dict[str, tuple[Any, ...]]:
    """By the name of each field the type that its values are to have, and None's where they may be that."""
    hints = get_type_hints(config).items()
    return {name: get_args(hint) if isinstance(hint, types.UnionType) else (hint,) for name, hint in hints}


def _as(value: Any, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        fits = isinstance(value, (list, tuple))
        value = tuple(_as(item, get_args(kind)[0]) for item in value) if fits else value
    elif kind is bool:
        fits = isinstance(value, (bool, np.bool_))
    elif kind in (int, float):
        fits = isinstance(value, numbers.Real) and not isinstance(value, bool) and (kind is float or value % 1 == 0)
    elif get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise TypeError
        return value
    else:
        return value  # a name, which the class itself checks
    if not fits:
        raise TypeError
    make: Any = get_origin(kind) or kind
    return make(value)


def _told(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a tuple of {_WORDS[get_args(kind)[0]].removeprefix('a ')}s"
    return _WORDS[kind]
