"""`--set model.student_temp=0.07`: every field of the two configurations, read by the type that its class names."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..config import MatpacConfig
from ..errors import ConfigError
from ..train.begin import OPTIONS
from ..train.config import TrainConfig

CLASSES = {"model": MatpacConfig, "train": TrainConfig}
_WORDS = {int: "a whole number", float: "a number such as 0.1", bool: "true or false", type(None): "null"}


def read_fields(settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The fields and values of words such as model.depth=6, under "model" and "train".

    A value is JSON; where the field is a name, quotes may be left out. Whether a value can be is for the
    classes to say.

    Raises:
        ConfigError: no such field, one that is given twice, or a value of another type.
    """
    hints = {f"{part}.{name}": hint for part, cls in CLASSES.items() for name, hint in get_type_hints(cls).items()}
    found: dict[str, dict[str, Any]] = {part: {} for part in CLASSES}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if name not in hints:
            raise ConfigError(f"--set {setting}: there is no field {name!r}; {_near(name, list(hints))}")
        if not equals:
            raise ConfigError(f"--set {setting} has no value; expected {name}=VALUE")
        part, _, field = name.partition(".")
        if field in found[part]:
            raise ConfigError(f"--set gives {name} twice; leave one out")
        found[part][field] = _value(setting, text, hints[name])
    return found


def refuse_both(part: str, by_option: Mapping[str, Any], by_set: Mapping[str, Any]) -> None:
    """Raise ConfigError where a field has a value from its own option and another from --set."""
    if both := sorted(by_option.keys() & by_set.keys()):
        name = f"{part}.{both[0]}"
        raise ConfigError(f"{name} is given by {OPTIONS[name]} and by --set; leave one out")


def _near(name: str, names: list[str]) -> str:
    """By the field alone: its part is easily mistaken, and makes all names of one part alike."""
    fields = {known: known.partition(".")[2] for known in names}
    alike = difflib.get_close_matches(name.rpartition(".")[2], set(fields.values()))
    near = [known for known, field in fields.items() if field in alike]
    return f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(names)}"


def _value(setting: str, text: str, hint: Any) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if hint is str or get_origin(hint) is Literal:
        return value if isinstance(value, str) else text
    if not any(_is(value, kind) for kind in kinds):
        raise ConfigError(f"--set {setting}: expected {' or '.join(map(_told, kinds))}")
    return value


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, list) and all(_is(item, get_args(kind)[0]) for item in value)
    return type(value) in ((int, float) if kind is float else (kind,))


def _told(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return "a list such as " + ("[0.9, 0.95]" if get_args(kind)[0] is float else "[192, 608]")
    return _WORDS[kind]
