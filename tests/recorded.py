"""A CUDA graph without a GPU: records every operator of a function, then runs them again on the same tensors.

As in a graph, Python runs once: numbers, branches and tensors made from numbers stay what they were, and a value that
the host reads cannot be recorded at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class NoWait(TorchDispatchMode):
    """Fails on every operator that makes the host wait for a device."""

    waits = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.waits, f"{func.name()} waits for the device"
        return func(*args, **(kwargs or {}))


class Tape(NoWait):
    """The operators that ran under it, and what the tensors that they changed had held before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(given.get(argument.name))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        # The results as they are now: callers go on to detach and resize what they were given.
        self.calls.append((func, args, kwargs, tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, out)))
        return out

    def _keep(self, changed: Any) -> None:
        for tensor in tensors(changed):
            storage = tensor.untyped_storage()
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def undo(self) -> None:
        """A graph that is recorded runs nothing: what it changed is as it was."""
        for storage, old in self.before.values():
            storage.copy_(old)

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, recorded in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tensors(recorded), tensors(again), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def record(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What `GraphedStep` has CUDA do."""
    with Tape() as tape:
        out = run()
    tape.undo()
    return tape.replay, out
