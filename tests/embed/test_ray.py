"""A local Ray of two workers gives what one process gives."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import soundfile

from matpac_fast import load_encoder
from matpac_fast.embed import extract
from matpac_fast.errors import ConfigError
from tests.embed import crew


def test_without_ray_it_is_said(tmp_path, monkeypatch):
    import sys

    from matpac_fast.embed import ray as on_ray

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray .*pip install 'matpac_fast\[ray\]'"):
        on_ray.embed_collection(tmp_path, tmp_path / "out", "untrained-tiny")


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
