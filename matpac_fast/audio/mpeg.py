"""How long an MP3 really is, where its header does not say, or says it of the first of several files joined.

libsndfile takes the length of an MP3 from its Xing, Info or VBRI header, and reads no further. Without one it divides
the size of the file by the bit rate of the first frame: a file of variable bit rate loses its end in silence.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# kbit/s of layer III by bit-rate index, MPEG-1 and MPEG-2/2.5; index 0 is "free", 15 is forbidden.
_MPEG1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
FRAME = 1152  # samples a channel of an MPEG-1 frame, the longest there is
_JUNK = 1 << 16  # bytes before a frame that are searched for it; decoders skip as much


@dataclass(frozen=True)
class Walk:
    """What walking from frame to frame found."""

    samples: int  # a channel, in the whole frames from the first on
    cut: bool  # the file ends inside a frame


class _Bytes:
    """A file's bytes by slice, a megabyte of them in memory: a mapped file that shrank would end the process."""

    def __init__(self, file: BinaryIO):
        self._handle, self._size = file.fileno(), os.fstat(file.fileno()).st_size
        self._begin, self._held = 0, b""

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, span: slice) -> bytes:
        if span.start < self._begin or span.stop > self._begin + len(self._held):
            self._begin, self._held = span.start, os.pread(self._handle, 1 << 20, span.start)
        return self._held[span.start - self._begin : span.stop - self._begin]


def walk(path: Path) -> Walk | None:
    """Count the frames of a layer III file; None where its header states all of their length, or it is none of these.

    A file may begin inside a frame, as a recording of a stream does, or be several joined, with tags between them.
    """
    with open(path, "rb") as file:
        data = _Bytes(file)
        at = _first(data, 0)
        if at is None or _states_length(data, at):
            return None
        samples = 0
        while at is not None:
            while (found := _frame(data, at)) is not None:
                length, n = found
                if at + length > len(data):
                    return Walk(samples, cut=True)
                at, samples = at + length, samples + n
            at = _first(data, at)
        return Walk(samples, cut=False)


def _states_length(data: _Bytes, at: int) -> bool:
    """Whether the frame there holds a header with the length of all frames: behind the side information, whose size
    varies."""
    head = data[at : at + 64]
    for name in (b"Xing", b"Info"):
        here = head.find(name)
        if here >= 0 and len(head) >= here + 16:
            flags = head[here + 7]
            if flags & 3 == 3 and _first(data, at + int.from_bytes(head[here + 12 : here + 16], "big")) is not None:
                return False  # more follow than the bytes that it states
            return bool(flags & 1)  # whether the number of frames follows
    return b"VBRI" in head


def _first(data: _Bytes, at: int) -> int | None:
    """The first frame from there on, behind tags and other things."""
    while len(head := data[at : at + 10]) == 10 and head[:3] == b"ID3":
        a, b, c, d = head[6:]
        at += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if head[5] & 0x10 else 0)  # a footer
    if _frame(data, at) is not None:
        return at
    places = (at + found.start() for found in re.finditer(rb"\xff[\xe2-\xff]", data[at : at + _JUNK]))
    return next((place for place in places if _in_a_row(data, place)), None)


def _in_a_row(data: _Bytes, at: int) -> bool:
    """Whether three frames follow each other: one alone may be chance."""
    for _ in range(3):
        if (found := _frame(data, at)) is None:
            return False
        at += found[0]
    return True


def _frame(data: _Bytes, at: int) -> tuple[int, int] | None:
    """(bytes, samples) of the layer III frame at a place; None where there is none."""
    head = data[at : at + 4]
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:  # sync, layer III
        return None
    version, index, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or index in (0, 15) or rate == 3:
        return None
    kbits = (_MPEG1 if version == 3 else _MPEG2)[index]
    n = FRAME if version == 3 else FRAME // 2
    return n // 8 * kbits * 1000 // _RATES[version][rate] + (head[2] >> 1 & 1), n
