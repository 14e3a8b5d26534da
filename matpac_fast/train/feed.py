"""Reads crops ahead of the training step, in one background thread, onto the device."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .sampler import Plan, Sampler


class Clips(Protocol):
    """What training needs of a corpus; `audio.corpus.Corpus` is one."""

    @property
    def frames(self) -> NDArray[np.int64]: ...

    @property
    def fingerprint(self) -> str: ...

    def name(self, clip: int) -> str: ...

    def gather(
        self, indices: NDArray[np.int64], starts: NDArray[np.int64], n: int, out: NDArray[np.int16] | None = None
    ) -> NDArray[np.int16]: ...


@dataclass(frozen=True)
class Batch:
    """The crops of one step on the device, still as int16: the log-mel is computed there."""

    plan: Plan
    wave: Tensor  # (B, S) int16
    index: Tensor  # (B,) int64, place in the global batch


def read_crops(clips: Clips, plan: Plan, short: str, out: NDArray[np.int16]) -> None:
    """Fill `out` (B, S) with the crops of `plan`; a clip shorter than S is repeated or followed by silence."""
    length = clips.frames[plan.clips]
    whole = length >= out.shape[1]
    if whole.all():
        clips.gather(plan.clips, plan.starts, out.shape[1], out=out)
        return
    out[whole] = clips.gather(plan.clips[whole], plan.starts[whole], out.shape[1])
    for row in np.flatnonzero(~whole):
        clip = clips.gather(plan.clips[row : row + 1], np.zeros(1, np.int64), int(length[row]))[0]
        if short == "repeat":
            out[row] = np.resize(clip, out.shape[1])
        else:
            out[row, : len(clip)] = clip
            out[row, len(clip) :] = 0


class Feed:
    """Iterates over the batches of steps `first` to `last` - 1.

    One thread reads `depth` batches ahead. On CUDA it reads into pinned memory and copies on a stream of its own; the
    training stream waits for the copy on the device, the host never does.
    """

    def __init__(self, clips: Clips, sampler: Sampler, device: torch.device, first: int, last: int, depth: int = 2):
        self._clips, self._sampler, self._device = clips, sampler, device
        self.waited = 0.0  # seconds that the training step has waited for data
        self._batches: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(first, last), name="feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        item = self._batches.get()
        self.waited += time.perf_counter() - start
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        batch, copied = item
        if copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copied)
            batch.wave.record_stream(stream)
            batch.index.record_stream(stream)
        return batch

    def close(self) -> None:
        """Stop the thread; safe to call twice."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._batches.get(timeout=0.05)
            except queue.Empty:
                continue

    def _run(self, first: int, last: int) -> None:
        try:
            read = self._pinned_reader() if self._device.type == "cuda" else self._read
            for step in range(first, last):
                item = read(self._sampler.plan(step))
                if self._stop.is_set():
                    return
                self._batches.put(item)
            self._batches.put(None)
        except BaseException as error:
            self._batches.put(error)

    def _read(self, plan: Plan) -> tuple[Batch, None]:
        wave = np.empty((len(plan.clips), plan.crop), np.int16)
        read_crops(self._clips, plan, self._sampler.short, wave)
        return Batch(plan, torch.from_numpy(wave), torch.from_numpy(plan.index)), None

    def _pinned_reader(self):
        stream = torch.cuda.Stream(self._device)
        sampler = self._sampler
        # Two slots: one is read into while the other is still being copied to the device.
        slots = [torch.empty(sampler.rows, max(sampler.crops), dtype=torch.int16, pin_memory=True) for _ in range(2)]
        copied = [torch.cuda.Event(), torch.cuda.Event()]

        def read(plan: Plan) -> tuple[Batch, torch.cuda.Event]:
            slot = plan.step % 2
            copied[slot].synchronize()
            pinned = slots[slot].flatten()[: len(plan.clips) * plan.crop].view(-1, plan.crop)
            read_crops(self._clips, plan, sampler.short, pinned.numpy())
            index = torch.from_numpy(plan.index).pin_memory()
            with torch.cuda.stream(stream):
                wave = pinned.to(self._device, non_blocking=True)
                batch = Batch(plan, wave, index.to(self._device, non_blocking=True))
                copied[slot] = torch.cuda.Event()
                copied[slot].record(stream)
            return batch, copied[slot]

        return read
