"""`matpac-fast embed`: a folder of audio in, embeddings in Parquet out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ._progress import progress
from ._quiet import quiet_libraries


def main(
    source: Annotated[Path, tyro.conf.Positional],
    encoder: str,
    out: Path,
    temporal_support: float | None = None,
    hop: float | None = None,
    pool: Literal["mean", "none"] = "mean",
    layers: Literal["last", "all"] = "last",
    remainder: Literal["keep", "pad", "merge", "drop"] = "keep",
    batch_size: int = 16,
    workers: int | None = None,
    files_per_shard: int = 256,
    num_heads: int | None = None,
    device: str = "auto",
) -> int:
    """Embed every audio file of a folder.

    Example: matpac-fast embed ~/audio --encoder runs/a --temporal-support 2 --out embeddings/

    Writes shard-*.parquet with a row an embedding: path, start and end in seconds, temporal_support, encoder and
    embedding; and errors.parquet with the files that could not be used and why. Killed and run again, it goes on. Exits
    with 0, with 1 where some files failed, with 2 where all did.

    Args:
        source: folder of audio, searched with all its sub-folders.
        encoder: a run folder, a checkpoint, an official file, or a name such as untrained-tiny.
        out: folder for the embeddings.
        temporal_support: seconds of audio that one embedding sees. Default: the whole file.
        hop: seconds from one window to the next. Default: the temporal support.
        pool: mean, one embedding a window; none, one for every 160 ms.
        layers: last, or all of them.
        remainder: the end of a file that fills no window: keep it as a shorter one, pad it, merge it, or drop it.
        batch_size: windows per forward pass.
        workers: decoding threads. Default: one a core.
        files_per_shard: files in one Parquet file; a killed run loses one such file's work at most.
        num_heads: attention heads, for official checkpoints off the rule of 64 channels a head.
        device: auto, cpu, cuda or cuda:1.
    """
    from ..embed.extract import embed_collection
    from ..encoder import load_encoder

    loaded = load_encoder(encoder, None if device == "auto" else device, num_heads)
    try:
        with quiet_libraries(), progress("embedding", "files") as update:
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
                update,
            )
    except KeyboardInterrupt:
        print("the shards that are finished are kept; the same command goes on from there", file=sys.stderr)
        raise
    done = f"{report.files - report.failed} files embedded in {out}"
    if report.files_before:
        done += f", {report.files_before} of them before"
    print(done)
    if report.rows:
        seconds = report.model_seconds + report.waited_seconds
        print(
            f"{report.rows} embeddings of {report.audio_seconds / 3600:.2f} h of audio in {seconds:.1f} s, "
            f"{report.audio_seconds / seconds:.0f} times real time; {report.limit} was the limit"
        )
    if report.failed:
        print(f"{report.failed} files could not be used; {out / 'errors.parquet'} says why")
        return 2 if report.failed >= report.files else 1
    return 0
