"""Numbers in words, as the summaries of the commands say them."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and ends of lines


def plain(text: str) -> str:
    """Control characters as \\xNN: files and weights may come from anybody, and a terminal obeys what it is sent."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def count(n: int, what: str) -> str:
    """ "1 file", "2 files"."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def length(seconds: float) -> str:
    """ "4.2 s", "4.2 min" or "4.20 h"."""
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
