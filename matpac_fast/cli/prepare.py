"""`matpac-fast prepare`: a folder of audio in, a corpus out."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ._progress import kept, stages
from ._quiet import quiet_libraries
from ._words import count, length, plain

if TYPE_CHECKING:
    from ..audio.prepare import PrepareReport

_RATE_OF_TRAINING = 16_000  # Hz; of another one pretrain needs more than is said here


def main(
    source: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    sample_rate: int = 16_000,
    workers: int | None = None,
    shard_seconds: float = 3600.0,
    min_seconds: float = 0.1,
    silence_db: float = -70.0,
) -> int:
    """Turn a folder of audio into a corpus for pre-training.

    Example: matpac-fast prepare ~/audio corpus/

    Takes wav, flac, ogg, opus, mp3, aiff and the like, of any rate and number of channels, and writes 16-bit mono in
    shards that training reads in place; also out of tar and zip files, and Parquet files as on Hugging Face, without
    unpacking them. What cannot be used is left out; rejected.parquet says what and why. Run again,
    it goes on where it was interrupted, adds files that are new, and makes again what went with a lost or truncated
    shard; where there is nothing to do, it writes nothing.
    Exits with 0, with 2 where nothing could be used.

    Args:
        source: folder of audio or of archives of audio, searched with all its sub-folders; or one archive.
        out: folder for the corpus: a new one, or that of an earlier run.
        sample_rate: sample rate of the corpus in Hz; pre-training needs 16000, or the rate of another front end
            (docs/training.md).
        workers: threads that decode audio. Default: one a core.
        shard_seconds: seconds of audio in one shard; a killed run loses one shard's work at most.
        min_seconds: files shorter than this are left out.
        silence_db: files that are never louder than this, in dB below full scale and so negative, are left out as
            silent.
    """
    from ..audio.prepare import prepare

    units = {"listing": "archives", "preparing": "files"}
    with kept("the shards that are finished are"), quiet_libraries(), stages(units, "listing") as told:
        report = prepare(
            source,
            out,
            sample_rate=sample_rate,
            workers=workers,
            shard_seconds=shard_seconds,
            min_seconds=min_seconds,
            silence_db=silence_db,
            progress=partial(told, "preparing"),
            listing=partial(told, "listing"),
        )
    print(plain(summary(report)))
    return 0


def summary(report: PrepareReport) -> str:
    """What the corpus holds, what this run did to it, what was left out and why."""
    lines = [
        f"{report.out}: {count(report.clips, 'clip')}, {length(report.seconds)}, "
        f"{count(report.shards, 'shard')}; {report.added} added"
    ]
    if report.remade:
        lines.append(f"{count(report.remade, 'clip')} made again, because a shard was gone or cut short")
    if report.lost:
        lines.append(
            f"{count(report.lost, 'clip')} dropped: lost with a shard, and the file is gone too or cannot be used"
        )
    if report.replaced:
        lines.append(f"{count(report.replaced, 'clip')} replaced, because the file had changed")
    if report.vanished:
        lines.append(f"{count(report.vanished, 'clip')} kept, whose file is no longer in the source")
    if report.clipped:
        were = "was" if report.clipped == 1 else "were"
        lines.append(f"{count(report.clipped, 'new clip')} went beyond full scale in places and {were} clipped there")
    if report.rejected:
        reasons = ", ".join(f"{n} {reason}" for reason, n in report.rejected.items())
        left_out = count(sum(report.rejected.values()), "file")
        lines.append(f"{left_out} left out: {reasons}; {report.out / 'rejected.parquet'} says which and why")
    if report.sample_rate == _RATE_OF_TRAINING:
        lines.append(f"next: matpac-fast pretrain {shlex.quote(str(report.out))} --out runs/a{_size_for_here()}")
    return "\n".join(lines)


def _size_for_here() -> str:
    """Options for a run that ends within the day: without a GPU the official size would take more than a year."""
    import torch

    return "" if torch.cuda.is_available() else " --preset tiny --steps 2000"
