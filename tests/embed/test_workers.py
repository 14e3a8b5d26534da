"""Many workers on one folder: they share the work, and whichever is killed, whenever, nothing is lost or different."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile

from matpac_fast.embed.extract import embed_collection
from tests.embed import crew

RATE = 8_000


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    for i in range(64):
        soundfile.write(folder / f"{i}.wav", crew.noise(800 + 97 * (i % 7), seed=i), RATE)
    for i in range(4):
        (folder / f"bad {i}.wav").touch()
    return folder


@pytest.fixture(scope="module")
def undisturbed(collection, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed")
    process = crew.start(collection, out, files_per_shard=2)
    process.join(120)
    assert process.exitcode == 0
    return crew.result(out)


def test_killed_at_random_again_and_again_the_result_is_that_of_an_undisturbed_run(collection, undisturbed, tmp_path):
    """Three workers; every now and then one of them gets SIGKILL, and another takes its place."""
    chance = random.Random(0)
    options = dict(seconds=0.1, files_per_shard=2)  # 34 shards take three workers over a second, the kills less
    workers = [crew.start(collection, tmp_path, **options) for _ in range(3)]
    kills = 0
    while kills < 24:
        time.sleep(chance.uniform(0.0, 0.08))
        at = chance.randrange(3)
        assert workers[at].is_alive(), "the work was done before it could be disturbed"
        os.kill(workers[at].pid, signal.SIGKILL)
        workers[at].join()
        kills += workers[at].exitcode == -signal.SIGKILL
        workers[at] = crew.start(collection, tmp_path, **options)
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    # What the dead left half-written goes with the next call.
    embed_collection(collection, tmp_path, crew.Tiny(), 0.1, files_per_shard=2)
    assert crew.result(tmp_path) == undisturbed


def test_workers_share_the_work_and_none_is_done_twice(collection, undisturbed, tmp_path):
    workers = [crew.start(collection, tmp_path, seconds=0.03, files_per_shard=2) for _ in range(3)]
    seen: dict[str, set[int]] = {}
    while any(worker.is_alive() for worker in workers):
        for path in tmp_path.glob("shard-*"):
            seen.setdefault(path.name, set()).add(path.stat().st_ino)
        time.sleep(0.01)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert all(len(files) == 1 for files in seen.values())
    assert crew.result(tmp_path) == undisturbed


def test_a_worker_that_is_not_heard_of_is_replaced(collection, undisturbed, tmp_path):
    """Of a lease of another machine nothing is known but that nobody renews it."""
    source = tmp_path / "out"
    (source / "leases").mkdir(parents=True)
    owner = {"machine": "elsewhere", "pid": 1, "began": "1", "beat": 5, "status": {}}
    (source / "leases" / "shard-00003.0").write_text(json.dumps(owner))
    clock = time.monotonic()
    report = embed_collection(collection, source, crew.Tiny(), 0.1, files_per_shard=2, lease_seconds=1.0)
    assert time.monotonic() - clock >= 1.0
    assert report.files == 68
    assert crew.result(source) == undisturbed


def test_who_joins_takes_the_list_of_the_others_and_sees_their_progress(collection, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in collection.glob("1*.wav"):
        (source / path.name).write_bytes(path.read_bytes())
    slow = crew.start(source, tmp_path / "out", seconds=0.15, files_per_shard=1)
    while not list((tmp_path / "out").glob("shard-*")):
        time.sleep(0.01)
    (source / "later.wav").write_bytes((source / "1.wav").read_bytes())
    told = []
    encoder = crew.Tiny()
    report = embed_collection(
        source,
        tmp_path / "out",
        encoder,
        0.1,
        files_per_shard=1,
        progress=lambda p: told.append((p.files, p.total_files, p.own_files, p.workers)),
    )
    slow.join(60)
    assert slow.exitcode == 0
    assert report.total == 11
    assert sum(report.embedded) == 11
    assert report.embedded[1] == report.files
    assert told[-1][:2] == (11, 11)
    assert told[-1][2] == report.files > 0
    assert any(workers == 2 for _, _, _, workers in told)
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    # The next call on the idle folder finds what is new.
    assert embed_collection(source, tmp_path / "out", encoder, 0.1, files_per_shard=1).files == 1
    rows = Counter(n for p in (tmp_path / "out").glob("shard-*") for n in set(pq.read_table(p)["path"].to_pylist()))
    assert set(rows.values()) == {1}
    assert len(rows) == 12
