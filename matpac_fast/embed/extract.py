"""Embed a collection: claim shards, decode in threads, embed in batches; what is there already is not done again.

Any number of workers may do so at once, in shells, jobs or on machines that share the disk: each is a call of
`embed_collection` with the same arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .._cores import n_cores
from ..audio.decode import decoder_versions
from ..audio_encoder import AudioEncoder
from ..backend import versions
from ..errors import ConfigError
from ..files import clear_torn
from .lease import SECONDS, Leases
from .manifest import (
    LEASES,
    SETTINGS,
    Manifest,
    check_folder,
    check_source,
    extend,
    keep_settings,
    look_over,
    read_manifest,
    retried,
    stored_names,
    taken_back,
    write_manifest,
)
from .shard import ShardEmbedder
from .source import open_source
from .worker import WORKER, Progress, Report, Worker
from .writer import DTYPES, FORMATS


def embed_collection(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    encoder: AudioEncoder,
    temporal_support: float | None = None,
    hop: float | None = None,
    pool: str = "mean",
    layers: str = "last",
    remainder: str = "keep",
    batch_size: int | None = None,
    workers: int | None = None,
    files_per_shard: int = 256,
    progress: Callable[[Progress], None] = lambda progress: None,
    *,
    listing: Callable[[int, int, str], None] = lambda done, total, note: None,
    shard_seconds: float = 3600.0,
    dtype: str = "float32",
    format: str = "parquet",
    max_errors: int | None = None,
    retry_errors: bool = False,
    any_decoder: bool = False,
    lease_seconds: float = SECONDS,
    shards: Sequence[int] | None = None,
) -> Report:
    """Embed every audio file of `source` into shards in `out`, alone or beside other workers.

    A shard is written once all of its files are embedded, so a killed worker loses one shard's work at most; the others
    take it over, or the same call again goes on with what is missing. Returns when all shards are done, by whomever.
    Files that cannot be used are listed with their reason in errors.parquet. Long files stream in bounded memory.

    Args:
        source: a folder, with all below and in archives (see `archives.members`; "train-00.tar/a.flac"); or a list, a
            text file with one path a line, absolute or relative to the list's folder; or one archive; or a corpus of
            `prepare`, whose clips go by the names of their files.
        out: a folder, made where it is missing; one that holds embeddings of other settings is refused.
        encoder, temporal_support, hop, pool, layers, remainder, batch_size: as `AudioEncoder.embed` takes them.
        workers: decoding threads; by default one a core.
        files_per_shard, shard_seconds: files, and seconds of audio, in one shard, at most.
        progress: told how far the collection is.
        listing: told before that how many files have been looked at, of how many, and what is waited for.
        dtype: of the embeddings in the files, "float32" or "float16".
        format: "parquet", "npz" or "npy"; see `matpac_fast.embed.writer`.
        max_errors: stop once more files than this have failed, leaving the shards that are not finished.
        retry_errors: try again the files that failed in finished shards.
        any_decoder: go on with embeddings that another version of the decoder or resampler began.
        lease_seconds: after which the shard of a worker that is not heard of is taken over.
        shards: only these, by number, passing over what others have in hand; for schedulers of their own.

    Raises:
        AudioError: no such folder, list or archive, or no audio in it.
        ConfigError: an option that cannot be, or `out` holds other embeddings, or other things.
        CorpusError: a corpus that is damaged; no room for temporary files, which what archives hold is decoded from.
    """
    files, out = open_source(Path(source)), Path(out)
    files.check_rate(encoder.sample_rate)
    workers = n_cores() if workers is None else workers
    positive = dict(files_per_shard=files_per_shard, workers=workers, shard_seconds=shard_seconds)
    for name, value in (positive | dict(lease_seconds=lease_seconds)).items():
        if not value > 0:
            raise ConfigError(f"{name} is {value}; expected more than 0")
    for name, value, allowed in (("dtype", dtype, DTYPES), ("format", format, FORMATS)):
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")
    if max_errors is not None and max_errors < 0:
        raise ConfigError(f"max_errors is {max_errors}; expected 0 or more")
    options = dict(temporal_support=temporal_support, hop=hop, pool=pool, layers=layers, remainder=remainder)
    report = Report(out=out)
    embedder = ShardEmbedder(encoder, options, batch_size, dtype, report)
    settings = {
        "encoder": encoder.id,
        "encoder_name": encoder.name,
        **options,
        # JSON knows no numbers of numpy's.
        "temporal_support": None if temporal_support is None else float(temporal_support),
        "hop": None if hop is None else float(hop),
        "channels": "mean",
        "dtype": dtype,
        "format": format,
        "source": str(files.path.resolve()),
        "decoder": decoder_versions(),
    }
    sizes = (files_per_shard, shard_seconds)
    check_folder(out)

    def looked(done: int, total: int) -> None:
        listing(done, total, "")

    def agreed(leases: Leases) -> Manifest | None:
        """The list of files that all workers share, now on the disk; None where this one stood still for so long that
        another may have written one since."""
        with leases.waited_for("manifest", lambda: listing(0, 0, "another worker looks at them")):
            known = read_manifest(out)
            if known is not None or (out / SETTINGS).exists():  # said before files are looked at, which may take long
                keep_settings(out, settings, any_decoder)
            if known is not None:
                files.check_there()
                check_source(out, files, known, workers, looked)
            changed = known is None
            if leases.others(WORKER) and known is not None:
                manifest = known  # who joins others takes their list
            else:  # who comes to an idle folder looks for new files, and clears away what the dead left half-written
                clear_torn(out)
                manifest, changed = extend(known, files, *sizes, workers, looked)
                if known is not None:
                    report.changed, report.gone, renewed = look_over(known, files, out, format, workers, looked)
                    changed |= renewed
            if retry_errors:
                n = len(manifest.shards)
                manifest = retried(manifest, files, out, format, *sizes)
                changed |= len(manifest.shards) > n
            if not leases.holds("manifest"):
                return None
            if known is None:
                keep_settings(out, settings, any_decoder)
            if changed:
                write_manifest(out, manifest)
            leases.claim(WORKER + leases.worker, keep=True)
        return manifest

    with taken_back(out), Leases(out / LEASES, lease_seconds) as leases:
        while (manifest := agreed(leases)) is None:
            pass
        settings |= {**stored_names(out), "made_by": versions()}
        worker = Worker(manifest, files, out, embedder, settings, leases, report, max_errors, progress)
        if shards is None:
            worker.run(workers)
        else:
            worker.run_only(shards, workers)
    return report
