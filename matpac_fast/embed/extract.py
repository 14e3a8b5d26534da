"""Decode in threads, embed in batches, write shard by shard; what is there already is not done again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..audio.ahead import in_order
from ..audio.decode import decoder_versions, read_audio
from ..audio_encoder import AudioEncoder
from ..errors import AudioError, ConfigError
from .manifest import keep_settings, make_manifest
from .writer import Clip, Failure, read_errors, shard_path, write_errors, write_shard


@dataclass
class Report:
    """What a call of `embed_collection` found and did."""

    files: int = 0  # of the collection
    files_before: int = 0  # of these, done by an earlier call
    rows: int = 0  # written by this call
    failed: int = 0  # of the collection
    audio_seconds: float = 0.0
    model_seconds: float = 0.0  # the model at work
    waited_seconds: float = 0.0  # the model waiting for audio

    @property
    def limit(self) -> str:
        """Which of the two was the limit."""
        return "decoding" if self.waited_seconds > self.model_seconds else "the model"


def embed_collection(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    encoder: AudioEncoder,
    temporal_support: float | None = None,
    hop: float | None = None,
    pool: str = "mean",
    layers: str = "last",
    remainder: str = "keep",
    batch_size: int = 16,
    workers: int | None = None,
    files_per_shard: int = 256,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Embed every audio file in `source` and below into Parquet shards in `out`.

    A shard is written once all of its files are embedded, so a killed run loses one shard's work at most; the same call
    again goes on with what is missing. Files that cannot be used are listed with their reason in errors.parquet.

    Args:
        source: a folder.
        out: a folder, made where it is missing; one that holds embeddings of other settings is refused.
        encoder, temporal_support, hop, pool, layers, remainder, batch_size: as `AudioEncoder.embed` takes them.
        workers: decoding threads; by default one a core.
        files_per_shard: files in one Parquet file.
        progress: called with (files done, files in all).

    Raises:
        AudioError: no such folder, or no audio in it.
        ConfigError: an option that cannot be, or `out` holds other embeddings.
    """
    source, out = Path(source), Path(out)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for name, value in (("files_per_shard", files_per_shard), ("workers", workers)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected at least 1")
    options: dict[str, Any] = dict(
        temporal_support=temporal_support, hop=hop, pool=pool, layers=layers, remainder=remainder
    )
    # Options that cannot be are named before anything is made.
    shape = encoder.embed(np.zeros(400, np.float32), encoder.sample_rate, batch_size=batch_size, **options).values.shape
    settings = {
        "encoder": encoder.id,
        "encoder_name": encoder.name,
        **options,
        "source": str(source.resolve()),
        "decoder": decoder_versions(),
    }
    manifest = make_manifest(source, out, files_per_shard, lambda: keep_settings(out, settings))
    report = Report(files=len(manifest))
    errors = list(manifest.unusable)
    done = len(errors)
    missing = {i for i in range(len(manifest.shards)) if not shard_path(out, i).exists()}
    files = (source / name for i in sorted(missing) for name in manifest.shards[i])
    waves = in_order(((_size(file), partial(_read, file, encoder.sample_rate)) for file in files), workers)
    try:
        for i, names in enumerate(manifest.shards):
            if i not in missing:
                report.files_before += len(names)
            else:
                mine = _Shard(names, waves, encoder.sample_rate, report)
                clock, waited = time.perf_counter(), report.waited_seconds
                for found in encoder.embed_many(mine.clips(), encoder.sample_rate, batch_size=batch_size, **options):
                    mine.add(found.start.numpy(), found.end.numpy(), found.values.float().cpu().numpy())
                    progress(done + len(mine.embedded) + len(mine.failed), report.files)
                report.model_seconds += time.perf_counter() - clock - (report.waited_seconds - waited)
                report.rows += write_shard(shard_path(out, i), mine.embedded, mine.failed, shape[1:], settings)
            done += len(names)
            progress(done, report.files)
            errors += read_errors(shard_path(out, i))
    finally:
        waves.close()
    report.failed = len(errors)
    write_errors(out, errors)
    return report


class _Shard:
    """The files of one shard on their way: decoded, taken by the encoder, embedded."""

    def __init__(self, names: list[str], waves: Iterator[np.ndarray | str], sample_rate: int, report: Report):
        self._names, self._waves, self._rate, self._report = names, waves, sample_rate, report
        self._taken: list[str] = []
        self.embedded: list[Clip] = []
        self.failed: list[Failure] = []

    def clips(self) -> Iterator[np.ndarray]:
        """The waves, as they come, of the files that could be read."""
        for name in self._names:
            clock = time.perf_counter()
            wave = next(self._waves)
            self._report.waited_seconds += time.perf_counter() - clock
            if isinstance(wave, str):
                self.failed.append((name, wave))
            else:
                self._report.audio_seconds += len(wave) / self._rate
                self._taken.append(name)
                yield wave

    def add(self, start: np.ndarray, end: np.ndarray, values: np.ndarray) -> None:
        """The embeddings of the next clip, which are in the order of `clips`."""
        self.embedded.append((self._taken[len(self.embedded)], start, end, values))


def _read(file: Path, sample_rate: int) -> np.ndarray | str:
    """A file's wave, or the reason why it has none."""
    try:
        return read_audio(file, sample_rate)
    except AudioError as error:
        return str(error).removeprefix(f"{file}: ")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0  # reading it will say why
