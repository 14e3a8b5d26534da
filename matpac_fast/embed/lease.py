"""Leases: who works on what, in files on a disk that all workers share, without locks, clocks in step or a server.

A lease is a file that one process alone can create (O_EXCL, which network file systems keep too). Its owner rewrites
it now and then. Whoever sees it unchanged for `seconds` by a clock of their own takes it over, by creating the lease of
the next number: again only one can. On the machine of the owner a process that is gone is seen at once.

Only time counts in which one could renew one's own: where the disk stood still, or this process did, nobody could be
heard of, and nobody is dead for that.

Two workers may still do the same work, where one slept for long and was given up. That costs time and nothing else:
results are renamed into place whole, and are the same whoever made them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 60.0


class Leases:
    """The leases in a folder, and those that this worker holds, kept alive by a thread until `close`.

    Args:
        folder: for the leases; made where it is missing.
        seconds: after which a lease that nobody renews may be taken over; the same for all workers.

    Attributes:
        worker: a name that no other worker has.
        status: what this worker tells the others, JSON; written with each renewal.
    """

    def __init__(self, folder: Path, seconds: float = SECONDS):
        self._folder, self.seconds = folder, seconds
        self.worker = uuid.uuid4().hex[:12]
        self._me = {"worker": self.worker, "host": socket.gethostname(), **_process(os.getpid())}
        self.status: dict[str, Any] = {}
        self._held: dict[str, Path] = {}
        self._kept: set[str] = set()  # of those held, the ones that are made again where they vanish
        self._seen: dict[Path, tuple[bytes, float]] = {}  # what a lease of another said, and when it began to
        self._beat = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        folder.mkdir(parents=True, exist_ok=True)
        self._renewed = time.monotonic()  # when the last round of renewals ended
        self._resumed = self._renewed  # when the last one ended that had been long in coming
        self._thread = threading.Thread(target=self._keep_alive, name="leases", daemon=True)
        self._thread.start()

    def __enter__(self) -> Leases:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def claim(self, name: str, among: dict[str, Path] | None = None, keep: bool = False) -> bool:
        """Take the lease of `name`, if nobody alive holds it.

        Args:
            name: of the lease.
            among: what `taken` said, to save looking again.
            keep: make it again where others remove it: for a name that is this worker's alone. A piece of work may be
                another's by then, or done.
        """
        current = (self.taken() if among is None else among).get(name)
        if current is not None and not self._given_up(current):
            return False
        number = 0 if current is None else _number(current) + 1
        path = self._folder / f"{name}.{number}"
        try:
            handle = self._create(path)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self._content())
        except OSError:  # a full disk, say: an empty lease would keep all others waiting
            path.unlink(missing_ok=True)
            raise
        with self._lock:
            self._held[name] = path
            if keep:
                self._kept.add(name)
        return True

    @contextlib.contextmanager
    def waited_for(self, name: str, tell: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the lease of `name`, waiting for it as long as it takes, and telling so."""
        while not self.claim(name):
            tell()
            time.sleep(min(0.2, self.seconds / 20))
        try:
            yield
        finally:
            self.release(name)

    def holds(self, name: str) -> bool:
        """Whether the lease of `name` is still this worker's: nobody took it over while it stood still."""
        with self._lock:
            mine = self._held.get(name)
        return mine is not None and self.taken().get(name) == mine and self._is_mine(mine)

    def _is_mine(self, path: Path) -> bool:
        """Whether it says so: once this worker was given up, another may have made a lease of the same number."""
        try:
            owner = _parse(path.read_bytes())
        except OSError:
            return False
        return all(owner.get(key) == value for key, value in self._me.items())

    def release(self, name: str) -> None:
        """Give back a lease, and clear away those of the dead that it followed."""
        with self._lock:
            mine = self._held.pop(name, None)
            self._kept.discard(name)
        if mine is not None and self._is_mine(mine):
            # Its own one last, so that nobody takes those of the dead for the present one.
            for number in range(_number(mine) + 1):
                (self._folder / f"{name}.{number}").unlink(missing_ok=True)

    def others(self, prefix: str) -> list[dict[str, Any]]:
        """What the other living owners of leases that begin with `prefix` say; those of the dead are removed."""
        found = []
        for name, path in self.taken().items():
            if name.startswith(prefix) and name not in self._held:
                if self._given_up(path):
                    path.unlink(missing_ok=True)
                elif path in self._seen:
                    found.append(_parse(self._seen[path][0]).get("status", {}))
        return found

    def clear(self, names: Iterable[str]) -> None:
        """Remove all leases of these names, whose work is done."""
        names = set(names)
        for path in self._folder.glob("*"):
            if path.name.rpartition(".")[0] in names:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give back all that is held."""
        self._closing.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)
        with contextlib.suppress(OSError):  # others are at work
            self._folder.rmdir()

    def _create(self, path: Path) -> int:
        while True:
            try:
                return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileNotFoundError:  # the last of the others took the folder away
                self._folder.mkdir(parents=True, exist_ok=True)

    def taken(self) -> dict[str, Path]:
        """The leases that are there, by name."""
        numbers: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError):
            for entry in os.listdir(self._folder):
                name, _, number = entry.rpartition(".")
                if name and number.isdigit():
                    numbers[name] = max(int(number), numbers.get(name, 0))
        return {name: self._folder / f"{name}.{number}" for name, number in numbers.items()}

    def _given_up(self, path: Path) -> bool:
        """Whether the owner is known to be gone, or has not been heard of for long enough."""
        try:
            said = path.read_bytes()
        except OSError:
            return False  # just given back: the next look will find the work done, or free
        now = time.monotonic()
        before, since = self._seen.get(path, (None, now))
        if said != before:
            since = now
        self._seen[path] = said, since
        owner = _parse(said)
        process = {key: owner.get(key) for key in ("pid", "machine", "began")}
        here = self._me["machine"] is not None and process["machine"] == self._me["machine"]
        if here and _process(owner.get("pid", 0)) != process:
            return True
        # One that is there, on this machine too, may be stopped or frozen for good: for all others the time decides.
        if now - self._renewed > self.seconds / 2:
            return False  # neither was this worker heard of: the disk, or this machine, may stand still
        return now - max(since, self._resumed) > self.seconds

    def _content(self) -> bytes:
        return json.dumps({**self._me, "beat": self._beat, "status": self.status}).encode()

    def _keep_alive(self) -> None:
        while not self._closing.wait(min(self.seconds / 6, 3600.0)):  # which may be infinite
            self.renew()

    def renew(self) -> None:
        """Tell the others now, and note that this was possible."""
        failed = False
        with self._lock:
            self._beat += 1
            content = self._content()
            with contextlib.suppress(OSError):
                os.utime(self._folder)  # who holds nothing has to wait for a disk that stands still as well
            for name, path in self._held.items():
                try:
                    self._rewrite(name, path, content)
                except OSError:  # a disk that fails now may answer next time
                    failed = True
        if failed:
            return
        now = time.monotonic()
        if now - self._renewed > self.seconds / 2:
            self._resumed = now  # before the next line, since `_given_up` may look in between
        self._renewed = now

    def _rewrite(self, name: str, path: Path, content: bytes) -> None:
        try:
            handle = os.open(path, os.O_WRONLY)
            if not self._is_mine(path):
                os.close(handle)
                return
        except FileNotFoundError:
            if name not in self._kept:
                return  # another has done the work and cleared up
            handle = self._create(path)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.truncate()


def _number(path: Path) -> int:
    return int(path.name.rpartition(".")[2])


def _parse(said: bytes) -> dict[str, Any]:
    """A lease's content; nothing where it is read in the midst of being written."""
    try:
        found = json.loads(said)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _process(pid: int) -> dict[str, Any]:
    """A process that is alive: its number, what tells its machine from all others, and when it began there."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return {"pid": pid, "machine": _machine(), "began": None}
    # A zombie has ended; a number that came round again began at another time.
    began = None if fields[0] in "ZX" else fields[19]
    return {"pid": pid, "machine": _machine(), "began": began}


@functools.cache
def _machine() -> str | None:
    """This boot of this machine and this space of process numbers; None where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
