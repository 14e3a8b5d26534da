"""One worker of `embed_collection`: claims shards, has their files decoded, and embeds them until all are done."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..audio.ahead import in_order
from .lease import Leases
from .manifest import Manifest, read_manifest
from .shard import Audio, Job, ShardEmbedder, Work
from .source import Entry, Source
from .writer import shard_path, write_errors

WORKER, _SHARD = "worker-", "shard-"
_LOOK_SECONDS = 5.0  # from one look at what the others have done to the next


@dataclass
class Report(Work):
    """What a call of `embed_collection` found and did: `files`, `rows` and seconds are this worker's own."""

    total: int = 0  # files of the collection
    before: int = 0  # of these, done before this call
    failed: int = 0  # of the collection
    failed_before: int = 0  # of these, before this call, and the unusable ones
    unusable: int = 0  # of these, of kinds or names that nothing reads: they are never tried
    failed_here: int = 0  # of these, in this worker's hands
    stopped: bool = False  # for too many failures
    out: Path = Path()
    # Files of another size than when they were embedded, and those that are no longer there: their old rows stay.
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)

    @property
    def embedded(self) -> tuple[int, int, int]:
        """Files that have embeddings: from before this call, from this worker, from others meanwhile."""
        before, here = self.before - self.failed_before, self.files - self.failed_here
        return before, here, max(0, self.total - self.failed - before - here)

    @property
    def limit(self) -> str:
        """Which of the two was the limit."""
        return "decoding" if self.waited_seconds > self.model_seconds else "the model"


@dataclass
class Progress:
    """How far a collection is; seconds are of audio, as the files' headers state them."""

    seconds: float = 0.0
    total_seconds: float = 0.0
    files: int = 0
    total_files: int = 0
    own_files: int = 0
    own_seconds: float = 0.0
    workers: int = 1


class _TooManyErrors(Exception):
    pass


class Worker:
    """Claims shards and embeds them until all are done."""

    def __init__(
        self,
        manifest: Manifest,
        source: Source,
        out: Path,
        embedder: ShardEmbedder,
        settings: dict[str, Any],
        leases: Leases,
        report: Report,
        max_errors: int | None,
        progress: Callable[[Progress], None],
    ):
        self._manifest, self._source, self._out, self._settings = manifest, source, out, settings
        self._embedder, self._leases, self._report, self._tell = embedder, leases, report, progress
        self._kind: str = settings["format"]
        self._missing = {i: None for i in range(len(manifest.shards)) if not self._is_done(i)}  # an ordered set
        self._claimed: deque[int] = deque()  # first the shard in hand, then those whose files are being decoded
        self._failed: list[tuple[str, str]] = []  # of the shard in hand
        self._errors_left = None if max_errors is None else max_errors - len(manifest.errors(out, self._kind))
        homes = manifest.homes()
        self._done_before = set(range(len(manifest.shards))) - set(self._missing)
        report.total, report.unusable = len(manifest), len(manifest.unusable)
        report.before = report.total - sum(homes[e.path] == i for i in self._missing for e in manifest.shards[i])
        self._sizes = [  # of each shard: its file's name, its files and their seconds
            (shard_path(out, i, self._kind).name, len(shard), sum(e.seconds for e in shard))
            for i, shard in enumerate(manifest.shards)
        ]
        self._progress = Progress(
            total_seconds=sum(seconds for _, _, seconds in self._sizes),
            total_files=sum(files for _, files, _ in self._sizes),
        )
        self._in_hand = [0, 0.0]  # files and seconds of the shard in hand
        self._looked = 0.0
        self._ahead = 0.0  # seconds of the file in hand that are counted already
        embedder.tick, embedder.within = self._tick, self._within

    def run(self, threads: int) -> None:
        """Return once every shard is there."""
        self._look()  # what is done before this worker begins tells nothing about its speed
        try:
            while self._missing:
                self._stop_at_too_many()  # too many may have failed before
                self._embed_what_is_free(threads)
                self._look()
                if self._missing:  # all that is left is in others' hands
                    time.sleep(min(1.0, self._leases.seconds / 10))
            # Others may be at work on shards that were added since: those are not this worker's to clear.
            self._leases.clear(_name(shard) for shard in range(len(self._manifest.shards)))
        except _TooManyErrors:
            self._report.stopped = True
        self._look()
        manifest = read_manifest(self._out) or self._manifest  # others may have added to it
        errors = manifest.errors(self._out, self._kind) + self._failed
        homes = self._manifest.homes()
        shards = [homes.get(path) for path, _ in errors]  # None: of what stands in no shard
        self._report.failed = len(errors)
        self._report.failed_before = sum(shard is None or shard in self._done_before for shard in shards)
        self._write(lambda: write_errors(self._out, errors))

    def run_only(self, shards: Sequence[int], threads: int) -> None:
        """Return once nothing more of these shards can be had."""
        self._missing = {i: None for i in shards if i in self._missing}
        self._embed_what_is_free(threads)

    def _embed_what_is_free(self, threads: int) -> None:
        with closing(in_order(self._jobs(), threads)) as audio:
            while (first := self._embedder.waited(audio)) is not None:
                shard = self._claimed[0]
                if self._is_done(shard):  # by another, since this worker stood still for longer than its leases last
                    deque(itertools.islice(audio, len(self._manifest.shards[shard]) - 1), maxlen=0)
                    self._give_back(shard)
                else:
                    self._embed(shard, itertools.chain([first], audio))

    def _embed(self, shard: int, audio: Iterator[Audio]) -> None:
        rows = self._embedder.embed(self._manifest.shards[shard], audio, self._out)
        with closing(rows):
            if self._is_done(shard):  # by another, to whom this worker seemed dead: what is there stays
                self._failed = []
            else:
                if self._failed:
                    self._source.check_there()
                self._write(lambda: rows.write(self._out, shard, self._kind, self._settings))
        self._give_back(shard)
        self._report.failed_here += len(self._failed)
        self._failed, self._in_hand = [], [0, 0.0]

    def _give_back(self, shard: int) -> None:
        """The first of those claimed, which is done."""
        self._claimed.popleft()
        self._missing.pop(shard)
        self._leases.release(_name(shard))

    def _write(self, write: Callable[[], object]) -> None:
        """Call `write`, and once more where the file that it was writing has vanished.

        A worker that stood still for long was given up. Whoever came since took the folder for idle, and cleared away
        what it was writing. Nothing is lost: the rows stay in their spool until it is closed. With its lease renewed
        this worker is seen again, so nobody does that a second time.
        """
        try:
            write()
        except FileNotFoundError:
            self._leases.renew()
            write()

    def _jobs(self) -> Iterator[Job]:
        """Decoding of the files of one shard after another, each claimed once the threads get to it."""
        while (shard := self._claim()) is not None:
            self._claimed.append(shard)
            yield from self._embedder.jobs(self._source, self._manifest.shards[shard])

    def _claim(self) -> int | None:
        taken = self._leases.taken()
        for shard in list(self._missing):
            if shard in self._claimed:
                continue
            if self._is_done(shard):
                self._missing.pop(shard)
            elif self._leases.claim(_name(shard), taken):
                if not self._is_done(shard):  # its last owner may have finished in between
                    return shard
                self._leases.release(_name(shard))
                self._missing.pop(shard)
        return None

    def _is_done(self, shard: int) -> bool:
        return shard_path(self._out, shard, self._kind).exists()

    def _tick(self, entry: Entry, reason: str | None) -> None:
        if reason is not None:
            self._failed.append((entry.path, reason))
            if self._errors_left is not None:
                self._errors_left -= 1
                self._stop_at_too_many()
        self._in_hand[0] += 1
        self._progress.own_files += 1
        self._progress.files += 1
        self._count(entry.seconds)
        self._ahead = 0.0

    def _within(self, entry: Entry, seconds: float) -> None:
        self._count(min(seconds, entry.seconds))

    def _count(self, seconds: float) -> None:
        """So many seconds of the file in hand are done: tell the others, and whoever listens."""
        more, self._ahead = seconds - self._ahead, seconds
        self._in_hand[1] += more
        self._progress.own_seconds += more
        self._progress.seconds += more
        self._leases.status = {"shard": self._claimed[0], "files": self._in_hand[0], "seconds": self._in_hand[1]}
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._look()
        self._tell(self._progress)

    def _stop_at_too_many(self) -> None:
        if self._errors_left is not None and self._errors_left < 0:
            raise _TooManyErrors

    def _look(self) -> None:
        """Count what is done, by all."""
        self._looked = time.monotonic()
        there = set(os.listdir(self._out))
        mine = self._claimed and self._sizes[self._claimed[0]][0] not in there  # else another has made it meanwhile
        files, seconds = self._in_hand if mine else (0, 0.0)
        for i, (name, shard_files, shard_seconds) in enumerate(self._sizes):
            if name in there:
                if i not in self._claimed:
                    self._missing.pop(i, None)
                files, seconds = files + shard_files, seconds + shard_seconds
        others = self._leases.others(WORKER)
        self._progress.workers = 1 + len(others)
        others = [said for said in others if said.get("shard") in self._missing]  # else it is counted already
        self._progress.files = files + sum(said.get("files", 0) for said in others)
        self._progress.seconds = seconds + sum(said.get("seconds", 0.0) for said in others)
        self._tell(self._progress)


def _name(shard: int) -> str:
    return f"{_SHARD}{shard:05d}"
