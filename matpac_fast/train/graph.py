"""The whole optimiser step as CUDA graphs: recorded once, then launched as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Matpac, Schedule
from .step import Step, train_step

# The steps of a kind that run as they are before it is recorded: kernels compile and choose, Adam makes its moments.
_WARM = 2

Pieces = Sequence[tuple[Tensor, Tensor]]
_Kind = tuple[tuple[torch.Size, ...], bool, bool]  # shapes, with statistics or without, MCL's soft or hard minimum
# Runs a function so that it is recorded -> what replays it, and what it returned, which a replay fills anew.
Recorder = Callable[[Callable[[], Step]], tuple[Callable[[], None], Step]]


@dataclass
class _Inputs:
    """What a graph reads: tensors that stay where they are and are filled before each replay."""

    pieces: Pieces
    lr: Tensor  # float32, as the fused optimiser takes it
    schedule: Schedule

    @classmethod
    def like(cls, pieces: Pieces, schedule: Schedule) -> _Inputs:
        device = pieces[0][0].device

        def scalar(dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros((), dtype=dtype, device=device)

        # No heads and the hard minimum are other kernels: these stay numbers, and part of the kind of step.
        return cls(
            [(spec.clone(), ids_shuffle.clone()) for spec, ids_shuffle in pieces],
            scalar(torch.float32),
            Schedule(scalar(), scalar() if schedule.mcl_temp else schedule.mcl_temp, scalar(), scalar()),
        )

    def fill(self, pieces: Pieces, lr: float, schedule: Schedule) -> None:
        """Without a wait: numbers travel as arguments of the kernels that write them."""
        for mine, given in zip(self.pieces, pieces, strict=True):
            for static, fresh in zip(mine, given, strict=True):
                static.copy_(fresh)
        for static, value in zip((self.lr, *self.schedule), (lr, *schedule), strict=True):
            if isinstance(static, Tensor):
                assert isinstance(value, float)
                static.fill_(value)


class GraphedStep:
    """`train_step` on one GPU, launched as one: for small models and batches, whose kernels end before the host has
    started the next.

    Each kind of step (shapes, with statistics or without, MCL's soft or hard minimum) is recorded on its third
    occurrence. Everything that a step changes stays where it is in memory, so steps of all kinds, graphed or not, can
    follow each other. The graphs share their memory: what a call returns is overwritten by the next.

    Args:
        model, optimizer, clip_norm, precision: as for `train_step`.
        record: for tests; a CUDA graph by default.
        if_it_fits: record a kind only where the device has the memory for graphs beside that of the largest step so
            far, which need not be of a kind that is recorded.
        lengths: how many lengths of crop there are; with `if_it_fits` all of them run before anything is recorded.
    """

    def __init__(
        self,
        model: Matpac,
        optimizer: torch.optim.AdamW,
        clip_norm: float,
        precision: str,
        record: Recorder | None = None,
        if_it_fits: bool = False,
        lengths: int = 1,
    ):
        self._model, self._optimizer, self._clip_norm, self._precision = model, optimizer, clip_norm, precision
        for group in optimizer.param_groups:  # fused, it has all of its state on the device anyway
            group["capturable"] = True
        optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]  # the warm steps are
        self._record = record or CudaRecorder(next(model.parameters()).device)
        self._if_it_fits, self._lengths = if_it_fits, lengths
        self._largest = self._held = 0  # bytes: of the largest step, and of the graphs
        self._seen: dict[_Kind, int] = {}
        self._graphs: dict[_Kind, tuple[_Inputs, Callable[[], None], Step]] = {}

    def __call__(self, pieces: Pieces, step: int, lr: float, statistics: bool = False) -> Step:
        """As `train_step`; the result is valid until the next call."""
        if self._if_it_fits and not self._seen:  # what others have taken, and freed by now, is no part of a step
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(next(self._model.parameters()).device)
        schedule = self._model.schedule(step)
        kind = (tuple(spec.shape for spec, _ in pieces), statistics, bool(schedule.mcl_temp))
        if kind not in self._graphs:
            self._seen[kind] = self._seen.get(kind, 0) + 1
            if self._seen[kind] <= _WARM or not self._fits():
                return self._train(pieces, step, lr, statistics, schedule)
            inputs = _Inputs.like(pieces, schedule)
            inputs.fill(pieces, lr, schedule)
            replay, out = self._record(lambda: self._measured(inputs, step, statistics))
            self._graphs[kind] = inputs, replay, out
        inputs, replay, out = self._graphs[kind]
        inputs.fill(pieces, lr, schedule)
        replay()
        return out

    def _fits(self) -> bool:
        """Whether there is room for graphs, beside what others have of the device: together they take as much again as
        the largest step, and keep it."""
        if not self._if_it_fits:
            return True
        if len({shapes for shapes, *_ in self._seen}) < self._lengths:
            return False
        device = next(self._model.parameters()).device
        self._largest = max(self._largest, torch.cuda.max_memory_reserved(device) - self._held)
        room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return 2 * self._largest <= room

    def _measured(self, inputs: _Inputs, step: int, statistics: bool) -> Step:
        """The step that is recorded; counts what its graph takes beyond what the others have taken."""
        device = next(self._model.parameters()).device
        before = torch.cuda.memory_reserved(device) if self._if_it_fits else 0
        out = self._train(inputs.pieces, step, inputs.lr, statistics, inputs.schedule)
        if self._if_it_fits:
            self._held += torch.cuda.memory_reserved(device) - before
        return out

    def _train(self, pieces: Pieces, step: int, lr: float | Tensor, statistics: bool, schedule: Schedule) -> Step:
        return train_step(
            self._model,
            self._optimizer,
            pieces,
            step,
            lr,
            self._clip_norm,
            self._precision,
            statistics,
            schedule=schedule,
        )


class CudaRecorder:
    """Captures on a stream of its own; all graphs take their memory from one pool, since only one runs at a time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # torch's own is made once in a process, on whichever device comes first: kernels of another escape its graph.
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], Step]) -> tuple[Callable[[], None], Step]:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            # Only this thread's calls are watched: the feed goes on pinning and copying meanwhile.
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            out = run()
        return graph.replay, out
