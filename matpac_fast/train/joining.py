"""How the processes of a run find each other, and what a process says that fails before it has."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import ConfigError, first_line
from .distributed import Ranks, pick_device
from .interface import interface_of
from .lifeline import Lifeline, leave_reason, reason_left
from .meeting import PeerError, tell

_KEPT: list[Any] = []
_heard = threading.Event()  # the others have been told how this process ends, or are on a line that tells them


@contextlib.contextmanager
def join(device: str | torch.device) -> Iterator[Ranks]:
    """The ranks of this run: those of torchrun's environment variables or of a process group that is there already.

    Raises:
        ConfigError: no such device here, more ranks on this machine than GPUs, or a process group for GPUs alone.
        PeerError: another rank has failed before all had joined, or cannot be reached.
    """
    if dist.is_available() and dist.is_initialized():
        if "cpu" not in (backends := dist.get_backend_config()):
            raise ConfigError(
                f"torch.distributed is initialised with {backends}, which carries nothing between hosts' memories; "
                'expected init_process_group("cpu:gloo,cuda:nccl")'
            )
        yield Ranks(pick_device(device), dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(pick_device(device))
        return
    try:
        found = pick_device(device)
    except ConfigError as error:
        leave_word(str(error))
        raise
    if found.type == "cuda":
        torch.cuda.set_device(found)
    with _ended_by_signals():
        ranks, lifeline = _meet(found)
    try:
        with _ended_by_signals():
            _make_group(ranks, lifeline)
        yield ranks
        # Not where the body raises: taking NCCL down waits for ranks that may be gone. The process ends anyway.
        dist.destroy_process_group()
    except BaseException:
        lifeline.close(in_peace=False)
        raise
    lifeline.close(in_peace=True)


def leave_word(reason: str) -> None:
    """Have a failure before `join` end the other ranks too, who would wait for this one for half an hour."""
    if _heard.is_set():
        return
    _heard.set()
    from torch.distributed.rendezvous import rendezvous

    with contextlib.suppress(Exception):  # with nobody there to hear it
        store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=10)))
        tell(store, rank, world, reason)


def _meet(device: torch.device) -> tuple[Ranks, Lifeline]:
    from torch.distributed.rendezvous import rendezvous

    _heard.set()
    try:
        store, rank, world = next(rendezvous("env://"))
        lifeline = Lifeline(store, rank, world)
        return Ranks(device, rank, world, lifeline), lifeline
    except PeerError:
        raise
    except RuntimeError as error:
        raise PeerError(f"rank 0 ended before all had joined; its own output says why ({first_line(error)})") from error


def _make_group(ranks: Ranks, lifeline: Lifeline) -> None:
    if lifeline.address and _is_known_as_loopback() and (name := interface_of(lifeline.address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=lifeline.store, rank=ranks.rank, world_size=ranks.world)
        # DDP must not be the last to hold the group: it would take it down holding the interpreter's lock, for which
        # the group's threads may be waiting.
        _KEPT.append(dist.group.WORLD)
        ranks.barrier()  # a rank that fails at once must not be gone before the others have connected to it
    except RuntimeError as error:
        if (reason := reason_left(lifeline.store)) is None:
            reason = (
                f"rank {ranks.rank} on {socket.gethostname()}: no connection to the other processes "
                f"({first_line(error)}); expected that all can connect to each other on any port. "
                "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network interface to use"
            )
            leave_reason(lifeline.store, reason)
        raise PeerError(reason) from error


def _is_known_as_loopback() -> bool:
    """Whether this machine's own name means an address that no other machine reaches, or none, as gloo would find."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return True
    return ipaddress.ip_address(found[0][4][0]).is_loopback


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Meanwhile SIGINT and SIGTERM end the process at once: it waits for ranks that may never come, in C++, where no
    handler of Python's is called, and torchrun would wait 30 s for it."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
