"""The teacher: an exponential moving average of the student. Source: official `main_dino.py`."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float | Tensor, finite: Tensor) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in place, for trainable parameters.

    Frozen parameters are equal in both. If `finite` (a scalar tensor on the device) is false, the teacher
    does not change. `momentum` is a number, or a float64 scalar tensor on the device.
    """
    both = zip(teacher.parameters(), student.parameters(), strict=True)
    pairs = [(of_teacher, of_student) for of_teacher, of_student in both if of_student.requires_grad]
    averaged: list[Tensor] = [of_teacher for of_teacher, _ in pairs]
    current: list[Tensor] = [of_student for _, of_student in pairs]
    torch._foreach_mul_(averaged, torch.where(finite, momentum, 1.0).float())
    torch._foreach_add_(averaged, torch._foreach_mul(current, torch.where(finite, 1 - momentum, 0.0).float()))
