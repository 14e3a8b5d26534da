"""Workers that stand still for longer than their leases last, as suspended ones do, and then go on, spoil nothing."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from matpac_fast.embed import extract
from matpac_fast.embed.extract import embed_collection
from matpac_fast.embed.lease import Leases
from matpac_fast.embed.shard import ShardEmbedder
from tests.embed import crew

RATE = 8_000


@pytest.fixture
def source(tmp_path):
    (tmp_path / "audio").mkdir()
    for i in range(12):
        soundfile.write(tmp_path / "audio" / f"{i:02d}.wav", crew.noise(800 + 97 * i, seed=i), RATE)
    return tmp_path / "audio"


def run(source, out, **options):
    return embed_collection(source, out, crew.Tiny(), 0.1, workers=1, **options)


def rows(out):
    tables = [pq.read_table(path, columns=["path", "start"]) for path in sorted(out.glob("shard-*.parquet"))]
    return [row for table in tables for row in zip(*table.to_pydict().values(), strict=True)]


def given_up(out, name):
    """As whoever takes a lease over and is through with it leaves the folder."""
    for path in (out / "leases").glob(f"{name}.*"):
        path.unlink()


@pytest.mark.parametrize("files_per_shard", [4, 5])
@pytest.mark.parametrize("arrive", [0, 3])
def test_a_list_of_files_from_before_takes_no_newer_one_s_place(source, tmp_path, monkeypatch, arrive, files_per_shard):
    out, extend, stood_still = tmp_path / "out", extract.extend, []

    def slow(*args):
        found = extend(*args)
        if not stood_still:
            stood_still.append(True)
            given_up(out, "manifest")
            for i in range(arrive):
                soundfile.write(source / f"late {i}.wav", crew.noise(900, seed=i), RATE)
            assert run(source, out, files_per_shard=files_per_shard).files == 12 + arrive
        return found

    monkeypatch.setattr(extract, "extend", slow)
    assert run(source, out, files_per_shard=4).total == 12 + arrive
    for i in range(2):
        soundfile.write(source / f"new {i}.wav", crew.noise(1_000, seed=i), RATE)
    report = run(source, out, files_per_shard=4)
    assert (report.total, report.failed) == (14 + arrive, 0)
    assert len(set(rows(out))) == len(rows(out))
    assert {path for path, _ in rows(out)} == {path.name for path in source.iterdir()}


def test_a_shard_that_another_has_finished_meanwhile_stays(source, tmp_path, monkeypatch):
    out, embed, stood_still = tmp_path / "out", ShardEmbedder.embed, []
    for i in range(12, 60):  # more than are read ahead
        soundfile.write(source / f"{i}.wav", crew.noise(900, seed=i), RATE)

    def slow(self, entries, audio, out_):
        if not stood_still:
            stood_still.append(True)
            for path in (out / "leases").iterdir():
                path.unlink()
            assert run(source, out, files_per_shard=60).files == 60
            for path in sorted(source.iterdir())[50:]:  # not read yet
                shutil.move(path, tmp_path)
            stood_still.append(crew.result(out))
        return embed(self, entries, audio, out_)

    monkeypatch.setattr(ShardEmbedder, "embed", slow)
    report = run(source, out, files_per_shard=60)
    assert (report.total, report.failed) == (60, 0)
    assert crew.result(out) == stood_still[1]


def test_a_lease_of_another_with_the_same_number_is_left_alone(tmp_path):
    with Leases(tmp_path / "leases", 60) as one, Leases(tmp_path / "leases", 60) as other:
        assert one.claim("manifest")
        assert one.holds("manifest")
        given_up(tmp_path, "manifest")
        assert not one.holds("manifest")
        assert other.claim("manifest")
        assert other.holds("manifest")
        one.renew()
        assert not one.holds("manifest")
        one.release("manifest")
        assert other.holds("manifest")
    assert not (tmp_path / "leases").exists()


def test_nothing_is_held_that_was_never_claimed(tmp_path):
    with Leases(tmp_path / "leases", np.inf) as leases:
        assert not leases.holds("manifest")
