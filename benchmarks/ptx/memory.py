"""A GPU's memory on the host: who may touch what, who has touched what since when, and what each access costs.

Addresses are the host's own for global memory, so that a tensor on the CPU is what a kernel works on, and count from 0
in the shared memory of a block.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

WARP = 32
Threads = np.ndarray  # indices of threads
GRANULE = 2  # bytes: the smallest thing that any kernel here loads or stores
NOBODY, SEVERAL = -1, -2


class Fault(Exception):
    """What a GPU would answer with a fault, or with a result that depends on chance."""


@dataclass
class Clock:
    """How many barriers lie behind each thread of the blocks under way: of its block and of its warp."""

    threads: int  # a block's
    first: int  # the first thread under way; threads are numbered from the launch's first
    barriers: np.ndarray
    warp_barriers: np.ndarray


class Watch:
    """Finds accesses to the same bytes that no barrier orders, at least one of them a write."""

    def __init__(self, size: int):
        n = -(-size // GRANULE)
        self.writer, self.reader = (np.full(n, NOBODY, np.int32) for _ in range(2))
        self.reader_warp, self.reader_block = np.full(n, NOBODY, np.int32), np.full(n, NOBODY, np.int32)
        self.written_at, self.read_at = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.written_at_warp, self.read_at_warp = np.zeros(n, np.int32), np.zeros(n, np.int32)

    def _after_write(self, where: np.ndarray, who: np.ndarray, now: Clock) -> np.ndarray:
        """Whether what last wrote there lies behind a barrier, or is the same thread, or nobody."""
        writer = self.writer[where]
        apart = (writer >= 0) & (writer != who)
        if not apart.any():
            return ~apart
        mine = who - now.first
        block = (writer // now.threads == who // now.threads) & (now.barriers[mine] > self.written_at[where])
        warp = (writer // WARP == who // WARP) & (now.warp_barriers[mine] > self.written_at_warp[where])
        return ~apart | block | warp

    def _after_read(self, where: np.ndarray, who: np.ndarray, now: Clock) -> np.ndarray:
        reader = self.reader[where]
        apart = (reader != NOBODY) & (reader != who)
        if not apart.any():
            return ~apart
        mine = who - now.first
        block = (self.reader_block[where] == who // now.threads) & (now.barriers[mine] > self.read_at[where])
        warp = (self.reader_warp[where] == who // WARP) & (now.warp_barriers[mine] > self.read_at_warp[where])
        return ~apart | block | warp

    def read(self, where: np.ndarray, who: np.ndarray, now: Clock) -> np.ndarray:
        """`where`: (n, granules an access), `who`: (n,). Which accesses meet a write that nothing orders before."""
        who = np.broadcast_to(who[:, None], where.shape)
        conflict = np.logical_or.reduce(~self._after_write(where, who, now), axis=1)
        # Readers of one period between barriers count together, those of earlier ones no more.
        barriers, block, warp = now.barriers[who - now.first], who // now.threads, who // WARP
        same = (self.reader_block[where] == block) & (self.read_at[where] == barriers)
        apart = same & (self.reader[where] != who)
        warps_apart = same & (self.reader_warp[where] != warp)
        blocks_apart = (self.reader_block[where] != NOBODY) & (self.reader_block[where] != block)
        self.reader[where], self.reader_warp[where], self.reader_block[where] = who, warp, block
        apart |= self.reader[where] != who  # in this very access
        warps_apart |= self.reader_warp[where] != warp
        blocks_apart |= self.reader_block[where] != block
        self.reader[where[apart | blocks_apart]] = SEVERAL
        self.reader_warp[where[warps_apart | blocks_apart]] = SEVERAL
        self.reader_block[where[blocks_apart]] = SEVERAL
        self.read_at[where], self.read_at_warp[where] = barriers, now.warp_barriers[who - now.first]
        return conflict

    def read_by_several(self, where: np.ndarray) -> None:
        """Other warps of the block read with those of the last `read`."""
        self.reader[where], self.reader_warp[where] = SEVERAL, SEVERAL

    def write(
        self, where: np.ndarray, who: np.ndarray, now: Clock, changed: np.ndarray, lost: np.ndarray
    ) -> np.ndarray:
        """The same of writes, when they are done.

        `changed`, (n,): there was something else before; who writes what is there already disturbs nobody.
        `lost`, (n,): something else is there afterwards, of another thread.
        """
        who = np.broadcast_to(who[:, None], where.shape)
        ordered = self._after_write(where, who, now) & self._after_read(where, who, now)
        conflict = np.logical_or.reduce(~ordered, axis=1)
        mine = who - now.first
        self.writer[where] = who
        self.written_at[where], self.written_at_warp[where] = now.barriers[mine], now.warp_barriers[mine]
        return (conflict & changed) | lost


def granules(address: np.ndarray, size: int) -> np.ndarray:
    """(n,) addresses -> (n, granules of `size` bytes)."""
    first = address.astype(np.int64) // GRANULE
    return first[:, None] + np.arange(max(size // GRANULE, 1))


class Region:
    """`size` bytes at `start`, which stay alive with `owner`."""

    def __init__(self, start: int, size: int, owner: object = None):
        self.start, self.size, self.owner = start, size, owner
        begin, end = start & ~15, (start + size + 15) & ~15
        raw = (ctypes.c_uint8 * (end - begin)).from_address(begin)
        self.shift = start - begin
        self.bytes = np.ctypeslib.as_array(raw)
        self.watch: Watch | None = None


class Global:
    """What has been allocated, and nothing else."""

    def __init__(self):
        self.regions: list[Region] = []
        self.starts: list[int] = []

    def add(self, start: int, size: int, owner: object = None) -> None:
        place = bisect_right(self.starts, start)
        if place and self.starts[place - 1] == start and self.regions[place - 1].size >= size:
            return
        self.starts.insert(place, start)
        self.regions.insert(place, Region(start, size, owner))

    def watch(self, on: bool) -> None:
        """Begin anew, or stop."""
        for region in self.regions:
            region.watch = Watch(region.bytes.size) if on else None

    def find(self, address: np.ndarray, size: int) -> list[tuple[Region, np.ndarray | None]]:
        """The regions that accesses of `size` bytes lie in, each with which of them; None for all."""
        if address.size and (address % size).any():
            raise Fault(f"address {hex(int(address[address % size != 0][0]))} is no multiple of {size} bytes")
        low, high = int(address.min()), int(address.max())
        place = bisect_right(self.starts, low) - 1
        if place >= 0 and high + size <= self.starts[place] + self.regions[place].size:
            return [(self.regions[place], None)]
        places = np.searchsorted(np.array(self.starts, np.uint64), address, "right") - 1
        found = []
        for place in np.unique(places):
            here = np.flatnonzero(places == place)
            region = self.regions[place]
            past = address[here].astype(np.int64) - region.start + size - region.size
            if place < 0 or (past > 0).any():
                worst = int(address[here][past.argmax()])
                end = region.start + region.size
                raise Fault(f"{size} bytes at {hex(worst)} are nobody's: the nearest before ends at {hex(end)}")
            found.append((region, here))
        return found


# What one access of a warp costs.


def sectors(address: np.ndarray, size: int, warp: np.ndarray) -> tuple[int, int]:
    """32-byte sectors that the accesses of each warp touch, and how many their bytes would fill."""
    start = address.astype(np.int64)
    start = start - (int(start.min()) & ~31)
    warp = np.unique(warp, return_inverse=True)[1]  # from 0 on, for bits of their own above the address
    distinct = np.unique(warp << 44 | start)
    need = np.bincount(distinct >> 44) * size
    return len(np.unique(warp << 44 | start >> 5)), int((-(-need // 32)).sum())


def wavefronts(address: np.ndarray, size: int, lane: np.ndarray) -> tuple[int, int]:
    """Turns that shared memory takes, of 32 banks of 4 bytes, and the least for as many bytes. `lane` counts on from
    warp to warp: 8 bytes a lane are served by halves of a warp, 16 by quarters; those of a warp that read the same are
    served together."""
    share = 32 * 4 // max(size, 4)
    word = address.astype(np.int64)[:, None] // 4 + np.arange(max(size // 4, 1))
    group = np.unique(lane // share, return_inverse=True)[1]
    key = np.unique((group[:, None] << 32 | word).ravel())
    group, word = key >> 32, key & 0xFFFFFFFF
    by_bank = np.bincount(group * 32 + word % 32, minlength=32 * (int(group.max()) + 1)).reshape(-1, 32)
    turns, least = by_bank.max(1), -(-by_bank.sum(1) // 32)
    if share < 32:
        warp = np.unique(lane // share) * share // 32
        # What a group reads, as a number: the first of its warp that reads it counts.
        seen = np.stack([warp, by_bank @ np.arange(1, 33), np.bincount(group, word * word % 1_000_003)], 1)
        first = np.unique(seen, axis=0, return_index=True)[1]
        turns, least = turns[first], least[first]
    return int(turns.sum()), int(least.sum())
