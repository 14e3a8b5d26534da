"""A line from every rank to rank 0: who ends or falls out of reach is missed, whatever the others are waiting for.

A collective notices that a peer has gone where the peer's machine closes the connection. A machine that has lost its
power or its network closes nothing, and gloo waits half an hour for it; while the group is being made, nobody notices
anything. On a line nothing is said but good-bye: the kernels at its ends ask each other whether they are there, so that
no long step, probe or compilation is taken for an end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from ..errors import MatpacFastError

T = TypeVar("T")

FAILED = "failed"  # where the first rank that fails leaves its reason for the others
_DOOR, _ADDRESS = "door", "address"  # rank 0's port and its password; its address
_ASKED_AFTER, _ASKED_EVERY, _ASKED = 30, 15, 6  # seconds of silence, between questions; questions: two minutes in all
_GRACE = 60.0  # seconds in which a process may notice by itself, and save what it is saving
_PATIENCE = timedelta(minutes=30)  # with ranks that have not started yet; torch's own
_BYE = b"."
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)


class PeerError(MatpacFastError, RuntimeError):
    """Another rank has failed; the message is its reason."""


class Lifeline:
    """Made by all ranks together: the constructor returns once each is there.

    Where another is lost for good, and this process has not ended by itself a minute later, it is ended, with status 1.

    Attributes:
        address: this machine's, as others reach it; None where all ranks are on one.
        last_words: called with the reason before the process is ended.

    Raises:
        PeerError: another rank has failed before it came, or did not come within half an hour, or cannot be reached.
    """

    def __init__(self, store: dist.Store, rank: int, world: int):
        self._store, self._rank = store, rank
        self._ranks: dict[socket.socket, str] = {}  # at the other ends: "rank 3 on node2"
        self._woken, self._wake = socket.socketpair()
        self._ended = threading.Event()
        self.last_words: Callable[[str], object] = lambda reason: None
        try:
            self.address = self._open(world) if rank == 0 else self._call(world)
        except BaseException:
            self._close_all()
            raise
        self._watch = threading.Thread(target=self._keep_watch, name="lifeline", daemon=True)
        self._watch.start()

    def close(self, in_peace: bool) -> None:
        """Watch no longer. `in_peace` is said to the others, who else take it for a failure."""
        self._ended.set()
        for line in self._ranks if in_peace else ():
            with contextlib.suppress(OSError):  # who has left before has read all there was to say
                line.send(_BYE)
        self._wake.send(_BYE)
        self._watch.join()
        self._close_all()

    def _close_all(self) -> None:
        for line in (*self._ranks, self._woken, self._wake):
            line.close()

    def _open(self, world: int) -> str | None:
        """Wait for a line from every rank -> the address at which others reach this machine."""
        password, until = secrets.token_hex(16), time.monotonic() + _PATIENCE.total_seconds()
        missing = set(range(1, world))
        with _listening(world) as door, selectors.DefaultSelector() as heard:
            heard.register(door, selectors.EVENT_READ)
            self._store.set(_DOOR, f"{door.getsockname()[1]} {password}")
            while missing:
                _raise_left(self._store)
                if time.monotonic() > until:
                    raise PeerError(f"rank {', '.join(map(str, sorted(missing)))} of {world} did not come")
                for key, _ in heard.select(timeout=0.5):
                    if key.fileobj is not door:
                        _raise_left(self._store)
                        raise PeerError(f"{key.data} ended before all had come; its own output says why")
                    line, _ = door.accept()
                    hello = _read_hello(line)
                    if len(hello) != 3 or hello[0] != password:
                        line.close()
                        continue
                    missing.discard(int(hello[1]))
                    self._ranks[line] = f"rank {hello[1]} on {hello[2]}"
                    heard.register(line, selectors.EVENT_READ, self._ranks[line])
        addresses = [_ends(line)[0] for line in self._ranks if len(set(_ends(line))) == 2]
        self._store.set(_ADDRESS, addresses[0] if addresses else "none")
        return addresses[0] if addresses else None

    def _call(self, world: int) -> str | None:
        host = os.environ.get("MASTER_ADDR", "localhost")  # rank 0's, as torchrun and env:// have it
        port, password = _wait_for(self._store, _DOOR).split()
        try:
            line = socket.create_connection((host, int(port)), timeout=60.0)
        except OSError as error:
            raise PeerError(
                f"rank 0 cannot be reached at {host}, port {port} ({error.strerror or error}); expected that processes "
                "of all machines may connect to each other on any port"
            ) from error
        self._ranks[line] = f"rank 0 on {host}"
        _ask_after(line)
        line.sendall(f"{password} {self._rank} {socket.gethostname()}\n".encode())
        line.settimeout(None)
        of_first = _wait_for(self._store, _ADDRESS)
        here, there = _ends(line)
        if here == there:  # beside rank 0
            here = of_first
        return None if of_first == "none" else here

    def _keep_watch(self) -> None:
        with selectors.DefaultSelector() as heard:
            heard.register(self._woken, selectors.EVENT_READ)
            for line in self._ranks:
                heard.register(line, selectors.EVENT_READ)
            while True:
                for key, _ in heard.select():
                    line = key.fileobj
                    if line is self._woken:
                        return
                    assert isinstance(line, socket.socket)
                    error = None
                    try:
                        said = line.recv(1)
                    except OSError as raised:
                        said, error = b"", raised
                    heard.unregister(line)
                    if said != _BYE:
                        self._lose(self._ranks[line], error)
                        return

    def _lose(self, rank: str, error: OSError | None) -> None:
        silent = error is not None and error.errno in _SILENT
        reason = f"{rank} ended and gave no reason, as where the system kills it for want of memory"
        if silent:
            reason = f"{rank} is out of reach: its machine, or the network between, is gone ({error})"
        if self._rank == 0:  # who alone knows which rank it is, and whose machine keeps the store
            _within(5.0, lambda: leave_reason(self._store, reason))
        if self._ended.wait(_GRACE):
            return
        try:
            if not silent:
                reason = _within(5.0, lambda: reason_left(self._store)) or reason
            self.last_words(reason)
            print(f"matpac_fast (rank {self._rank}): {reason}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)  # the main thread waits in C++ for who will never answer: no exception would reach it


def _within(seconds: float, ask: Callable[[], T]) -> T | None:
    """What the store answers; None where it does not in time: a main thread that waits for it holds its lock."""
    answers: list[T] = []
    asking = threading.Thread(target=lambda: answers.append(ask()), daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else None


def reason_left(store: dist.Store) -> str | None:
    """That of the first rank which has failed, if one has, and if the process that keeps the store is still there."""
    try:
        return store.get(FAILED).decode() if store.check([FAILED]) else None
    except RuntimeError:
        return None


def reason_soon(store: dist.Store, seconds: float = 3.0) -> str | None:
    """`reason_left`, where this rank has noticed the end of another before rank 0 has told which."""
    until = time.monotonic() + seconds
    while (reason := reason_left(store)) is None and time.monotonic() < until:
        time.sleep(0.05)
    return reason


def leave_reason(store: dist.Store, reason: str) -> None:
    """For the other ranks, where none has left one before."""
    with contextlib.suppress(RuntimeError):  # whose process has ended
        store.compare_set(FAILED, "", reason)


def _raise_left(store: dist.Store) -> None:
    if (reason := reason_left(store)) is not None:
        raise PeerError(reason)


def _wait_for(store: dist.Store, key: str) -> str:
    until, pause = time.monotonic() + _PATIENCE.total_seconds(), 0.01
    while not store.check([key]):
        _raise_left(store)
        if time.monotonic() > until:
            raise PeerError("rank 0 did not come, or waits for others that did not")
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    return store.get(key).decode()


def _listening(world: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=world)


def _read_hello(line: socket.socket) -> list[str]:
    """Whoever calls has ten seconds to say who it is; a port is open to all."""
    line.settimeout(10.0)
    said = b""
    with contextlib.suppress(OSError):
        while not said.endswith(b"\n") and len(said) < 400 and (more := line.recv(400)):
            said += more
    line.settimeout(None)
    _ask_after(line)
    return said.decode(errors="replace").split()


def _ask_after(line: socket.socket) -> None:
    """Have the kernel ask the other end whether it is there, where it has been silent."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    first = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"  # macOS
    for name, value in ((first, _ASKED_AFTER), ("TCP_KEEPINTVL", _ASKED_EVERY), ("TCP_KEEPCNT", _ASKED)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _ends(line: socket.socket) -> tuple[str, str]:
    """The addresses of this end and the other; IPv4's as such where the socket is one of IPv6's."""
    here, there = (str(end[0]).removeprefix("::ffff:") for end in (line.getsockname(), line.getpeername()))
    return here, there
