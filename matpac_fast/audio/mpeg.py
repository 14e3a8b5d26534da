"""How long an MP3 really is, where its header does not say.

libsndfile takes the length of an MP3 from its Xing, Info or VBRI header. Without one it divides the size of the file by
the bit rate of the first frame and reads no further than that: a file of variable bit rate loses its end in silence.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

# kbit/s of layer III by bit-rate index, MPEG-1 and MPEG-2/2.5; index 0 is "free", 15 is forbidden.
_MPEG1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}
FRAME = 1152  # samples a channel of an MPEG-1 frame, the longest there is


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
    """Count the frames of a layer III file that states no length; None where it states one, or is none of these."""
    with open(path, "rb") as file:
        data = _Bytes(file)
        at = _after_id3(data)
        first = _frame(data, at)
        if first is None:
            return None
        if _states_length(data[at : at + 64]):
            return None
        samples = 0
        while (found := _frame(data, at)) is not None:
            length, n = found
            if at + length > len(data):
                return Walk(samples, cut=True)
            at, samples = at + length, samples + n
        return Walk(samples, cut=False)


def _states_length(head: bytes) -> bool:
    """Whether the first frame holds a header with a length: behind the side information, whose size varies."""
    for name in (b"Xing", b"Info"):
        at = head.find(name)
        if at >= 0 and len(head) >= at + 8:
            return bool(head[at + 7] & 1)  # a flag says whether the number of frames follows
    return b"VBRI" in head


def _after_id3(data: _Bytes) -> int:
    at = 0
    while len(head := data[at : at + 10]) == 10 and head[:3] == b"ID3":
        a, b, c, d = head[6:]
        at += 10 + (a << 21 | b << 14 | c << 7 | d)
    return at


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
