"""What becomes of the others when a rank ends, falls out of reach, or never comes; and how machines find each other."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist
from ranks import free_port, on_ranks

from matpac_fast.train import PeerError, interface, joining, lifeline, meeting

real = socket.create_connection


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return dist.HashStore()


def together(*calls):
    """All of them at once, each in a thread -> what they return or raise, in order."""
    answers: list = [None] * len(calls)

    def answer(n):
        try:
            answers[n] = calls[n]()
        except Exception as error:
            answers[n] = error

    threads = [threading.Thread(target=answer, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return answers


def test_ranks_of_one_machine_meet_and_part_in_peace(store, monkeypatch):
    monkeypatch.setattr(lifeline, "_GRACE", 0.0)  # a loss would end this process
    lines = together(*(lambda rank=rank: lifeline.Lifeline(store, rank, 3) for rank in range(3)))
    assert [line.address for line in lines] == [None] * 3
    for line in lines:
        line.last_words = pytest.fail
    for line in (lines[1], lines[0], lines[2]):
        line.close(in_peace=True)
        time.sleep(0.1)  # for the others to hear it


def test_a_machine_that_calls_itself_by_127_0_1_1_is_one_machine(store, monkeypatch):
    """As MASTER_ADDR means on the first machine, where Debian has set it up."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.1.1" if sys.platform.startswith("linux") else "127.0.0.1")
    lines = together(*(lambda rank=rank: lifeline.Lifeline(store, rank, 2) for rank in range(2)))
    assert [line.address for line in lines] == [None] * 2
    for line in lines:
        line.close(in_peace=True)


def door(store):
    """Its address, once rank 0 has opened it, and the password."""
    while (found := meeting._find_door(store)) is None:
        time.sleep(0.01)
    return ("127.0.0.1", found[1]), found[2]


def test_a_stranger_at_the_door_is_no_rank(store):
    def stranger():
        with socket.create_connection(door(store)[0]) as line:
            line.sendall(b"GET / HTTP/1.1\r\n")
            said = line.recv(100)
            gone.set()
            return said

    def second():
        gone.wait(10)
        return lifeline.Lifeline(store, 1, 2)

    gone = threading.Event()
    said = together(lambda: lifeline.Lifeline(store, 0, 2), stranger, second)
    assert said[1] == b""
    for line in (said[0], said[2]):
        line.close(in_peace=True)


@pytest.mark.parametrize("earlier", ["gone", "another's by now", "deaf"])
def test_the_door_of_an_earlier_start_is_knocked_at_in_vain(store, monkeypatch, earlier):
    """torchrun --max-restarts keeps its store: rank 1 may be back before rank 0, and find the door of the last time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        first = dist.PrefixStore(f"matpac_fast {store.add(meeting._ROUND, 1)}", store)
        first.set(meeting._DOOR, f"{server.getsockname()[1]} password")
        first.set(lifeline.FAILED, "rank 1: of the last time")
        if earlier == "gone":
            server.close()
        if earlier == "deaf":
            monkeypatch.setattr(socket, "create_connection", lambda place, **_: real(place, timeout=0.2))

        def later():
            time.sleep(0.5)
            return lifeline.Lifeline(store, 0, 2)

        def another():
            while earlier == "another's by now":
                server.accept()[0].close()

        threading.Thread(target=another, daemon=True).start()
        lines = together(later, lambda: lifeline.Lifeline(store, 1, 2))
    for line in lines:
        assert lifeline.reason_left(line.store) is None
        line.close(in_peace=True)


@pytest.mark.parametrize("failing", [0, 2])
def test_who_fails_before_it_comes_ends_those_that_wait(store, failing):
    others = [lambda rank=rank: lifeline.Lifeline(store, rank, 3) for rank in range(3) if rank != failing]
    told = together(*others, lambda: meeting.tell(store, failing, 3, "no corpus"))
    assert [str(error) for error in told] == [f"rank {failing}: no corpus"] * 2 + ["None"]


def test_who_comes_and_goes_before_all_have_come_is_named(store, monkeypatch):
    def goes():
        place, password = door(store)
        with socket.create_connection(place) as line:
            meeting.say(line, {"password": password, "rank": 1, "host": "node2"})
            return meeting.read(line)

    stays = lambda: lifeline.Lifeline(store, 2, 4)  # noqa: E731
    monkeypatch.setattr(meeting, "_TOLD", 1.0)
    errors = together(lambda: lifeline.Lifeline(store, 0, 4), stays, goes)
    assert errors[2] == {"wait": True}
    assert isinstance(errors[0], PeerError)
    assert {str(error) for error in errors[:2]} == {
        "rank 1 on node2 ended before all had come; its own output says why"
    }


def test_who_never_comes_is_waited_for_no_longer_than_half_an_hour(store, monkeypatch):
    monkeypatch.setattr(lifeline, "PATIENCE", 0.2)
    monkeypatch.setattr(meeting, "_TOLD", 0.1)
    assert str(together(lambda: lifeline.Lifeline(store, 0, 3))[0]) == "rank 1, 2 of 3 did not come"
    nobody = dist.HashStore()
    assert str(together(lambda: lifeline.Lifeline(nobody, 1, 3))[0]) == "rank 0 did not come"


def test_a_first_rank_behind_closed_ports_is_told_as_such(store, monkeypatch):
    monkeypatch.setattr(meeting, "_KNOCKING", 0.2)
    store.add(meeting._ROUND, 1)
    dist.PrefixStore("matpac_fast 1", store).set(meeting._DOOR, f"{free_port()} password")
    with pytest.raises(PeerError, match=r"rank 0 cannot be reached at 127\.0\.0\.1, port \d+: Connection refused; exp"):
        lifeline.Lifeline(store, 1, 2)


def lost(rank, folder, how):
    lifeline._GRACE = 0.5
    with joining.join("cpu") as ranks:
        line = ranks.lifeline
        line.last_words = lambda reason: (folder / f"{rank}").write_text(reason)
        ranks.barrier()
        if rank == 1:
            line.store.set(lifeline.FAILED, "rank 1: why") if how == "told" else None
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # as a main thread that waits where no exception reaches it


@pytest.mark.parametrize(("how", "reason"), [("told", "rank 1: why"), ("mute", "ended and gave no reason")])
def test_a_process_that_waits_for_a_lost_one_is_ended(tmp_path, how, reason):
    assert on_ranks(3, lost, tmp_path, how, timeout=30) == {}
    assert reason in (tmp_path / "0").read_text()
    assert (tmp_path / "2").exists()  # whose line is to rank 0 alone


def first_lost(rank):
    with joining.join("cpu") as ranks:
        ranks.barrier()
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            ranks.barrier()
        except RuntimeError as error:
            return str(ranks.failure(error))


def test_the_end_of_rank_0_is_known_without_being_told(monkeypatch):
    monkeypatch.setattr(lifeline, "_SOON", 0.5)
    assert on_ranks(2, first_lost)[1].startswith("rank 0 on 127.0.0.1 ended and gave no reason, as where")


def failing_early(rank, port):
    os.environ |= {"MASTER_PORT": str(port)}
    with joining.join("cpu" if rank == 0 else "abacus"):
        return "joined"


def test_a_failure_before_joining_ends_the_others():
    reason = "device is 'abacus'; expected auto, cpu, cuda or cuda:N"
    answers = on_ranks(2, failing_early, free_port())
    assert answers == {0: f"PeerError: rank 1: {reason}", 1: f"ConfigError: {reason}"}


def test_a_failure_of_one_process_is_left_to_nobody(monkeypatch):
    monkeypatch.setattr(joining, "_heard", threading.Event())
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    joining.leave_word("no one waits")


def test_a_failure_is_told_once(monkeypatch):
    """By `join`, and by the command whose run it ends: a second time nobody would be there to hear it."""
    told: list[str] = []
    monkeypatch.setattr(joining, "_heard", threading.Event())
    monkeypatch.setattr(joining, "tell", lambda store, rank, world, reason: told.append(reason))
    place = importlib.import_module("torch.distributed.rendezvous")  # the attribute of this name is its function
    monkeypatch.setattr(place, "rendezvous", lambda *_, **__: iter([(None, 1, 2)]))
    for _ in range(2):
        joining.leave_word("no corpus")
    assert told == ["no corpus"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux, where alone gloo is told its interface")
def test_the_interface_of_an_address_is_found():
    assert interface.interface_of("127.0.0.1") == "lo"
    assert interface.interface_of("192.0.2.1") is None  # nobody's
    assert interface.interface_of("2001:db8::1") is None
    if interface._IPV6.exists() and "00000000000000000000000000000001" in interface._IPV6.read_text():
        assert interface.interface_of("::1") == "lo"


@pytest.mark.parametrize(
    ("meaning", "loopback"), [("127.0.1.1", True), ("10.1.2.3", False), ("2001:db8::1", False), (None, True)]
)
def test_a_machine_that_knows_itself_as_loopback(monkeypatch, meaning, loopback):
    def getaddrinfo(*_):
        if meaning is None:
            raise socket.gaierror
        return [(socket.AF_INET, None, None, "", (meaning, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert joining._is_known_as_loopback() is loopback


ON_A_MACHINE = """
import socket, sys
import torch
from matpac_fast.train import joining, lifeline, meeting

meeting._ASKED_AFTER, meeting._ASKED_EVERY, meeting._ASKED, lifeline._GRACE = 1, 1, 2, 0.5
socket.sethostname(f"machine-{sys.argv[1]}")
with joining.join("cpu") as ranks:
    ranks.barrier()
    print("joined", flush=True)
    torch.distributed.recv(torch.zeros(1), 1 - ranks.rank)  # which is never sent
"""


@pytest.fixture
def machines():
    """The names of two network namespaces with a cable between them, 10.9.8.1 and 10.9.8.2."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip(
            "needs Linux, root and iproute2, for two machines on this one; the tests above take it part by part"
        )
    names = [f"matpac{os.getpid()}x{n}" for n in (1, 2)]

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"needs a system that makes network namespaces; this one says {error.stderr.decode()}")
        ip("link", "add", "mp1", "netns", names[0], "type", "veth", "peer", "name", "mp2", "netns", names[1])
        for n, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.9.8.{n}/24", "dev", f"mp{n}")
            for link in ("lo", f"mp{n}"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", name)


def test_machines_named_as_debian_does_train_until_the_cable_is_cut(machines, tmp_path):
    """Gloo offers the others 127.0.1.1 where it is told no interface; and waits for half an hour on a cut cable."""
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n127.0.1.1 machine-0 machine-1\n")
    own = ["unshare", "-um", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh"]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.9.8.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *own, sys.executable, "-c", ON_A_MACHINE, str(rank)],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, name in enumerate(machines)
    ]
    try:
        said = [process.stdout.readline() for process in started if process.stdout]
        if said == ["joined\n"] * 2:
            subprocess.run(["ip", "-n", machines[1], "link", "set", "mp2", "down"], check=True)
        errors = [process.communicate(timeout=60)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert said == ["joined\n"] * 2, errors
    assert [process.returncode for process in started] == [1, 1], errors
    assert "matpac_fast (rank 0): rank 1 on machine-1 is out of reach" in errors[0]
    assert "matpac_fast (rank 1): rank 0 on 10.9.8.1 is out of reach" in errors[1]
