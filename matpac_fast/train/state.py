"""The run folder: checkpoints that are whole or not there, and the newest of them to go on from.

config.json     what the run is
log.jsonl       what it did
latest          name of the newest checkpoint, one line
checkpoints/step-00001000/{model.safetensors, optimizer.safetensors, state.json}

Where FSDP has cut the model, each process writes what it holds, and a checkpoint is {parts/, state.json}.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checkpoint, distcp
from ..config import MatpacConfig
from ..errors import CheckpointError, ConfigError
from ..files import check_no_file, clear_torn, crc32, entries_of, sync_folder, write_text
from ..intact import check_sums, intact_named, read_state
from ..model import Matpac
from .config import TrainConfig
from .distributed import ALONE, Ranks, cut_like, is_sharded
from .step import trained_parameters

_PART = ".part"


def read_config(run: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The configuration of a run folder, or None where there is no run."""
    check_no_file(run, "the run")
    path = Path(run) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        # Through the classes and back: what a newer version added gets its default.
        config["model"] = MatpacConfig.from_dict(config["model"]).to_dict()
        config["train"] = TrainConfig.from_dict(config["train"]).to_dict()
        return config
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # ValueError: no JSON, no UTF-8, ConfigError
        raise CheckpointError(f"{path}: damaged: {error}") from None


def steps_done(run: str | os.PathLike[str]) -> int:
    """Steps up to the newest checkpoint of a run folder, 0 where there is none, or `latest` is damaged, which loading
    it tells."""
    latest = RunFolder(run).latest()
    step = "" if latest is None else latest.name.removeprefix("step-")
    return int(step) if step.isdecimal() else 0


@dataclass(frozen=True)
class Snapshot:
    """A copy of all that a checkpoint holds, in host memory: training may go on while it is written."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    metadata: dict[str, Any]
    state: dict[str, Any]
    group: Any = None  # of the ranks that write it together, where each has a part; else rank 0 has all

    @classmethod
    def take(
        cls, model: Matpac, optimizer: torch.optim.Optimizer, state: dict[str, Any], ranks: Ranks = ALONE
    ) -> Snapshot:
        """Rank 0 gets all of it and the others nothing; or where FSDP has cut the model, each its shards."""
        weights, moments = model.state_dict(), optimizer_tensors(model, optimizer)
        sharded = any(is_sharded(tensor) for tensor in weights.values())

        def copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return ranks.to_host(tensors) if sharded or ranks.first else {}

        metadata = {"kind": "matpac", "config": model.config.to_dict(), "step": state["step"]}
        group = ranks.background_group() if sharded else None
        return cls(copy(weights), copy(moments), metadata, state, group)


class RunFolder:
    """One run on disk. Makes the folder; a folder with anything but a run in it raises ConfigError."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        checkpoint.check_name(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        if entries_of(self.path) and not (self.path / "config.json").exists():  # lock and torn first writes are hidden
            told = f"{self.path} is not empty and holds no run; give a new folder"
            if whole := checkpoint.checkpoints(self.path):
                newest = shlex.quote(str(list(whole.values())[-1]))
                told = f"{self.path / 'config.json'} is missing; to begin a run with its weights, add --init {newest}"
            raise ConfigError(told)
        self._checkpoints = self.path / "checkpoints"
        self._held: int | None = None  # the folder, opened while it is locked

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    def write_config(self, config: Mapping[str, Any]) -> None:
        write_text(self.path / "config.json", json.dumps(config, indent=2, allow_nan=False) + "\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process from training into the same folder; the lock goes with the process, however it ends."""
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.path}: another process is training into this run") from None
            except OSError as error:  # a file system without locks, as Lustre may be mounted
                warnings.warn(
                    f"{self.path} cannot be locked ({error.strerror}): see to it that no second run writes there",
                    stacklevel=1,  # above it is contextlib
                )
            else:
                clear_torn(self.path)
            self._held = os.open(self.path, os.O_RDONLY)
            try:
                yield
            finally:
                os.close(self._held)
                self._held = None

    def _check_still_there(self) -> None:
        """That no checkpoint lands in the run of somebody who has removed this one and begun again."""
        if self._held is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._held), os.stat(self.path)):
                return
        raise CheckpointError(f"{self.path} was removed, moved or replaced since this run began to train into it")

    def latest(self) -> Path | None:
        """Folder of the newest checkpoint, or None where there is none yet."""
        name = checkpoint.read_latest(self.path)
        return self._checkpoints / name if name else None

    def save(self, snapshot: Snapshot, keep_last: int, keep_every: int | None = None) -> None:
        """Write a checkpoint; `latest` moves to it once all of it is on the disk, then old ones go.

        Rank 0 alone calls it, or every rank where each has a part.

        Raises:
            CheckpointError: the disk is full or failing, and the checkpoint before is untouched; or the folder is no
                longer this run's.
        """
        from safetensors import SafetensorError

        self._check_still_there()
        name = checkpoint.step_name(snapshot.state["step"])
        done = self._checkpoints / name
        part = self._checkpoints / (name + _PART)
        first = snapshot.group is None or dist.get_rank(snapshot.group) == 0
        try:
            if snapshot.group is not None:
                tensors = _together(snapshot.model, snapshot.optimizer)
                distcp.save(part / checkpoint.PARTS, tensors, snapshot.metadata, snapshot.group)
                if not first:
                    return
            else:
                part.mkdir(parents=True)
                checkpoint.save(part / "model.safetensors", snapshot.model, snapshot.metadata)
                checkpoint.save(part / "optimizer.safetensors", snapshot.optimizer, {"kind": "optimizer"})
            written = [file for file in sorted(part.rglob("*")) if file.is_file()]
            state = {**snapshot.state, "crc32": {str(file.relative_to(part)): crc32(file) for file in written}}
            write_text(part / "state.json", json.dumps(state, indent=2) + "\n")
            if done.exists():  # left by a run that was killed before it moved `latest` here
                shutil.rmtree(done)
            os.rename(part, done)
            sync_folder(self._checkpoints)
            write_text(self.path / "latest", name + "\n")
        except (OSError, SafetensorError) as error:
            if first:
                shutil.rmtree(part, ignore_errors=True)
            before = self.latest()
            intact = f"; {before.name} is intact" if before else ""
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise CheckpointError(f"{done}: cannot be saved: {reason}{intact}") from error
        self._prune(keep_last, keep_every)

    def check_shared(self, ranks: Ranks) -> None:
        """Raise ConfigError where some rank does not see the folder that rank 0 does."""
        mark = self.path / ".lock"

        def write() -> str:
            mark.write_text(token := uuid.uuid4().hex)
            return token

        token = ranks.from_first(write)

        def look() -> None:
            if not mark.is_file() or mark.read_text() != token:
                raise ConfigError(
                    f"rank {ranks.rank} does not see rank 0's {self.path}: with --shard each process writes a part "
                    "of the checkpoint, so --out must be on a disk that all nodes share"
                )

        ranks.on_all(look)

    def load(self, model: Matpac, optimizer: torch.optim.Optimizer, ranks: Ranks = ALONE) -> dict[str, Any] | None:
        """Put the newest checkpoint into model and optimizer and return its state; None where there is none yet.

        Any number of ranks may have written it. Rank 0 reads it and hands it out; where it is in parts, every rank
        reads what it needs.
        """
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}

        def read() -> tuple[dict[str, Any], list[str], Path | None] | None:
            folder = self.latest()
            for left in self._checkpoints.glob("*" + _PART):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            if folder is None:
                return None
            parts = folder / checkpoint.PARTS
            in_parts = distcp.is_one(parts)
            if in_parts:
                for full, shape in distcp.shapes(parts).items():
                    of, _, name = full.partition(".")
                    (weights if of == "model" else moments)[name] = shape
            else:
                weights.update(checkpoint.load(folder / "model.safetensors")[0])
                moments.update(checkpoint.load(folder / "optimizer.safetensors")[0])
            checkpoint.check_fits(model.state_dict(), weights, str(folder))
            check_optimizer_tensors(model, moments, str(folder))
            check_sums(folder, state := read_state(folder))
            return state, list(moments), parts if in_parts else None

        def read_or_name_another() -> tuple[dict[str, Any], list[str], Path | None] | None:
            with intact_named(self.path, "to go on from it, echo {name} > {run}/latest"):
                return read()

        found = ranks.from_first(read_or_name_another)
        if found is None:
            return None
        state, names, parts = found
        own, held = model.state_dict(), empty_optimizer_tensors(model, optimizer, names)
        if parts is not None:
            ranks.on_all(lambda: distcp.fill(_together(own, held), parts))
        else:
            ranks.hand_out(weights if ranks.first else None, own)
            ranks.hand_out(moments if ranks.first else None, held)
        return state

    def _prune(self, keep_last: int, keep_every: int | None) -> None:
        """Remove the checkpoints that are neither among the newest nor of a multiple of `keep_every`."""
        latest = self.latest()
        whole = checkpoint.checkpoints(self.path)
        older = [p for p in whole.values() if p != latest]
        kept = {latest, *older[max(0, len(older) - keep_last + 1) :]}
        if keep_every:
            kept |= {p for step, p in whole.items() if step % keep_every == 0}
        for folder in whole.values():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)


def _together(model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names that they have in parts."""
    named = {f"model.{name}": tensor for name, tensor in model.items()}
    return named | {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}


class Saver:
    """Writes checkpoints behind the training's back: it waits for the copy, not for the disk.

    `saved` is told of each step whose checkpoint is on the disk, in the thread that wrote it.
    """

    def __init__(
        self,
        folder: RunFolder,
        keep_last: int,
        keep_every: int | None,
        saved: Callable[[int], None] = lambda step: None,
    ):
        self._folder, self._keep_last, self._keep_every, self._saved = folder, keep_last, keep_every, saved
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write, once the one before is written."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="saver")
        self._thread.start()

    def wait(self) -> None:
        """Until all is on the disk; raises what went wrong."""
        self.close()
        self.check()

    def close(self) -> None:
        """Until nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        """Raise what has gone wrong so far."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self._folder.save(snapshot, self._keep_last, self._keep_every)
            self._saved(snapshot.state["step"])
        except BaseException as error:
            self._error = error


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: "<parameter>/exp_avg" and so on."""
    return {
        f"{name}/{key}": cut_like(value, parameter) if value.ndim else value
        for (name, parameter), held in _held(model, optimizer)
        for key, value in optimizer.state.get(held, {}).items()
    }


def check_optimizer_tensors(model: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError where `tensors` are not what `optimizer_tensors` gives of such a model, or nothing."""
    trained = trained_parameters(model)
    seen = set()
    for full, tensor in tensors.items():
        name = full.rpartition("/")[0]
        if name not in trained or tensor.shape not in ((), trained[name].shape):
            raise CheckpointError(f"{source}: the optimiser's {full!r} {tuple(tensor.shape)} fits no trained parameter")
        seen.add(name)
    if tensors and len(seen) != len(trained):
        raise CheckpointError(f"{source}: the optimiser has state for {len(seen)} of {len(trained)} parameters")


def empty_optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, names: list[str]
) -> dict[str, Tensor]:
    """Make state of these names for the optimiser, to be filled: what `optimizer_tensors` then gives."""
    held = {name: part for (name, _), part in _held(model, optimizer)}
    for full in names:
        name, _, key = full.rpartition("/")
        shape = () if key == "step" else held[name].shape
        optimizer.state[held[name]][key] = torch.zeros(shape, device=held[name].device)
    made = optimizer_tensors(model, optimizer)
    return {name: made[name] for name in names}


def _held(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[tuple[str, Tensor], Tensor]]:
    """((name, parameter), what the optimiser holds of it: this rank's shard, or itself)."""
    return list(zip(trained_parameters(model).items(), optimizer.param_groups[0]["params"], strict=True))
