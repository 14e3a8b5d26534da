"""Leases: one owner, kept while alive, taken over when not, by one heir alone."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from matpac_fast.embed import lease
from matpac_fast.embed.lease import Leases


@pytest.fixture
def leases(tmp_path):
    with Leases(tmp_path, 60.0) as mine:
        yield mine


def foreign(path: Path, beat: int = 0) -> None:
    """A lease of a worker on a machine of which nothing is known."""
    path.write_text(json.dumps({"machine": "elsewhere", "pid": 1, "began": "1", "beat": beat, "status": {"files": 3}}))


class Clock:
    """A clock that the test turns, in place of `time.monotonic`."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(lease.time, "monotonic", lambda: self.now)

    def turn(self, now: float, *workers: Leases) -> None:
        """Turn it to `now`, the workers renewing meanwhile as often as their threads would."""
        while self.now < now:
            self.now = min(now, self.now + 10.0)
            for worker in workers:
                worker.renew()


def test_a_lease_has_one_owner_and_can_be_given_back(leases, tmp_path):
    with Leases(tmp_path) as other:
        assert leases.claim("a")
        assert not other.claim("a")
        assert not leases.claim("a")
        assert other.claim("b")
        leases.release("a")
        assert other.claim("a")
    assert leases.claim("b")  # closing gives all back


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_that_has_ended_and_that_nobody_waited_for_is_gone():
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert lease._process(process.pid)["began"] is None
    process.wait()


def test_what_is_told_may_become_shorter(leases, tmp_path):
    with Leases(tmp_path) as other:
        other.claim("a")
        for status in ({"files": 10**30}, {"files": 1}):
            other.status = status
            other.renew()
            assert leases.others("a") == [status]


def test_of_many_that_want_it_at_once_one_gets_it(tmp_path):
    everybody = [Leases(tmp_path) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for i in range(50):
            got = list(pool.map(lambda one, i=i: one.claim(f"shard-{i}"), everybody))
            assert sum(got) == 1
    for one in everybody:
        one.close()


def test_a_lease_that_is_renewed_is_kept_and_one_that_is_not_is_inherited(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    first, second = Leases(tmp_path, 60.0), Leases(tmp_path, 60.0)
    foreign(tmp_path / "a.0")
    assert not first.claim("a")
    clock.turn(59.0, first, second)
    foreign(tmp_path / "a.0", beat=1)  # renewed in time
    assert not first.claim("a")
    clock.turn(118.0, first, second)
    assert not first.claim("a")
    assert not second.claim("a")  # which sees it for the first time, whatever its age
    clock.turn(119.5, first, second)
    assert first.claim("a")
    clock.turn(500.0, first, second)
    assert not second.claim("a")  # a new owner, who is alive
    assert sorted(os.listdir(tmp_path)) == ["a.0", "a.1"]
    first.release("a")
    assert os.listdir(tmp_path) == []
    first.close()
    second.close()


def test_after_a_standstill_all_have_their_time_anew(tmp_path, monkeypatch):
    """Of the disk, or of this process: nobody was heard of, this worker neither."""
    clock = Clock(monkeypatch)
    with Leases(tmp_path, 60.0) as mine:
        foreign(tmp_path / "a.0")
        foreign(tmp_path / "worker-x.0")
        assert not mine.claim("a")
        assert mine.others("worker-") == [{"files": 3}]
        clock.now = 500.0
        assert not mine.claim("a")  # before this worker's thread runs again,
        assert mine.others("worker-") == [{"files": 3}]
        mine.renew()
        assert not mine.claim("a")  # and after
        clock.turn(559.0, mine)
        foreign(tmp_path / "worker-x.0", beat=1)  # which needed its time to wake up
        assert not mine.claim("a")
        assert mine.others("worker-") == [{"files": 3}]
        clock.turn(561.0, mine)
        assert mine.claim("a")
        assert mine.others("worker-") == [{"files": 3}]


def test_a_round_that_comes_a_little_late_changes_nothing(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with Leases(tmp_path, 60.0) as mine:
        foreign(tmp_path / "a.0")
        assert not mine.claim("a")
        for clock.now in (29.0, 58.0, 61.0):
            mine.renew()
        assert mine.claim("a")


def test_who_cannot_renew_gives_nobody_up(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with Leases(tmp_path, 60.0) as mine:
        mine.claim("b")
        foreign(tmp_path / "a.0")
        assert not mine.claim("a")
        with monkeypatch.context() as broken:

            def fail(*_: object) -> None:
                raise OSError(errno.EIO, "the disk does not answer")

            broken.setattr(mine, "_rewrite", fail)
            clock.turn(100.0, mine)
        assert not mine.claim("a")
        clock.turn(159.0, mine)
        assert not mine.claim("a")
        clock.turn(171.0, mine)
        assert mine.claim("a")


def test_who_holds_nothing_asks_the_disk_too(leases, tmp_path):
    """Else its rounds would end while the disk stands still, and whom it waits for be given up."""
    os.utime(tmp_path, (0, 0))
    leases.renew()
    assert tmp_path.stat().st_mtime > 0


def test_one_that_is_half_written_is_nobody_s_yet(leases, tmp_path):
    (tmp_path / "a.0").touch()
    assert not leases.claim("a")


def test_one_that_cannot_be_written_is_not_left_for_others_to_wait_for(leases, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Leases, "_content", full)
    with pytest.raises(OSError, match="No space left"):
        leases.claim("a")
    monkeypatch.undo()
    with Leases(tmp_path) as other:
        assert other.claim("a")


def test_the_owner_keeps_it_alive(tmp_path):
    with Leases(tmp_path, 0.3) as mine:
        mine.claim("a")
        before = (tmp_path / "a.0").read_bytes()
        deadline = time.monotonic() + 20
        while (tmp_path / "a.0").read_bytes() == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_dead_owner_on_this_machine_is_known_at_once(leases, tmp_path):
    code = f"""
import os, pathlib
from matpac_fast.embed.lease import Leases
Leases(pathlib.Path({str(tmp_path)!r})).claim("a")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert (tmp_path / "a.0").exists()
    assert leases.claim("a")


def test_an_owner_on_this_machine_that_is_stopped_is_replaced_after_the_time(tmp_path):
    code = f"""
import pathlib, time
from matpac_fast.embed.lease import Leases
Leases(pathlib.Path({str(tmp_path)!r}), 1.0).claim("a")
print("ready", flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", code]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as owner,
        Leases(tmp_path, 1.0) as mine,
    ):
        try:
            assert owner.stdout is not None
            assert owner.stdout.readline() == "ready\n"
            owner.send_signal(signal.SIGSTOP)
            begin = time.monotonic()
            while not mine.claim("a"):
                assert time.monotonic() < begin + 60, "never given up"
                time.sleep(0.05)
            assert time.monotonic() > begin + 1.0
        finally:
            owner.kill()


def test_a_process_of_the_same_number_is_not_the_owner(leases, tmp_path):
    leases.claim("b")
    said = json.loads((tmp_path / "b.0").read_text())
    (tmp_path / "a.0").write_text(json.dumps({**said, "worker": "another"}))
    assert not leases.claim("a")  # lives
    (tmp_path / "a.0").write_text(json.dumps({**said, "worker": "another", "began": "1"}))
    assert leases.claim("a")  # this number began at another time


def test_what_the_others_say(leases, tmp_path):
    foreign(tmp_path / "worker-x.0")
    leases.claim("worker-me")
    assert leases.others("worker-") == [{"files": 3}]


def test_of_the_dead_nothing_is_said_and_nothing_left(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with Leases(tmp_path, 60.0) as mine:
        foreign(tmp_path / "worker-x.0")
        assert mine.others("worker-") == [{"files": 3}]
        clock.turn(61.0, mine)
        assert mine.others("worker-") == []
        assert os.listdir(tmp_path) == []


def test_a_look_that_is_out_of_date_gives_nobody_another_s_lease(leases, tmp_path):
    with Leases(tmp_path) as other:
        assert other.claim("a")
        assert not leases.claim("a", among={})  # it was free
        other.release("a")
        assert not leases.claim("a", among={"a": tmp_path / "a.0"})  # it was taken, and its work may be done
        assert os.listdir(tmp_path) == []


def test_what_else_lies_in_the_folder_is_no_lease(leases, tmp_path):
    for name in (".nfs000000000012", "notes", "a.tmp", ".7"):  # NFS keeps what is open under such names
        (tmp_path / name).touch()
    assert leases.taken() == {}
    assert leases.claim("a")
    assert leases.taken() == {"a": tmp_path / "a.0"}


def test_a_lost_lease_is_not_raised_from_the_dead(leases, tmp_path):
    leases.claim("a")
    (tmp_path / "a.0").unlink()
    leases.renew()
    assert not (tmp_path / "a.0").exists()


def test_a_worker_s_own_lease_is_made_again(tmp_path):
    """It was given up, and is back."""
    with Leases(tmp_path / "in") as mine:
        mine.claim("worker-x", keep=True)
        (tmp_path / "in" / "worker-x.0").unlink()
        mine.renew()
        assert json.loads((tmp_path / "in" / "worker-x.0").read_text())["worker"] == mine.worker
        shutil.rmtree(tmp_path / "in")  # by the last of the others
        mine.renew()
        assert (tmp_path / "in" / "worker-x.0").exists()
        mine.release("worker-x")
        mine.renew()
        assert not (tmp_path / "in" / "worker-x.0").exists()
        mine.claim("worker-x")
        (tmp_path / "in" / "worker-x.0").unlink()
        mine.renew()  # what was said of the one given back does not hold for this one
        assert not (tmp_path / "in" / "worker-x.0").exists()


def test_what_is_done_is_cleared_and_nothing_else(leases, tmp_path):
    for name in ("shard-1.0", "shard-1.1", "shard-10.0", "shard-2.0", "worker-x.0"):
        foreign(tmp_path / name)
    leases.clear(["shard-1", "shard-3"])
    assert sorted(os.listdir(tmp_path)) == ["shard-10.0", "shard-2.0", "worker-x.0"]


def _hold(folder: Path, log: Path) -> None:
    with Leases(folder) as mine:
        for _ in range(5):
            with mine.waited_for("turn"):
                with open(log, "a") as file:
                    file.write("in ")
                time.sleep(0.005)
                with open(log, "a") as file:
                    file.write("out ")


def test_turns_do_not_overlap(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_hold, args=(tmp_path / "leases", tmp_path / "log")) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "in out " * 15


def test_a_lease_may_last_for_ever(tmp_path):
    with Leases(tmp_path, float("inf")) as leases:
        assert leases.claim("a")
        leases._thread.join(0.2)
        assert leases._thread.is_alive()
