"""Embedding a collection on a Ray cluster: Ray Data hands shards to actors, each with an encoder of its own.

    ray start --head                                    # and on other machines: ray start --address=HEAD:6379
    from matpac_fast.embed.ray import embed_collection
    embed_collection("/shared/audio", "/shared/out", "runs/a", 2.0, concurrency=8, num_gpus=1)

Files and shards stand on a disk that all machines share. The shards, the leases and the ways to go on after any end are
those of `matpac_fast.embed.extract`, so workers in shells may help, or finish what a cluster began.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..encoder import load_encoder
from ..errors import ConfigError
from ..weights import DEFAULT
from .extract import embed_collection as embed_here
from .lease import SECONDS, Leases
from .manifest import LEASES, Manifest, read_manifest
from .worker import WORKER, Report
from .writer import shard_path

_PAUSE_SECONDS = 2.0  # before another look for shards that other workers had in hand
_ADDED = ("files", "failed_here", "rows", "audio_seconds", "model_seconds", "waited_seconds")


def embed_collection(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    encoder: str = DEFAULT,
    temporal_support: float | None = None,
    *,
    concurrency: int = 2,
    num_cpus: float = 1,
    num_gpus: float = 0,
    shards_per_task: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
    num_heads: int | None = None,
    precision: str = "float32",
    **options: Any,
) -> Report:
    """`extract.embed_collection` by `concurrency` actors of the Ray cluster that is running, or of a local one.

    Args:
        source, out, temporal_support, options: as `extract.embed_collection` takes them, but for `max_errors`.
        encoder: a name or path for `load_encoder`, which every actor can read; by default the packaged one.
        concurrency: actors.
        num_cpus, num_gpus: of each actor; with GPUs it embeds on its own one. Decoding threads are as many as CPUs.
        shards_per_task: shards handed to an actor at a time, which decodes the next while it embeds one.
        progress: called with (shards done, shards in all).
        num_heads, precision: as `load_encoder` takes them (dtype).

    Returns:
        What was found and done; seconds are summed over the actors.

    Raises:
        AudioError, ConfigError: as there; ConfigError also where ray is missing.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f"embedding on a cluster needs Ray ({error}): pip install 'matpac_fast[ray]'") from error
    for name, value in (("concurrency", concurrency), ("shards_per_task", shards_per_task)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; expected at least 1")
    if "max_errors" in options:
        raise ConfigError("max_errors: each actor would count for itself; look at `failed` of the report")
    source, out = Path(source).resolve(), Path(out).resolve()
    again = {"retry_errors": options.pop("retry_errors", False)}
    options = {"temporal_support": temporal_support, "workers": max(1, int(num_cpus)), **options}
    loading = {"num_heads": num_heads, "dtype": precision}
    here = load_encoder(encoder, "cpu", **loading)
    report = embed_here(source, out, here, shards=[], **again, **options)  # the manifest, and what cannot be
    manifest = read_manifest(out)
    assert manifest is not None
    kind = options.get("format", "parquet")
    report.failed_before = len(manifest.errors(out, kind))
    with Leases(out / LEASES, options.get("lease_seconds", SECONDS)) as leases:
        leases.claim(WORKER + leases.worker, keep=True)  # so that the actors join, and look for no new files each
        while missing := _missing(out, manifest, kind):
            progress(len(manifest.shards) - len(missing), len(manifest.shards))
            tasks = ray.data.from_items([{"shard": i} for i in missing], override_num_blocks=len(missing))
            found = tasks.map_batches(
                _Actor,
                fn_constructor_kwargs=dict(
                    source=str(source),
                    out=str(out),
                    encoder=encoder,
                    gpu=num_gpus > 0,
                    loading=loading,
                    options=options,
                ),
                batch_size=shards_per_task,
                compute=ray.data.ActorPoolStrategy(size=concurrency),
                num_cpus=num_cpus,
                num_gpus=num_gpus,
            )
            for row in found.iter_rows():
                for name in _ADDED:
                    setattr(report, name, getattr(report, name) + row[name])
                progress(len(manifest.shards) - len(_missing(out, manifest, kind)), len(manifest.shards))
            if _missing(out, manifest, kind):
                time.sleep(_PAUSE_SECONDS)
        # All is there: this counts and writes errors.parquet.
        report.failed = embed_here(source, out, here, **options).failed
    return report


def _missing(out: Path, manifest: Manifest, kind: str) -> list[int]:
    return [i for i in range(len(manifest.shards)) if not shard_path(out, i, kind).exists()]


class _Actor:
    """An encoder that stays loaded, and embeds the shards that it is given."""

    def __init__(
        self, source: str, out: str, encoder: str, gpu: bool, loading: dict[str, Any], options: dict[str, Any]
    ):
        import torch

        torch.set_num_threads(max(1, options["workers"]))
        self._encoder = load_encoder(encoder, "cuda" if gpu else "cpu", **loading)  # Ray shows an actor its own GPU
        self._source, self._out, self._options = source, out, options

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        shards = [int(shard) for shard in batch["shard"]]
        report = embed_here(self._source, self._out, self._encoder, shards=shards, **self._options)
        return {name: [getattr(report, name)] for name in _ADDED}
