"""Where the ranks of a run meet: rank 0 opens a door, the others knock.

torchrun keeps its store when it starts the processes anew, so what stands there may be of an earlier start, and nothing
is believed but a rank 0 that answers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist

from ..errors import MatpacFastError

_ROUND, _DOOR = "matpac_fast round", "door"  # how often rank 0 has opened; its port and password
_ASKED_AFTER, _ASKED_EVERY, _ASKED = 30, 15, 6  # seconds of silence, between questions; questions: two minutes in all
PATIENCE = 1800.0  # seconds, with ranks that have not started yet; torch's own
_KNOCKING = 300.0  # seconds in which rank 0 may come back to a port that nobody listens on
_TOLD = 10.0  # seconds in which rank 0 tells the others that it has failed
_TELLING = 60.0  # seconds in which another rank waits for rank 0, to tell it that


class PeerError(MatpacFastError, RuntimeError):
    """Another rank has failed; the message is its reason."""


class Door:
    """Where the others call rank 0. Whoever comes has to know the password: a port is open to all."""

    def __init__(self, store: dist.Store, world: int):
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._door = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=world)
        self._password = secrets.token_hex(16)
        self.store = dist.PrefixStore(f"matpac_fast {store.add(_ROUND, 1)}", store)
        self.store.set(_DOOR, f"{self._door.getsockname()[1]} {self._password}")

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self._door.close()

    def wait(self, lines: Iterable[socket.socket]) -> socket.socket | None:
        """Until somebody calls, half a second at most -> a line whose other end has gone meanwhile, if one has."""
        with selectors.DefaultSelector() as heard:
            for end in (self._door, *lines):
                heard.register(end, selectors.EVENT_READ)
            found = [key.fileobj for key, _ in heard.select(timeout=0.5)]
        return next((end for end in lines if end in found), None)

    def come(self) -> Iterator[tuple[socket.socket, dict[str, Any]]]:
        """Those who are at the door, and what they say."""
        self._door.setblocking(False)
        while True:
            try:
                line, _ = self._door.accept()
            except BlockingIOError:
                return
            line.settimeout(2.0)
            try:
                hello = read(line)
            except OSError:  # a timeout too
                hello = None
            if hello is None or hello.get("password") != self._password:
                line.close()
                continue
            line.settimeout(None)
            _ask_after(line)
            yield line, hello

    def refuse(self, n: int, reason: str) -> None:
        """Tell it to those `n` who have not come yet, if they come soon."""
        until = time.monotonic() + _TOLD
        while n > 0 and time.monotonic() < until:
            self.wait(())
            for line, _ in self.come():
                say(line, {"reason": reason})
                line.close()
                n -= 1


def knock(store: dist.Store, rank: int, patience: float, reason: str | None = None) -> tuple[socket.socket, dist.Store]:
    """A line to rank 0, which has answered, and the store of its round. With a `reason` it has been told that."""
    host = first_host()
    hello = {"rank": rank, "host": socket.gethostname()} | ({} if reason is None else {"reason": reason})
    began, pause, error = time.monotonic(), 0.01, None
    while time.monotonic() - began < (_KNOCKING if error else patience):
        if (found := _find_door(store)) is not None:
            own_store, port, password = found
            try:
                line, answer = _call(host, port, hello | {"password": password})
            except OSError as failed:  # an earlier round's, as long as rank 0 has not come; or behind a firewall
                error = f"at {host}, port {port}: {failed.strerror or failed}"
            else:
                if answer and (reason is not None or "reason" not in answer):
                    return line, own_store
                line.close()
                if answer:
                    raise PeerError(answer["reason"])
        time.sleep(pause)
        pause = min(2 * pause, 0.5)
    if error is None:
        raise PeerError("rank 0 did not come")
    raise PeerError(
        f"rank 0 cannot be reached {error}; expected that processes of all machines may connect to each other, "
        "on any port"
    )


def _call(host: str, port: int, hello: dict[str, Any]) -> tuple[socket.socket, dict[str, Any] | None]:
    """A line, and what was answered; None where it is no door of ours any more."""
    line = socket.create_connection((host, port), timeout=30.0)
    try:
        _ask_after(line)
        say(line, hello)
        return line, read(line)
    except OSError:
        line.close()
        raise


def tell(store: dist.Store, rank: int, world: int, reason: str) -> None:
    """Tell the other ranks, which wait for this one, that it has failed. Rank 0 waits a moment for them to ask."""
    if rank > 0:
        knock(store, rank, _TELLING, reason)[0].close()
        return
    with Door(store, world) as door:
        door.refuse(world - 1, f"rank 0: {reason}")


def _find_door(store: dist.Store) -> tuple[dist.Store, int, str] | None:
    """The store, port and password of rank 0's last round, if it has had one."""
    if not store.check([_ROUND]):
        return None
    own_store = dist.PrefixStore(f"matpac_fast {int(store.get(_ROUND))}", store)
    if not own_store.check([_DOOR]):
        return None
    port, password = own_store.get(_DOOR).decode().split()
    return own_store, int(port), password


def first_host() -> str:
    """Rank 0's machine, as torchrun and env:// name it."""
    return os.environ.get("MASTER_ADDR", "localhost")


def say(line: socket.socket, what: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # nobody hears it: that is found out by listening
        line.sendall(json.dumps(what).encode() + b"\n")


def read(line: socket.socket) -> dict[str, Any] | None:
    """What was said, and not a byte more; None where it ended before, or was none of ours."""
    said = b""
    while not said.endswith(b"\n") and len(said) < 65_536:
        byte = line.recv(1)
        if not byte:
            return None
        said += byte
    try:
        what = json.loads(said)
    except ValueError:
        return None
    return what if isinstance(what, dict) else None


def _ask_after(line: socket.socket) -> None:
    """Have the kernel ask the other end whether it is there, where it has been silent."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    first = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"  # macOS
    for name, value in ((first, _ASKED_AFTER), ("TCP_KEEPINTVL", _ASKED_EVERY), ("TCP_KEEPCNT", _ASKED)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def address_towards(line: socket.socket) -> str | None:
    """This machine's address, as the other end has it; None where that is on this machine.

    IPv4's as such, where the socket is one of IPv6's. What is called by 127.0.1.1 is answered from 127.0.0.1."""
    here, there = (str(end[0]).removeprefix("::ffff:") for end in (line.getsockname(), line.getpeername()))
    return None if here == there or ipaddress.ip_address(here.partition("%")[0]).is_loopback else here
