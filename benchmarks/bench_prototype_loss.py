"""prototype_loss against the official chain on the CPU: from the same logits, and from features, the products included.

pytest benchmarks/bench_prototype_loss.py --benchmark-only --benchmark-quiet

The two turn by turn in one run, and the ratio is the median of the rounds' ratios, so that a machine that slows down
slows both. OMP_NUM_THREADS=1 before it is one thread.
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _timing import clock, peak_extra_mib
from torch import Tensor

from matpac_fast import ops

_C = pytest.importorskip("matpac_fast._C")

N, K, D, TEMPS = 2128, 2048, 256, (0.1, 0.04)  # batch 16: 133 masked tokens a crop
ROUNDS = 15
op_module: Any = importlib.import_module("matpac_fast.ops.prototype_loss")

Outputs = tuple[Tensor, ...]
Call = Callable[[], Outputs]


def unit(rows: int) -> Tensor:
    return F.normalize(torch.randn(rows, D, generator=torch.Generator().manual_seed(rows + D)), dim=1)


def official_chain(logits: Tensor, teacher_logits: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the centre's update, step by step as in the official code: the teacher's softmax is taken twice."""
    target = torch.softmax((teacher_logits - center) / TEMPS[1], dim=-1).detach()
    loss = torch.sum(-target * F.log_softmax(logits / TEMPS[0], dim=-1), dim=-1)
    return loss, torch.softmax((teacher_logits - center) / TEMPS[1], dim=-1).mean(0)


def from_logits() -> tuple[Call, Call]:
    """Loss, mean and the gradient of the mean loss by the student's logits."""
    student, teacher, center = unit(N) @ unit(K).T, unit(N).flip(0) @ unit(K).T, torch.zeros(K)
    scales = math.log2(math.e) / torch.tensor(TEMPS, dtype=torch.float64)

    def official() -> Outputs:
        leaf = student.detach().requires_grad_()
        loss, mean = official_chain(leaf, teacher, center)
        return loss.detach(), mean, *torch.autograd.grad(loss.mean(), leaf)

    def ours() -> Outputs:
        loss, stats, delta = torch.empty(N), torch.empty(N, 4), torch.empty(N, K)
        column_sum = torch.zeros(K, dtype=torch.float64)
        pointers = (t.data_ptr() for t in (student, teacher, center))
        tail = (loss.data_ptr(), stats.data_ptr(), delta.data_ptr(), 0, column_sum.data_ptr())
        args = _C.PrototypeLossArgs(*pointers, 0, N, K, scales.data_ptr(), *tail)
        _C.prototype_loss_forward_cpu(args, torch.get_num_threads())
        return loss, (column_sum / N).float(), delta.mul_(1 / (N * TEMPS[0]))

    return official, ours


def from_features(keep: bool) -> tuple[Call, Call]:
    """Loss, mean and the gradients of the mean loss by the student's features and prototypes."""
    sides = unit(N).requires_grad_(), unit(K).requires_grad_(), unit(N).flip(0), unit(K)
    center = torch.zeros(K)

    def official() -> Outputs:
        loss, mean = official_chain(sides[0] @ sides[1].T, sides[2] @ sides[3].T, center)
        return loss.detach(), mean, *torch.autograd.grad(loss.mean(), sides[:2])

    def ours() -> Outputs:
        kept = op_module._KEEP_BYTES
        op_module._KEEP_BYTES = kept if keep else 0
        loss, mean = ops.prototype_loss(*sides, center, *TEMPS)
        op_module._KEEP_BYTES = kept
        return loss.detach(), mean, *torch.autograd.grad(loss.mean(), sides[:2])

    return official, ours


CASES: dict[str, Callable[[], tuple[Call, Call]]] = {
    "from logits": from_logits,
    "from features": lambda: from_features(keep=True),
    "from features, recomputed": lambda: from_features(keep=False),
}


def seconds(call: Call) -> float:
    start = clock()
    call()
    return clock() - start


@pytest.mark.parametrize("name", CASES)
def test_against_the_official_chain(benchmark: Any, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    official, ours = CASES[name]()
    for got, want in zip(ours(), official(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    rounds = [(seconds(official), seconds(ours)) for _ in range(ROUNDS)]
    ratio = statistics.median(a / b for a, b in rounds)
    times = [1e3 * statistics.median(column) for column in zip(*rounds, strict=True)]
    peaks = [peak_extra_mib(call) for call in (official, ours)]
    benchmark.pedantic(ours, rounds=5)
    benchmark.extra_info.update(
        official_ms=times[0], ours_ms=times[1], ratio=ratio, official_mib=peaks[0], ours_mib=peaks[1]
    )
    memory = "" if None in peaks else f"; extra peak {peaks[0]:.1f} MiB -> {peaks[1]:.1f} MiB"
    with capsys.disabled():
        print(
            f"\n{N} x {K}, {name}, {torch.get_num_threads()} threads, {_C.cpu_isa()}: official {times[0]:.1f} ms, "
            f"ours {times[1]:.1f} ms, {ratio:.1f} times as fast{memory}"
        )


if __name__ == "__main__":
    raise SystemExit(__doc__)  # it is pytest that runs it
