"""The teacher: an exponential moving average of the student. Source: official `main_dino.py`."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float, finite: Tensor) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, all parameters, in place.

    If the step was not `finite` (a scalar on the device) the teacher stays; the host need not know.
    """
    averaged: list[Tensor] = list(teacher.parameters())
    current: list[Tensor] = list(student.parameters())
    torch._foreach_mul_(averaged, torch.where(finite, momentum, 1.0))
    torch._foreach_add_(averaged, torch._foreach_mul(current, torch.where(finite, 1 - momentum, 0.0)))
