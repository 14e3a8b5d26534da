"""`matpac-fast embed`: a collection of audio in, embeddings in Parquet out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ..weights import DEFAULT
from ._progress import Rate, Update, kept, stages, told_rate
from ._quiet import quiet_libraries
from ._words import count, length, plain

if TYPE_CHECKING:
    import torch

    from ..embed.worker import Progress, Report

TOO_MANY_ERRORS = 3  # exit code


def main(
    source: Annotated[Path, tyro.conf.Positional],
    out: Path,
    encoder: str = DEFAULT,
    temporal_support: float | None = None,
    hop: float | None = None,
    pool: Literal["mean", "none"] = "mean",
    layers: Literal["last", "all"] = "last",
    remainder: Literal["keep", "pad", "merge", "drop"] = "keep",
    batch_size: int | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    format: Literal["parquet", "npz", "npy"] = "parquet",
    dtype: Literal["float32", "float16"] = "float32",
    workers: int | None = None,
    files_per_shard: int = 256,
    shard_seconds: float = 3600.0,
    max_errors: int | None = None,
    retry_errors: bool = False,
    any_decoder: bool = False,
    lease_seconds: float = 60.0,
    num_heads: int | None = None,
    device: str = "auto",
) -> int:
    """Embed every audio file of a folder, a list or an archive, alone or beside other workers.

    Example: matpac-fast embed ~/audio --temporal-support 2 --out embeddings/

    Writes shard-*.parquet with a row an embedding: path, start and end in seconds, temporal_support, encoder and
    embedding; and errors.parquet with the files that could not be used and why. Killed and run again, it goes on. The
    same command in several shells, jobs of an array or under torchrun shares the work. Exits with 0, whether or not
    files failed; with 3 where more than --max-errors did, or all; with 2 where it could not do its work.

    Args:
        source: folder of audio, searched with all its sub-folders and in tar, zip and Parquet files; a text file with
            one path a line, absolute or relative to the file's own folder; one archive; or a corpus that matpac-fast
            prepare made.
        encoder: a run folder, a checkpoint, an official file, or a name such as passt:FILE. runs/a@teacher is a run's
            teacher, runs/a@20000 its checkpoint of that step, runs/a@layer6 the network up to its sixth layer,
            runs/a@20000@teacher two of these. Default: this package's own pre-trained one.
        out: folder for the embeddings.
        temporal_support: seconds of audio that one embedding sees. Default: the whole file.
        hop: seconds from one window to the next. Default: the temporal support, so that windows do not overlap.
        pool: mean gives one embedding a window; none gives one a frame, which is 160 ms of MATPAC's.
        layers: embeddings of the last layer, or of all layers.
        remainder: the end of a file that fills no window: keep it as a shorter one, pad it with zeros, merge it into
            the last one, or drop it. A file shorter than one window is always kept, as one short window, also with
            drop; pad fills it up.
        batch_size: windows per forward pass; halved, with a warning, where memory does not suffice. Default: 16 on a
            CPU, 128 on a GPU.
        precision: number format that the encoder computes in.
        format: of the shards: parquet; npz, for numpy; npy, to be memory-mapped, with an index in Parquet beside it.
        dtype: number format that the embeddings are stored in.
        workers: threads that decode audio. Default: one a core.
        files_per_shard: files in one shard, at most; a killed worker loses one shard's work at most.
        shard_seconds: seconds of audio in one shard, at most.
        max_errors: stop, with exit code 3, once more files than this have failed. Default: never.
        retry_errors: try again the files that failed before.
        any_decoder: go on although soundfile, libsndfile or soxr is of another version than the one that the folder was
            begun with.
        lease_seconds: take over the shard of a worker on another machine that has shown no sign of life for so many
            seconds.
        num_heads: attention heads of an official checkpoint, which does not tell them. Default: the width / 64.
        device: auto, cpu, cuda or cuda:1. auto gives each worker that torchrun or srun starts its own GPU.
    """
    from ..embed.extract import embed_collection
    from ..encoder import load_encoder

    loaded = load_encoder(encoder, _device(device), num_heads, dtype=precision)
    try:
        with kept("the shards that are finished are"), quiet_libraries(), _bars() as (listing, told):
            report = embed_collection(
                source,
                out,
                loaded,
                temporal_support,
                hop,
                pool,
                layers,
                remainder,
                batch_size,
                workers,
                files_per_shard,
                told,
                listing=listing,
                shard_seconds=shard_seconds,
                dtype=dtype,
                format=format,
                max_errors=max_errors,
                retry_errors=retry_errors,
                any_decoder=any_decoder,
                lease_seconds=lease_seconds,
            )
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(out)  # a write that fails, as on a full disk, does not say where
        raise
    print(plain("\n".join(summary(report))))
    too_many = max_errors is not None and report.failed > max_errors
    return TOO_MANY_ERRORS if too_many or report.failed >= report.total else 0


def summary(report: Report) -> list[str]:
    """What is embedded, by whom and when, how fast, what was the limit, and what could not be used."""
    before, here, elsewhere = report.embedded
    if report.stopped:
        lines = ["stopped: too many files could not be used; the shards that are finished are kept"]
    else:
        done = f"{count(before + here + elsewhere, 'file')} embedded in {report.out}"
        parts = [(before, "before"), (elsewhere, "by other workers")]
        lines = [done + "".join(f", {n} of them {whom}" for n, whom in parts if n)]
    if report.rows:
        seconds = report.model_seconds + report.waited_seconds
        speed = report.audio_seconds / seconds
        lines.append(
            f"{count(report.rows, 'embedding')} of {length(report.audio_seconds)} of audio in {seconds:.1f} s, "
            f"{speed:.{0 if speed >= 10 else 2}f} times real time; {report.limit} was the limit"
        )
    if report.changed or report.gone:
        names = [*report.changed, *report.gone]
        examples = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        changed = count(len(report.changed), "file")
        lines.append(
            f"{changed} changed in size and {len(report.gone)} gone since they were embedded "
            f"({examples}): their old rows stay; to be without them, embed into a new folder"
        )
    if report.failed:
        failed = f"{count(report.failed, 'file')} could not be used; {report.out / 'errors.parquet'} says why"
        old = report.failed_before > report.unusable
        lines.append(failed + ("; --retry-errors tries those of before again" if old else ""))
    return lines


@contextlib.contextmanager
def _bars() -> Iterator[tuple[Update, Callable[[Progress], None]]]:
    """A progress bar while files are looked at, and one after it while they are embedded."""
    with stages({"listing": "files", "embedding": "s of audio"}, "listing") as hear:
        yield partial(hear, "listing"), _told(partial(hear, "embedding"))


def _told(update: Update) -> Callable[[Progress], None]:
    rate_so_far = Rate()

    def tell(progress: Progress) -> None:
        rate = rate_so_far(progress.own_seconds)
        note = f"{progress.files}/{progress.total_files} files"
        if progress.workers > 1:
            note += f", {progress.workers} workers, this one {progress.own_files} files"
            if rate:
                note += f" at {told_rate(rate)}"
        update(int(progress.seconds), int(progress.total_seconds), note)

    return tell


def _device(name: str) -> torch.device:
    """The device that is meant: with "auto", of many workers on one machine each its own GPU, or its share of one."""
    import torch

    from ..train.distributed import pick_device

    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    if name == "auto" and rank is not None and torch.cuda.is_available():
        return torch.device("cuda", int(rank) % torch.cuda.device_count())
    return pick_device(name)
