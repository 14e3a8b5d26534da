"""Many workers on one folder: they share the work, and whichever is killed, whenever, nothing is lost or different."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile

from matpac_fast import files
from matpac_fast.embed import manifest, worker, writer
from matpac_fast.embed.extract import embed_collection
from matpac_fast.embed.lease import Leases
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
    for one in workers:
        one.join(120)
        assert one.exitcode == 0
    # What the dead left half-written goes with the next call.
    embed_collection(collection, tmp_path, crew.Tiny(), 0.1, files_per_shard=2)
    assert crew.result(tmp_path) == undisturbed


def test_what_the_dead_left_half_written_goes(collection, tmp_path):
    (tmp_path / ".shard-00000.parquet.0123abcd.tmp").touch()
    embed_collection(collection, tmp_path, crew.Tiny(), 0.1, files_per_shard=64)
    assert not list(tmp_path.glob(".*"))


def test_workers_share_the_work_and_none_is_done_twice(collection, undisturbed, tmp_path):
    workers = [crew.start(collection, tmp_path, seconds=0.03, files_per_shard=2) for _ in range(3)]
    seen: dict[str, set[int]] = {}
    while any(one.is_alive() for one in workers):
        for path in tmp_path.glob("shard-*"):
            seen.setdefault(path.name, set()).add(path.stat().st_ino)
        time.sleep(0.01)
    assert [one.exitcode for one in workers] == [0, 0, 0]
    assert all(len(files) == 1 for files in seen.values())
    assert crew.result(tmp_path) == undisturbed


def test_a_shard_that_is_finished_between_look_and_claim_is_not_done_again(collection, tmp_path, monkeypatch):
    options = dict(files_per_shard=64)  # of 68 files
    embed_collection(collection, tmp_path / "others", crew.Tiny(), 0.1, **options)
    claim = Leases.claim

    def late(self, name, *args, **kwargs):
        if name.startswith("shard-"):
            shutil.copy(tmp_path / "others" / f"{name}.parquet", tmp_path / "mine")
        return claim(self, name, *args, **kwargs)

    monkeypatch.setattr(Leases, "claim", late)
    assert embed_collection(collection, tmp_path / "mine", crew.Tiny(), 0.1, **options).files == 0
    assert crew.result(tmp_path / "mine") == crew.result(tmp_path / "others")


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


def test_a_worker_that_is_stopped_is_replaced_and_goes_on_when_it_is_back(collection, undisturbed, tmp_path):
    """Ctrl-Z, or a frozen group of processes: on this machine too it is the time that decides."""
    options = dict(files_per_shard=2, lease_seconds=1.0)
    stopped = crew.start(collection, tmp_path, seconds=0.05, **options)
    while not list(tmp_path.glob("shard-*")):
        time.sleep(0.01)
    os.kill(stopped.pid, signal.SIGSTOP)
    alarm = threading.Timer(60, os.kill, (stopped.pid, signal.SIGCONT))  # so that the test fails rather than hangs
    alarm.start()
    try:
        report = embed_collection(collection, tmp_path, crew.Tiny(), 0.1, **options)
        assert alarm.is_alive(), "it was waited for"
    finally:
        alarm.cancel()
        os.kill(stopped.pid, signal.SIGCONT)
    assert sum(report.embedded) == 64
    stopped.join(60)
    assert stopped.exitcode == 0
    assert crew.result(tmp_path) == undisturbed


def test_what_others_did_while_a_worker_stood_still_is_not_done_again(collection, undisturbed, tmp_path):
    told: list[tuple[float, float]] = []

    def overtaken(progress):
        if not told:
            for name, data in undisturbed.items():
                if name.startswith("shard-"):
                    (tmp_path / name).write_bytes(data)
        told.append((progress.files / progress.total_files, progress.seconds / progress.total_seconds))

    encoder = crew.Tiny()
    report = embed_collection(collection, tmp_path, encoder, 0.1, files_per_shard=2, workers=1, progress=overtaken)
    assert report.files <= 2
    assert sum(report.embedded) == 64
    assert max(max(each) for each in told[2:]) <= 1.0
    assert crew.result(tmp_path) == undisturbed


@pytest.mark.parametrize(
    ("kind", "ending"), [("parquet", ".parquet"), ("npz", ".npz"), ("npy", ".npy"), ("npy", ".index.parquet")]
)
def test_what_is_cleared_away_while_it_is_written_is_written_again(collection, tmp_path, monkeypatch, kind, ending):
    """A worker was given up and is back: another came meanwhile, took the folder for idle and cleared up."""
    options = dict(files_per_shard=2, format=kind)
    embed_collection(collection, tmp_path / "undisturbed", crew.Tiny(), 0.1, **options)
    out, atomic = tmp_path / "out", writer.atomic
    cleared: set[Path] = set()

    @contextlib.contextmanager
    def disturbed(path):
        with atomic(path) as beside:
            yield beside
            if path in cleared:
                assert list((out / "leases").glob("worker-*")), "the next to come would clear away this one as well"
            elif path.name.endswith(ending) and path.name != "manifest.parquet":  # which is written under a lease
                cleared.add(path)
                beside.unlink()
                for mine in (out / "leases").glob("worker-*"):
                    mine.unlink()

    monkeypatch.setattr(writer, "atomic", disturbed)
    monkeypatch.setattr(files, "atomic", disturbed)
    monkeypatch.setattr(writer, "_IN_MEMORY", 16)  # rows that wait on the disk are there for the second time too
    report = embed_collection(collection, out, crew.Tiny(), 0.1, **options)
    assert (report.files, report.failed) == (68, 4)
    assert len(cleared) == 34 + (ending == ".parquet")  # errors.parquet too
    assert crew.result(out) == crew.result(tmp_path / "undisturbed")


def test_one_worker_looks_at_the_files_and_the_others_wait_and_both_say_so(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_TELL_EVERY", 10)
    told: list[tuple[int, int, str]] = []
    out, looked = tmp_path / "out", threading.Event()

    def waiting(*what):
        told.append(what)
        looked.set()

    with Leases(out / "leases") as other:
        assert other.claim("manifest")
        options = dict(files_per_shard=64, listing=waiting)
        thread = threading.Thread(target=embed_collection, args=(collection, out, crew.Tiny(), 0.1), kwargs=options)
        thread.start()
        assert looked.wait(30)
        other.release("manifest")
        thread.join(60)
    waits = [what for what in told if what[2]]
    assert set(waits) == {(0, 0, "another worker looks at them")}
    assert told[len(waits) :] == [(n, 68, "") for n in range(10, 68, 10)]
    told.clear()
    embed_collection(collection, out, crew.Tiny(), 0.1, listing=waiting)  # to see which have changed
    assert told == [(n, 68, "") for n in range(10, 68, 10)]


def test_looks_at_the_others_do_not_grow_with_the_shards(collection, tmp_path, monkeypatch):
    look, looks = worker.Worker._look, []
    monkeypatch.setattr(worker.Worker, "_look", lambda self: looks.append(look(self)))
    monkeypatch.setattr(worker, "_LOOK_SECONDS", 600.0)
    counts = []
    for n in (1, 64):
        embed_collection(collection, tmp_path / str(n), crew.Tiny(), 0.1, files_per_shard=n)
        counts.append(len(looks))
        looks.clear()
    assert counts[0] == counts[1]


def test_leases_on_shards_that_were_added_since_are_left_alone(collection, tmp_path):
    embed_collection(collection, tmp_path, crew.Tiny(), 0.1, files_per_shard=2)
    (tmp_path / "leases").mkdir()
    owner = {"machine": "elsewhere", "pid": 1, "began": "1", "beat": 5, "status": {}}
    for shard in (3, 34):  # one that is done, whose owner died before it gave it back; and one not in the list
        (tmp_path / "leases" / f"shard-{shard:05d}.0").write_text(json.dumps(owner))
    embed_collection(collection, tmp_path, crew.Tiny(), 0.1, files_per_shard=2)
    assert os.listdir(tmp_path / "leases") == ["shard-00034.0"]


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
