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
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from .meeting import PATIENCE, Door, PeerError, address_towards, first_host, knock, read, say

T = TypeVar("T")

FAILED = "failed"  # where the first rank that fails leaves its reason for the others
_GRACE = 60.0  # seconds in which a process may notice by itself, and save what it is saving
_SOON = 3.0  # seconds in which rank 0 has told which rank has gone
_BYE = b"."
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN)


class Lifeline:
    """Made by all ranks together: the constructor returns once each is there.

    Where another is lost for good, and this process has not ended by itself a minute later, it is ended, with status 1.

    Args:
        store: of torchrun, or of another start.

    Attributes:
        store: for these processes alone.
        address: this machine's, as others reach it; None where all ranks are on one.
        last_words: called with the reason before the process is ended.

    Raises:
        PeerError: another rank has failed before it came, or did not come within half an hour, or cannot be reached.
    """

    def __init__(self, store: dist.Store, rank: int, world: int):
        self._rank = rank
        self._ranks: dict[socket.socket, str] = {}  # at the other ends: "rank 3 on node2"
        self._woken, self._wake = socket.socketpair()
        self._ended = threading.Event()
        self._lost: str | None = None
        self.last_words: Callable[[str], object] = lambda reason: None
        try:
            self.store, self.address = self._open(store, world) if rank == 0 else self._call(store)
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

    def reason(self) -> str | None:
        """Why another is gone: what it has left, or the first that failed; or, of what this rank has missed, which.

        Waits a moment, for a collective may notice it before rank 0 has told which."""
        until = time.monotonic() + _SOON
        while (left := reason_left(self.store)) is None and time.monotonic() < until:
            time.sleep(0.05)
        return left or self._lost

    def _close_all(self) -> None:
        for line in (*self._ranks, self._woken, self._wake):
            line.close()

    def _open(self, store: dist.Store, world: int) -> tuple[dist.Store, str | None]:
        """Wait for a line from every rank, and have all go on at once."""
        until, missing = time.monotonic() + PATIENCE, set(range(1, world))
        with Door(store, world) as door:
            try:
                while missing:
                    if time.monotonic() > until:
                        raise PeerError(f"rank {', '.join(map(str, sorted(missing)))} of {world} did not come")
                    if lost := door.wait(self._ranks):
                        raise PeerError(f"{self._ranks[lost]} ended before all had come; its own output says why")
                    for line, hello in door.come():
                        missing.discard(hello["rank"])
                        self._ranks[line] = f"rank {hello['rank']} on {hello['host']}"
                        if "reason" in hello:
                            raise PeerError(f"rank {hello['rank']}: {hello['reason']}")
                        say(line, {"wait": True})  # this door is no earlier one
            except PeerError as error:
                for line in self._ranks:
                    say(line, {"reason": str(error)})
                door.refuse(len(missing), str(error))
                raise
        address = next(filter(None, map(address_towards, self._ranks)), None)
        for line in self._ranks:
            say(line, {"address": address})
        return door.store, address

    def _call(self, store: dist.Store) -> tuple[dist.Store, str | None]:
        line, own_store = knock(store, self._rank, PATIENCE)
        self._ranks[line] = f"rank 0 on {first_host()}"
        line.settimeout(PATIENCE)
        try:
            answer = read(line)
        except OSError:  # too late, or out of reach
            answer = None
        if answer is None or "reason" in answer:
            raise PeerError((answer or {}).get("reason", f"{self._ranks[line]} ended before all had come"))
        line.settimeout(None)
        # Beside rank 0 it has rank 0's address; and none where all are on one machine.
        return own_store, answer["address"] and (address_towards(line) or answer["address"])

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
        self._lost = reason
        if self._rank == 0:  # who alone knows which rank it is, and whose machine keeps the store
            _within(5.0, lambda: leave_reason(self.store, reason))
        if self._ended.wait(_GRACE):
            return
        try:
            if not silent:
                reason = _within(5.0, lambda: reason_left(self.store)) or reason
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


def leave_reason(store: dist.Store, reason: str) -> None:
    """For the other ranks, where none has left one before."""
    with contextlib.suppress(RuntimeError):  # whose process has ended
        store.compare_set(FAILED, "", reason)
