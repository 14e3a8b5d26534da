"""Embeddings of clips, kept in Parquet under what they depend on: weights, audio, windows, dtype, versions.

ROOT/<encoder's name>-<key>/settings.json      what the key was made of
ROOT/<encoder's name>-<key>/part-*.parquet     audio (SHA-256 of the file), seconds seen, embedding; a row a window
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..audio.ahead import in_order
from ..audio.decode import decoder_versions, read_audio
from ..audio_encoder import AudioEncoder
from ..embedding import Windowing
from ..errors import AudioError, ConfigError
from ..files import arrow_file, damage_named, sha256, write_parquet, write_text
from ..tasks.task import Fold
from .linear import Rows
from .own_code import class_name, dtype_name, own_code

Aggregate = Literal["mean", "score", "one", "attend"]
_CLIPS = 128  # in one part; a killed run loses so many clips' work at most


@dataclass(frozen=True)
class View:
    """What of a clip is embedded. `aggregate`: the mean over its windows, each counting by its seconds, every window
    (score, attend), or the one in its middle."""

    temporal_support: float
    hop: float | None = None
    remainder: str = "keep"
    aggregate: Aggregate = "mean"

    @property
    def step(self) -> float:
        """Seconds of audio for each window: from one to the next, or those that the only one sees."""
        return self.temporal_support if self.hop is None or self.aggregate == "one" else self.hop

    def settings(self, encoder: AudioEncoder, encoder_id: str) -> dict[str, Any]:
        """Everything but the audio that decides the embeddings; the batch's size, device and threads do not, beyond
        rounding."""
        Windowing(self.temporal_support, self.hop, remainder=self.remainder).samples(encoder.sample_rate)
        return {
            "encoder": encoder_id,
            "encoder_class": class_name(encoder),
            "dtype": dtype_name(encoder),
            "temporal_support": self.temporal_support,
            "hop": self.hop,
            "remainder": self.remainder,
            "rows": {"mean": "mean by seconds", "one": "middle"}.get(self.aggregate, "windows and seconds"),
            "matpac_fast": __version__,
            "torch": torch.__version__,
            "decoder": decoder_versions(),
            **({"code": code} if (code := own_code(encoder)) else {}),
        }


class Cache:
    """The embeddings of one encoder in one view. `encoder_id`: its `id`, where it is at hand; it hashes all weights."""

    def __init__(
        self,
        root: Path,
        encoder: AudioEncoder,
        view: View,
        batch_size: int | None = None,
        encoder_id: str | None = None,
    ):
        self.encoder, self.view, self.batch_size = encoder, view, batch_size
        self.sample_rate, self.embedding_dim = encoder.sample_rate, encoder.embedding_dim
        self.settings = view.settings(encoder, encoder_id or encoder.id)
        self.key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", encoder.name)[:40]
        self.folder = root / f"{name}-{self.key[:16]}"

    def known(self) -> set[str]:
        """The audio that is embedded already."""
        import pyarrow.parquet as pq

        found: set[str] = set()
        for part in self._parts():
            with damage_named(part), arrow_file(part) as opened, pq.ParquetFile(opened) as file:
                found.update(_names(file))
        return found

    def read(self, audio: Sequence[str]) -> Rows:
        """The rows of these clips, in their order: values (R, E) float32 on the CPU.

        Raises:
            ConfigError: clips that are not embedded; a damaged part.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        lacking, tables = set(audio), []
        place = {name: i for i, name in enumerate(sorted(lacking))}
        for part in self._parts():
            with damage_named(part), arrow_file(part) as opened, pq.ParquetFile(opened) as file:
                names = _names(file)
                if fresh := lacking & names:  # other tasks' clips are in parts of their own
                    lacking -= fresh
                    table = file.read()
                    twice = (names - fresh) & place.keys()  # by two processes that did not see each other's
                    if twice:
                        table = table.filter(pc.is_in(table["audio"], pa.array(sorted(fresh))))  # type: ignore
                    tables.append(table)
        if lacking:
            raise ConfigError(
                f"{self.folder}: {len(lacking)} of {len(place)} clips, such as that of SHA-256 {min(lacking)}, have no "
                "embedding; expected one of each; the same command again embeds what is missing"
            )
        table = pa.concat_tables(tables).combine_chunks()
        column = table["embedding"].chunk(0)
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
        codes = pc.index_in(table["audio"], pa.array(list(place))).to_numpy(zero_copy_only=False)  # type: ignore
        order = np.argsort(codes, kind="stable")  # what is not asked for is NaN, at the end
        starts = np.searchsorted(codes[order], np.arange(len(place)))
        ends = np.searchsorted(codes[order], np.arange(len(place)), side="right")
        spans = [order[starts[place[name]] : ends[place[name]]] for name in audio]
        clip = np.repeat(np.arange(len(audio)), [len(span) for span in spans])
        chosen = np.concatenate(spans)
        return Rows(torch.from_numpy(values[chosen].copy()), clip, table["seconds"].to_numpy()[chosen])

    def write(self, audio: Sequence[str], found: Sequence[tuple[Tensor, Tensor]]) -> None:
        """One part, all of it or none: for each audio its embeddings (W, E) and the seconds (W,) that they saw."""
        import pyarrow as pa

        if not (self.folder / "settings.json").exists():
            write_text(self.folder / "settings.json", json.dumps(self.settings, indent=2) + "\n")
        values = torch.cat([value.float().cpu() for value, _ in found]).numpy()
        seconds = torch.cat([each for _, each in found]).numpy()
        names = [name for name, (value, _) in zip(audio, found, strict=True) for _ in range(len(value))]
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), pa.float32()), values.shape[1])
        table = pa.table({"audio": pa.array(names).dictionary_encode(), "seconds": seconds, "embedding": column})
        part = hashlib.sha256("".join(audio).encode()).hexdigest()[:16]
        write_parquet(self.folder / f"part-{part}.parquet", table, use_dictionary=["audio"], compression="none")

    def embed(self, waves: Sequence[np.ndarray]) -> list[tuple[Tensor, Tensor]]:
        """Of each wave (S,), at the encoder's rate: (1, E) for "mean" and "one", else (W, E); and the seconds seen."""
        view = self.view
        if view.aggregate == "one":
            size = round(view.temporal_support * self.encoder.sample_rate)
            starts = [max(0, len(wave) - size) // 2 for wave in waves]
            waves = [wave[start : start + size] for wave, start in zip(waves, starts, strict=True)]
        ts = None if view.aggregate == "one" else view.temporal_support
        hop = None if view.aggregate == "one" else view.hop
        found = self.encoder.embed_many(
            waves, self.encoder.sample_rate, ts, hop, remainder=view.remainder, batch_size=self.batch_size
        )
        rows = [(each.values, each.end - each.start) for each in found]
        if view.aggregate == "mean":
            # A last window of a few milliseconds counts as little.
            return [
                ((seconds / seconds.sum()).to(values)[None] @ values, seconds.sum()[None]) for values, seconds in rows
            ]
        return rows

    def drop_encoder(self) -> None:
        """All is embedded: what is there can still be read, and the weights need stay in memory no longer."""
        del self.encoder

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.parquet"))


def _names(part: Any) -> set[str]:
    """The audio that an open part has rows of."""
    return set(part.read(["audio"])["audio"].unique().to_pylist())


def hash_audio(paths: Sequence[Path], workers: int, done: Callable[[int], None] = lambda done: None) -> list[str]:
    """SHA-256 of each file's bytes; `done` is told how many there are so far."""
    found: list[str] = []
    for name in in_order(((0, functools.partial(sha256, path)) for path in paths), workers):
        found.append(name)
        done(len(found))
    return found


def fill(
    caches: Sequence[Cache],
    audio: Sequence[str],
    paths: Sequence[Path],
    workers: int,
    done: Callable[[int], None],
    share: tuple[int, int] = (0, 1),
    left_out: dict[str, str] | None = None,
) -> None:
    """Embed what is missing in several caches of one encoder, decoding each file once for all of them.

    `audio` are the hashes of `paths`; `done` is told of each number of (clip, cache) pairs that are dealt with. With
    `share` (rank, of how many) only those clips are embedded whose hash falls to this process: whatever is there
    already when each of them looks, nothing belongs to nobody. `left_out`, where given, takes up hash -> reason of each
    file that cannot be decoded, and those in it already are not tried.

    Raises:
        AudioError: a file that cannot be decoded, without `left_out`.
    """
    first = dict(zip(reversed(audio), reversed(paths), strict=True))  # the same audio is embedded once
    skipped = left_out or {}
    missing = [
        [name for name in first if name not in known and name not in skipped]
        for known in (cache.known() for cache in caches)
    ]
    done(sum(len(audio) - len(names) for names in missing))
    rank, world = share
    lacking = [{name for name in names if int(name[:16], 16) % world == rank} for names in missing]
    wanted = set().union(*lacking)
    clips = [name for name in first if name in wanted]
    parts = [clips[i : i + _CLIPS] for i in range(0, len(clips), _CLIPS)]
    rate = caches[0].sample_rate if caches else 0
    jobs = (
        (os.stat(first[name]).st_size, functools.partial(_decode, first[name], rate)) for part in parts for name in part
    )
    waves: Iterator[np.ndarray | AudioError] = in_order(jobs, workers)
    for part in parts:
        heard: dict[str, np.ndarray] = {}
        for name in part:
            wave = next(waves)
            if not isinstance(wave, AudioError):
                heard[name] = wave
            elif left_out is None:
                raise wave
            else:
                left_out[name] = str(wave).removeprefix(f"{first[name]}: ")  # its copies go by other names
        for cache, names in zip(caches, lacking, strict=True):
            wanted_here = [name for name in part if name in names]
            mine = [name for name in wanted_here if name in heard]
            if mine:
                cache.write(mine, cache.embed([heard[name] for name in mine]))
            if wanted_here:
                done(len(wanted_here))


def _decode(path: Path, rate: int) -> np.ndarray | AudioError:
    try:
        return read_audio(path, rate)
    except AudioError as error:
        return error


def shared_audio(audio: Sequence[str], folds: Sequence[Fold]) -> int:
    """Clips that are tested in a fold that learns from the same audio, under another name: copies in the data set."""
    names, shared = np.array(audio), set()
    for fold in folds:
        learn = set(names[fold.train].tolist()) | set(names[[] if fold.valid is None else fold.valid].tolist())
        shared.update(i for i in fold.test.tolist() if names[i] in learn)
    return len(shared)
