"""prototype_loss: cross-entropy between the teacher's and the student's distributions over prototypes."""

from __future__ import annotations

from torch import Tensor

from .. import reference


def prototype_loss(
    student: Tensor,
    student_weight: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    mean_of: str = "probabilities",
) -> tuple[Tensor, Tensor]:
    """Loss (N,) and the teacher's column mean (K,)."""
    return reference.prototype_loss(
        student, student_weight, teacher, teacher_weight, center, student_temp, teacher_temp, mean_of
    )
