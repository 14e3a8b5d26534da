"""Decode in threads, embed in batches, write shard by shard; what is there already is not done again."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..audio.decode import decoder_versions, read_audio
from ..encoder import Embeddings, Encoder
from ..errors import AudioError, ConfigError
from .manifest import keep_settings, make_manifest
from .writer import read_errors, shard_path, write_errors, write_shard

# Files are embedded together until they hold this much audio, so that short ones fill batches and memory stays bounded.
_GROUP_SECONDS = 300.0


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
    encoder: Encoder,
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
        encoder, temporal_support, hop, pool, layers, remainder, batch_size: as `Encoder.embed` takes them.
        workers: decoding threads; by default one a core.
        files_per_shard: files in one Parquet file.
        progress: called with (files done, files in all).

    Raises:
        AudioError: no such folder, or no audio in it.
        ConfigError: an option that cannot be, or `out` holds other embeddings.
    """
    source, out = Path(source), Path(out)
    if files_per_shard < 1:
        raise ConfigError(f"files_per_shard is {files_per_shard}; expected at least 1")
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
    with ThreadPoolExecutor(workers or os.cpu_count()) as threads:
        for i, names in enumerate(manifest.shards):
            path = shard_path(out, i)
            if path.exists():
                report.files_before += len(names)
                done += len(names)
                progress(done, report.files)
            else:
                found: list[tuple[str, Embeddings]] = []
                failed: list[tuple[str, str]] = []
                waves = _decode(threads, source, names, encoder.sample_rate, report)
                for group in _groups(waves, failed, _GROUP_SECONDS * encoder.sample_rate):
                    clock = time.perf_counter()
                    embedded = [
                        encoder.embed(wave, encoder.sample_rate, batch_size=batch_size, **options) for _, wave in group
                    ]
                    found += [(name, one) for (name, _), one in zip(group, embedded, strict=True)]
                    report.model_seconds += time.perf_counter() - clock
                    report.audio_seconds += sum(len(wave) for _, wave in group) / encoder.sample_rate
                    progress(done + len(found) + len(failed), report.files)
                report.rows += _write(path, found, failed, settings, shape[1:])
                done += len(names)
                progress(done, report.files)
            errors += read_errors(path)
    report.failed = len(errors)
    write_errors(out, errors)
    return report


def _decode(
    threads: ThreadPoolExecutor, source: Path, names: list[str], sample_rate: int, report: Report
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Each file's wave, or the reason why it has none, in order; a few files ahead of who asks."""

    def read(name: str) -> np.ndarray | str:
        try:
            return read_audio(source / name, sample_rate)
        except AudioError as error:
            return str(error).removeprefix(f"{source / name}: ")

    ahead = deque()
    rest = iter(names)
    for name in rest:
        ahead.append((name, threads.submit(read, name)))
        if len(ahead) < 4 * (threads._max_workers):
            continue
        yield _next(ahead, report)
    while ahead:
        yield _next(ahead, report)


def _next(ahead: deque, report: Report) -> tuple[str, np.ndarray | str]:
    name, future = ahead.popleft()
    clock = time.perf_counter()
    result = future.result()
    report.waited_seconds += time.perf_counter() - clock
    return name, result


def _groups(
    waves: Iterator[tuple[str, np.ndarray | str]], failed: list[tuple[str, str]], samples: float
) -> Iterator[list[tuple[str, np.ndarray]]]:
    """Gather files until they hold `samples`; those that have a reason instead of a wave go to `failed`."""
    group: list[tuple[str, np.ndarray]] = []
    held = 0
    for name, wave in waves:
        if isinstance(wave, str):
            failed.append((name, wave))
            continue
        group.append((name, wave))
        held += len(wave)
        if held >= samples:
            yield group
            group, held = [], 0
    if group:
        yield group


def _write(
    path: Path,
    found: list[tuple[str, Embeddings]],
    failed: list[tuple[str, str]],
    settings: dict[str, Any],
    shape: tuple[int, ...],
) -> int:
    names = [name for name, one in found for _ in range(len(one))]
    empty = np.empty(0)
    start = np.concatenate([empty, *(one.start.numpy() for _, one in found)])
    end = np.concatenate([empty, *(one.end.numpy() for _, one in found)])
    values = np.concatenate(
        [np.empty((0, *shape), np.float32), *(one.values.float().cpu().numpy() for _, one in found)]
    )
    write_shard(path, names, start, end, values, settings, failed)
    return len(names)
