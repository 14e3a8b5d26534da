"""A table on the screen."""

from __future__ import annotations

import sys
from typing import Literal

from ._words import plain


def show(header: list[str], body: list[list[str]], justify: Literal["left", "right"] = "left") -> None:
    """Print a table: drawn on a terminal, plain columns elsewhere."""
    body = [[plain(cell) for cell in line] for line in body]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        drawn = Table()
        for name in header:
            drawn.add_column(name, justify=justify)
        for line in body:
            drawn.add_row(*line)
        Console(markup=False, emoji=False).print(drawn)  # a run may be called a[bold] or a:bomb:
        return
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    for line in [header, *body]:
        cells = (f"{cell:{'<' if justify == 'left' else '>'}{width}}" for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
