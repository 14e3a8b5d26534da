"""Reads crops ahead of the training step, in one background thread, onto the device."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..audio.corpus import Corpus
from ..errors import CorpusError
from ..oom import is_out_of_memory
from .sampler import Plan, Sampler
from .transform import Transform, transform_crops
from .watch import TrainingError

# Draws of another clip for one that cannot be read: a run goes on with half of its corpus.
_REDRAWS = 24


@dataclass(frozen=True)
class Batch:
    """The crops of one step on the device, still as int16: the log-mel is computed there."""

    plan: Plan
    wave: Tensor  # (B, S) int16
    index: Tensor  # (B,) int64, place in the global batch
    unreadable: tuple[str, ...]  # why clips that were planned could not be read; others were drawn for them


def read_crops(corpus: Corpus, plan: Plan, short: str, out: NDArray[np.int16]) -> None:
    """Fill `out` (B, S) with the crops of `plan`; a clip shorter than S is repeated or followed by silence."""
    length = corpus.frames[plan.clips]
    whole = length >= out.shape[1]
    if whole.all():
        corpus.gather(plan.clips, plan.starts, out.shape[1], out=out)
        return
    out[whole] = corpus.gather(plan.clips[whole], plan.starts[whole], out.shape[1])
    for row in np.flatnonzero(~whole):
        clip = corpus.gather(plan.clips[row : row + 1], np.zeros(1, np.int64), int(length[row]))[0]
        if short == "repeat":
            out[row] = np.resize(clip, out.shape[1])
        else:
            out[row, : len(clip)] = clip
            out[row, len(clip) :] = 0


def read_batch(corpus: Corpus, sampler: Sampler, step: int, buffer: Tensor) -> tuple[Plan, Tensor, tuple[str, ...]]:
    """Read the crops of `step` into `buffer`: the plan as carried out, the crops (B, S), and what could not be read.

    A clip in a shard that cannot be read gives its place to another one. Where several draws in turn find none that
    can, the corpus is not worth going on with, and the CorpusError is raised.
    """
    plan = sampler.plan(step)
    wave = buffer[: sampler.rows * plan.crop].view(sampler.rows, plan.crop)
    out = wave.numpy()
    reasons: dict[str, None] = {}
    for attempt in range(1 + _REDRAWS):
        try:
            read_crops(corpus, plan, sampler.short, out)
            return plan, wave, tuple(reasons)
        except CorpusError:
            bad = np.zeros(len(out), bool)
            for row in range(len(out)):
                n = min(plan.crop, int(corpus.frames[plan.clips[row]]))
                try:
                    corpus.gather(plan.clips[row : row + 1], plan.starts[row : row + 1], n)
                except CorpusError as error:
                    bad[row] = True
                    reasons[str(error)] = None
        plan = sampler.replace(plan, bad, attempt)
    raise CorpusError(next(iter(reasons)))


class Feed:
    """Iterates over the batches of steps `first` to `last` - 1.

    One thread reads `depth` batches ahead. On CUDA it reads into pinned memory and copies on a stream of its own; the
    training stream waits for the copy on the device, the host never does. `transform` changes the crops before they are
    copied.
    """

    def __init__(
        self,
        corpus: Corpus,
        sampler: Sampler,
        device: torch.device,
        first: int,
        last: int,
        depth: int = 2,
        transform: Transform | None = None,
    ):
        self._corpus, self._sampler, self._device, self._transform = corpus, sampler, device, transform
        self._samples = sampler.rows * max(sampler.crops)  # of the largest batch
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
                item = read(step)
                if self._stop.is_set():
                    return
                self._batches.put(item)
            self._batches.put(None)
        except BaseException as error:
            if is_out_of_memory(error) and not isinstance(error, TrainingError):
                text = f"the next batch does not fit into the memory of {self._device} beside the step"
                error = TrainingError(f"{text}: a larger --grad-accumulation computes the same step in less")
            self._batches.put(error)

    def _fill(self, step: int, buffer: Tensor) -> tuple[Plan, Tensor, tuple[str, ...]]:
        plan, wave, unreadable = read_batch(self._corpus, self._sampler, step, buffer)
        if self._transform is not None:
            transform_crops(self._transform, wave, torch.tensor(plan.index), step)
        return plan, wave, unreadable

    def _read(self, step: int) -> tuple[Batch, None]:
        plan, wave, unreadable = self._fill(step, torch.empty(self._samples, dtype=torch.int16))
        return Batch(plan, wave, torch.from_numpy(plan.index), unreadable), None

    def _pinned_reader(self) -> Callable[[int], tuple[Batch, torch.cuda.Event]]:
        stream = torch.cuda.Stream(self._device)
        # Two buffers: one is read into while the other is still being copied to the device.
        buffers = [torch.empty(self._samples, dtype=torch.int16, pin_memory=True) for _ in range(2)]
        copied = [torch.cuda.Event(), torch.cuda.Event()]

        def read(step: int) -> tuple[Batch, torch.cuda.Event]:
            copied[step % 2].synchronize()
            plan, wave, unreadable = self._fill(step, buffers[step % 2])
            index = torch.from_numpy(plan.index).pin_memory()
            done = torch.cuda.Event()
            with torch.cuda.stream(stream):
                wave = wave.to(self._device, non_blocking=True)
                index = index.to(self._device, non_blocking=True)
                done.record(stream)
            copied[step % 2] = done
            return Batch(plan, wave, index, unreadable), done

        return read
