"""How a command's signature becomes its options."""

from __future__ import annotations

import functools
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from ..errors import MatpacFastError

# Where a path is wanted: one that is empty, as from a variable that is not set, would be the current folder, and an
# address a folder by its name.
_NO_PATH = re.compile(r"|[a-z][a-z0-9+.-]*://.*", re.IGNORECASE | re.DOTALL)
paths = tyro.constructors.ConstructorRegistry()


@paths.primitive_rule
def _path(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
    """How the options that are paths are read."""
    if info.type is not Path:
        return None

    def read(words: list[str]) -> Path:
        if _NO_PATH.fullmatch(words[0]):
            raise MatpacFastError(f"{words[0]!r} is no path; expected that of a file or folder of this machine")
        return Path(words[0])

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


@functools.cache  # once a command: what is annotated is not what it was
def described(main: Callable[..., Any]) -> Callable[..., Any]:
    """`main`, annotated so that tyro shows it plainly.

    An option whose default is None is one that may be left out, and its text says what happens then: no "None" among
    its values, no "(default: None)" behind it, and a switch, which may be None too, is --name or --no-name. What has
    no option's name is called by its own: usage: ... SOURCE OUT.
    """
    hints = typing.get_type_hints(main, include_extras=True)
    for name, parameter in inspect.signature(main).parameters.items():
        if parameter.default is None:
            hints[name] = Annotated[hints[name], tyro.conf.DisallowNone, tyro.conf.arg(help_behavior_hint="")]
        if tyro.conf.Positional in typing.get_args(hints[name]):
            shown = tyro.conf.arg(metavar=name.upper())
            if typing.get_origin(typing.get_args(hints[name])[0]) is tuple:  # which tyro lets be empty, no command does
                shown = tyro.conf.arg(metavar=f"{name.upper()} ...", help_behavior_hint="(required)")
            hints[name] = Annotated[hints[name], shown]
    main.__annotations__ = hints
    # tyro would break the help where the docstring breaks its lines.
    main.__doc__ = re.sub(r"\n {12}(?=\S)", " ", main.__doc__ or "")
    return main


def description(main: Callable[..., Any]) -> str:
    """What stands before the options in --help, in lines of the terminal's width.

    tyro joins lines that begin with a letter; so all but a paragraph's first begin further right.
    """
    text = inspect.cleandoc(main.__doc__ or "").partition("\nArgs:\n")[0]
    lines = textwrap.TextWrapper(shutil.get_terminal_size().columns, subsequent_indent="  ", break_on_hyphens=False)
    return "\n\n".join(map(lines.fill, text.split("\n\n")))
