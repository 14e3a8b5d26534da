"""Which crop is trained on when: pure functions of (seed, step, index), with no state and no global random numbers.

Sample g = step * batch_size + index is the g-th of an endless walk over the corpus: epoch g // n visits all n clips
once, or each as often as it is told, in an order of its own. A batch may span two epochs, so no clip is ever left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

Short = Literal["drop", "repeat", "zeros"]

# What a random number is for; keeps the streams of one seed apart.
_ORDER, _START, _LENGTH, _REPLACE = 1, 2, 3, 4
_ROUNDS = 8
_U64 = np.uint64


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 of each counter, wrapping; the same as `reference.splitmix64`."""
    x = x + _U64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def _stream(seed: int, purpose: int, counter: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Independent 64-bit noise for each (seed, purpose, counter)."""
    key = splitmix64(splitmix64(np.array([seed % 2**64], _U64)) ^ _U64(purpose))
    return splitmix64(key ^ splitmix64(counter))


def permute(position: NDArray[np.uint64], n: int, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The image of each position under the permutation of range(n) that its key names; O(1) memory a position.

    A Feistel network permutes the 4**h numbers next above n; positions that land beyond n walk on along their cycle
    until they land inside (Black and Rogaway, CT-RSA 2002), fewer than four times on average.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = _U64((1 << half) - 1)
    keys = [splitmix64(key + _U64(i)) for i in range(_ROUNDS)]
    out = position.copy()
    walking = np.arange(len(out))
    while len(walking):
        left, right = out[walking] >> _U64(half), out[walking] & low
        for round_key in keys:
            left, right = right, left ^ (splitmix64(right ^ round_key[walking]) & low)
        out[walking] = (left << _U64(half)) | right
        walking = walking[out[walking] >= n]
    return out


@dataclass(frozen=True)
class Plan:
    """One batch, or one rank's slice of it: what to read, before anything is read.

    Attributes:
        step: of the optimiser, from 0.
        crop: samples of each crop.
        index: (B,) place in the global batch; with the step it names the mask.
        clips: (B,) place in the corpus.
        starts: (B,) first sample of the crop. A clip shorter than the crop, where such are used, starts at 0.
    """

    step: int
    crop: int
    index: NDArray[np.int64]
    clips: NDArray[np.int64]
    starts: NDArray[np.int64]


class Sampler:
    """Draws the crops of every step, from `n_clips` clips.

    Args:
        frames: (clips,) int64, samples of each clip, `Corpus.frames`.
        crops: samples of a crop. Where there are several lengths each step draws one of them, for its whole batch.
        batch_size: crops a step, over all ranks.
        seed: names the whole sequence.
        short: clips shorter than the longest crop are left out ("drop", as official), or, where shorter than the crop
            at hand, used whole: repeated from their beginning ("repeat") or followed by silence ("zeros").
        rank, world: this process draws its contiguous slice of each global batch.
        visits: (clips,) int, how often an epoch visits each; once by default.

    Raises:
        ConfigError: no clip is long enough, or the ranks do not divide the batch.
    """

    def __init__(
        self,
        frames: NDArray[np.int64],
        crops: Sequence[int],
        batch_size: int,
        seed: int,
        short: Short = "drop",
        rank: int = 0,
        world: int = 1,
        visits: NDArray[np.int64] | None = None,
    ):
        if batch_size % world:
            raise ConfigError(f"a batch of {batch_size} does not divide over {world} processes")
        self.crops, self.batch_size, self.seed, self.short = tuple(crops), batch_size, seed, short
        self._frames = np.asarray(frames, np.int64)
        clips = np.flatnonzero(self._frames >= (max(crops) if short == "drop" else 1))
        self.n_clips = len(clips)
        self._clips = clips if visits is None else np.repeat(clips, visits[clips])  # of one epoch
        self._slice = np.arange(batch_size, dtype=np.int64).reshape(world, -1)[rank]
        if not len(self._clips):
            raise ConfigError(
                f"no clip is as long as a crop, {max(crops)} samples; the longest of {len(self._frames)} has "
                f"{self._frames.max(initial=0)}: choose a shorter crop, or take short clips too, by "
                "pretrain's --pad-short repeat or --pad-short zeros (in Python TrainConfig's pad_short)"
            )

    def __len__(self) -> int:
        """Crops an epoch."""
        return len(self._clips)

    @property
    def rows(self) -> int:
        """Crops of this rank a step."""
        return len(self._slice)

    @property
    def n_dropped(self) -> int:
        """Clips of the corpus that are never drawn."""
        return len(self._frames) - self.n_clips

    def epoch(self, step: int) -> float:
        """Epochs done before `step`."""
        return step * self.batch_size / len(self)

    def plan(self, step: int) -> Plan:
        """The crops of `step`, the same whenever, wherever and in whatever order it is asked."""
        n = len(self)
        sample = (step * self.batch_size + self._slice).astype(_U64)
        place = permute(sample % _U64(n), n, _stream(self.seed, _ORDER, sample // _U64(n)))
        crop = self.crops[int(_stream(self.seed, _LENGTH, np.array([step], _U64))[0] % _U64(len(self.crops)))]
        return self._plan(step, crop, sample, place)

    def replace(self, plan: Plan, rows: NDArray[np.bool_], attempt: int) -> Plan:
        """`plan` with other clips, drawn at random, in the rows whose clips cannot be read."""
        sample = (plan.step * self.batch_size + self._slice).astype(_U64)
        place = _stream(self.seed, _REPLACE + attempt, sample) % _U64(len(self))
        other = self._plan(plan.step, plan.crop, sample, place)
        clips, starts = np.where(rows, other.clips, plan.clips), np.where(rows, other.starts, plan.starts)
        return Plan(plan.step, plan.crop, plan.index, clips, starts)

    def _plan(self, step: int, crop: int, sample: NDArray[np.uint64], place: NDArray[np.uint64]) -> Plan:
        clips = self._clips[place.astype(np.int64)]
        room = np.maximum(self._frames[clips] - crop, 0) + 1  # starts to choose from
        starts = (_stream(self.seed, _START, sample) % room.astype(_U64)).astype(np.int64)
        return Plan(step, crop, self._slice, clips, starts)
