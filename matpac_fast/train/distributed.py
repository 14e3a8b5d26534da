"""The processes ("ranks") that train one model together: started by torchrun, or one alone.

Rank 0 reads and writes the run folder; the others get all they need from it, so the folder need not be shared, unless
FSDP cuts the model: then every rank writes its own part of a checkpoint.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import ConfigError, MatpacFastError
from ..nn.ema import local
from .host import copies_on_host
from .lifeline import Lifeline, leave_reason
from .meeting import PeerError

T = TypeVar("T")

_BROKEN = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")  # in errors that a dead peer causes


class Ranks:
    """All processes of a run, seen from one of them. Alone, every method does the obvious thing at once.

    Attributes:
        device: this rank's.
        rank, world: its number, and how many there are.
        lifeline: to the others, where `join` made the process group.
    """

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1, lifeline: Lifeline | None = None):
        self.device, self.rank, self.world, self.lifeline = device, rank, world, lifeline
        self._background: Any = None
        self._host_mesh: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank, on the host."""
        self.sum_(torch.zeros((), device="cpu"))

    def gather(self, item: T) -> list[T]:
        """Every rank's `item`, in order, on every rank."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, where alone it is called; what it raises there is raised on every rank."""
        if self.world == 1:
            return make()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = make()
            except Exception as error:
                answer[1] = error
        raised = answer[1]
        answer[1] = raised and str(raised)
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
        if raised is not None:
            raise raised
        if answer[1] is not None:
            raise PeerError(f"rank 0: {answer[1]}")
        return answer[0]

    def on_all(self, do: Callable[[], None]) -> None:
        """Do it on every rank; what it raises on one is raised on all."""
        error = None
        try:
            do()
        except MatpacFastError as raised:
            error = raised
        reasons = self.gather(error and str(error))
        if error is not None:
            raise error
        for rank, reason in enumerate(reasons):
            if reason is not None:
                raise PeerError(f"rank {rank}: {reason}")

    def background_group(self) -> Any:
        """A process group for a thread beside the training's, over host memory. All ranks must ask for it together."""
        if self._background is None and self.world > 1:
            self._background = dist.new_group(backend="gloo")
        return self._background

    def to_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory: of this rank's shard, as one, where FSDP has cut a tensor, else of all of it."""
        copies = copies_on_host([local(tensor.detach()) for tensor in tensors.values()])
        if self._host_mesh is None and any(map(is_sharded, tensors.values())):
            from torch.distributed.device_mesh import init_device_mesh

            self._host_mesh = init_device_mesh("cpu", (self.world,))
        pairs = zip(tensors.items(), copies, strict=True)
        return {name: cut_like(copied, tensor, self._host_mesh) for (name, tensor), copied in pairs}

    def hand_out(self, whole: Mapping[str, Tensor] | None, into: Mapping[str, Tensor]) -> None:
        """Copy rank 0's `whole` tensors into everyone's, or into the shards of them that this rank holds.

        Args:
            whole: by name, on rank 0 only.
            into: by name, in the same order on every rank.
        """
        for name, target in into.items():
            if whole is not None:
                tensor = whole[name].to(target.device, target.dtype)
            else:
                tensor = torch.empty(target.shape, dtype=target.dtype, device=target.device)
            if self.world > 1:
                tensor = tensor.contiguous().clone() if self.first else tensor  # never a view of a mapped file
                dist.broadcast(tensor, src=0)
            with torch.no_grad():
                local(target).copy_(self._shard(tensor) if is_sharded(target) else tensor)

    def _shard(self, whole: Tensor) -> Tensor:
        parts = whole.chunk(self.world)  # as FSDP cuts them: along the first axis, the last ones shorter or empty
        return parts[self.rank] if self.rank < len(parts) else whole[:0]

    def failure(self, error: Exception) -> Exception:
        """`error`, or where another rank's end has caused it, a PeerError with that rank's reason."""
        if self.world == 1 or isinstance(error, PeerError):
            return error
        if isinstance(error, MatpacFastError) or not any(word in str(error).lower() for word in _BROKEN):
            if self.lifeline is not None:
                leave_reason(self.lifeline.store, f"rank {self.rank}: {error}")
            return error
        reason = self.lifeline and self.lifeline.reason()
        return PeerError(reason or f"rank {self.rank}: lost another rank, which gave no reason")


ALONE = Ranks(torch.device("cpu"))


class Votes:
    """Lets every rank learn what any of them wants, one step later, so that no step waits for the answer."""

    def __init__(self, ranks: Ranks, n: int):
        self._ranks, self._n = ranks, n
        self._flags = torch.zeros(n, device="cpu")
        self._work: Any = None

    def cast(self, *wants: bool) -> list[bool]:
        """This rank's wishes after a step -> what any rank wished a step ago; alone, after this one."""
        if self._ranks.world == 1:
            return list(wants)
        before = self.count()
        self._flags = torch.tensor(wants, dtype=torch.float32, device="cpu")
        self._work = dist.all_reduce(self._flags, async_op=True)
        return before

    def count(self) -> list[bool]:
        """What any rank wished at the last vote; no vote stays open."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        flags, self._flags = self._flags.tolist(), torch.zeros(self._n, device="cpu")
        return [flag > 0 for flag in flags]


def pick_device(device: str | torch.device) -> torch.device:
    """The device that a name means; "auto" is the GPU where there is one, else the CPU. Under torchrun each rank of a
    machine takes the GPU of its own number.

    Raises:
        ConfigError: no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N") from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda or cuda:N")
    if found.type == "cuda" and found.index is None and "LOCAL_RANK" in os.environ:
        found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {str(found)!r}; torch finds {torch.cuda.device_count()} CUDA devices here")
    return found


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def cut_like(tensor: Tensor, like: Tensor, mesh: Any = None) -> Tensor:
    """This rank's plain shard as the sharded tensor that it is a part of, cut as `like` is; a view. `mesh` is where its
    ranks keep their shards, as those of `like` do by default."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    mesh = mesh or like.device_mesh
    return DTensor.from_local(tensor, mesh, like.placements, shape=like.shape, stride=like.stride())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP has cut, on every rank, each of which must ask; others come back as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def shards(device: torch.device) -> bool:
    """Whether this torch's FSDP2 gives right gradients there: on a CPU from torch 2.8 on."""
    from torch.distributed.fsdp import FSDPModule

    return device.type != "cpu" or hasattr(FSDPModule, "set_force_sum_reduction_for_comms")


def distribute(model: nn.Module, blocks: Sequence[nn.Module], ranks: Ranks, shard: bool) -> nn.Module:
    """What to call for a forward pass whose gradients become the mean over ranks: DDP, or FSDP2 where `shard`.

    FSDP cuts weights, gradients and Adam's moments, block by block, into one part a rank; alone there is nothing to do.
    """
    if ranks.world == 1:
        return model
    if shard:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for module in (*blocks, model):
            part: Any = fully_shard(module, mesh=mesh)  # the module itself, an FSDPModule from here on
            if ranks.device.type == "cpu":  # asked for the mean, gloo gives the sum in torch 2.7 and 2.8
                part.set_force_sum_reduction_for_comms(True)
        return model
    ddp = nn.parallel.DistributedDataParallel
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # The buffers are the positions, which are constant, and the centre, which is reduced with the loss.
    new_name = "forward_sync_buffers" in inspect.signature(ddp.__init__).parameters  # since torch 2.13
    buffers: Any = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
    return ddp(model, device_ids=devices, gradient_as_bucket_view=True, **buffers)
