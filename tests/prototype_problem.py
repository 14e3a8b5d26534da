"""A problem for prototype_loss, and how near to its solution is near enough; for the tests on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPS = (0.1, 0.04)
SHAPES = [  # (N, K, d): the model's ratio, multiples of nothing, one of each, more rows than one chunk
    (133, 2048, 64),
    (37, 19, 5),
    (17, 31, 3),
    (1, 100, 7),
    (3, 1, 4),
    (201, 257, 16),
]


class Problem:
    """Unit features and prototypes, a centre and an upstream gradient; `scale` multiplies both sides' logits."""

    def __init__(self, n: int, k: int, d: int, dtype: torch.dtype = torch.float32, scale: float = 1.0):
        generator = torch.Generator().manual_seed(n * k + d)

        def unit(rows: int) -> Tensor:
            return F.normalize(torch.randn(rows, d, generator=generator, dtype=torch.float64), dim=1)

        self.student, self.teacher = (unit(n) * scale).to(dtype), (unit(n) * scale).to(dtype)
        self.student_weight, self.teacher_weight = unit(k).to(dtype), unit(k).to(dtype)
        work = torch.promote_types(dtype, torch.float32)
        self.center = 0.1 * torch.randn(k, generator=generator, dtype=torch.float64).to(work)
        self.upstream = torch.randn(n, generator=generator, dtype=torch.float64)

    @property
    def sides(self) -> tuple[Tensor, ...]:
        return self.student, self.student_weight, self.teacher, self.teacher_weight, self.center

    def run(
        self,
        loss_of: Callable[..., tuple[Tensor, Tensor]],
        mean_of: str = "probabilities",
        dtype: torch.dtype | None = None,
        temps: tuple[Any, Any] = TEMPS,
    ) -> dict[str, Tensor]:
        """Loss, mean and both gradients, computed in `dtype` if given."""
        student, student_weight, *rest = (t.detach().to(dtype or t.dtype) for t in self.sides)
        student.requires_grad_(), student_weight.requires_grad_()
        loss, mean = loss_of(student, student_weight, *rest, *temps, mean_of)
        grads = torch.autograd.grad(loss, (student, student_weight), self.upstream.to(loss.dtype))
        return {"loss": loss.detach(), "mean": mean, "student": grads[0], "student_weight": grads[1]}


# In float64 the reference is the oracle; a logit's rounding counts 1 / 0.04 times in the exponent.
ROUNDINGS = {torch.float64: 64}


def assert_close(
    out: dict[str, Tensor],
    exact: dict[str, Tensor],
    plain: dict[str, Tensor],
    roundings: dict[torch.dtype, int] = ROUNDINGS,
) -> None:
    """No more than twice the error of the reference in the same dtype, and a few roundings of the largest value."""
    for name, value in out.items():
        dtype = plain[name].dtype
        assert value.dtype == dtype, name
        error = (value.double() - exact[name]).abs().max()
        own = (plain[name].double() - exact[name]).abs().max()
        few = roundings.get(dtype, 4) * torch.finfo(dtype).eps * exact[name].abs().max()
        assert error <= 2 * own + few, f"{name}: {error:.3g}, the reference {own:.3g}"
