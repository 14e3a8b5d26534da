"""A local Ray of two workers gives what one process gives."""

from __future__ import annotations

import sys
import types

import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from matpac_fast import load_encoder
from matpac_fast.embed import extract
from matpac_fast.errors import ConfigError
from tests.embed import crew


def test_without_ray_it_is_said(tmp_path, monkeypatch):
    from matpac_fast.embed import ray as on_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray .*pip install 'matpac_fast\[ray\]'"):
        on_ray.embed_collection(tmp_path, tmp_path / "out", "untrained-tiny")


class Here:
    """What `embed_collection` uses of Ray Data, in this process."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def map_batches(self, actor, fn_constructor_kwargs, batch_size, **_) -> Here:
        call, found = actor(**fn_constructor_kwargs), []
        for i in range(0, len(self.rows), batch_size):
            columns = call({"shard": [row["shard"] for row in self.rows[i : i + batch_size]]})
            found += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return Here(found)

    def iter_rows(self) -> list[dict]:
        return self.rows


def test_files_that_failed_are_not_reported_as_embedded(tmp_path, monkeypatch):
    from matpac_fast.embed import ray as on_ray

    data = types.ModuleType("ray.data")
    data.from_items = lambda rows, **_: Here(rows)  # type: ignore[attr-defined]
    data.ActorPoolStrategy = lambda *, size: size  # type: ignore[attr-defined]
    ray = types.ModuleType("ray")
    ray.data = data  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # an actor's are its own
    monkeypatch.setattr(on_ray, "load_encoder", lambda *_, **__: crew.Tiny())
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    reports = []
    for start in (0, 10):
        for i in range(start, start + 3):
            soundfile.write(source / f"{i}.wav", crew.noise(4_000, seed=i), 16_000)
        for i in range(start // 10 + 1):
            (source / f"empty {start + i}.wav").touch()
        reports.append(on_ray.embed_collection(source, out, "tiny", 0.25, files_per_shard=2))
    first, second = reports
    assert (first.total, first.failed, first.embedded) == (4, 1, (0, 3, 0))
    assert (second.total, second.failed, second.embedded) == (9, 3, (3, 3, 0))
    again = on_ray.embed_collection(source, out, "tiny", 0.25, files_per_shard=2)
    assert (again.total, again.failed, again.embedded) == (9, 3, (6, 0, 0))


@pytest.mark.slow
def test_two_workers_of_a_local_ray(local_ray, tmp_path):
    from matpac_fast.embed import ray as on_ray

    source = tmp_path / "source"
    source.mkdir()
    for i in range(12):
        soundfile.write(source / f"{i}.wav", crew.noise(8_000, seed=i), 16_000)
    (source / "empty.wav").touch()
    options = dict(files_per_shard=2)
    told = []
    report = on_ray.embed_collection(
        source,
        tmp_path / "out",
        "untrained-tiny",
        0.25,
        concurrency=2,
        shards_per_task=1,
        progress=lambda done, total: told.append((done, total)),
        **options,
    )
    assert (report.total, report.files, report.rows, report.failed) == (13, 13, 24, 1)
    assert report.embedded == (0, 12, 0)
    assert told[0] == (0, 7)
    assert told[-1] == (7, 7)
    extract.embed_collection(
        source, tmp_path / "here", load_encoder("untrained-tiny", "cpu"), 0.25, workers=1, **options
    )
    for path in (tmp_path / "here").glob("*.parquet"):
        got, want = pq.read_table(tmp_path / "out" / path.name), pq.read_table(path)
        assert got.column_names == want.column_names
        for name in got.column_names:
            if name == "embedding":
                assert [pytest.approx(row, abs=1e-5) for row in want[name].to_pylist()] == got[name].to_pylist()
            else:
                assert got[name].to_pylist() == want[name].to_pylist()
    # Done is done, and an option that cannot be is said here, not in an actor.
    assert on_ray.embed_collection(source, tmp_path / "out", "untrained-tiny", 0.25, **options).files == 0
    with pytest.raises(ConfigError, match="temporal_support is 0.25 there and 0.5 here"):
        on_ray.embed_collection(source, tmp_path / "out", "untrained-tiny", 0.5, **options)
