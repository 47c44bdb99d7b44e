"""The teacher: an exponential moving average of the student. Source: official `main_dino.py`."""

import torch
from torch import nn


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, all parameters, in place."""
    averaged: list[torch.Tensor] = list(teacher.parameters())
    current: list[torch.Tensor] = list(student.parameters())
    torch._foreach_mul_(averaged, momentum)
    torch._foreach_add_(averaged, current, alpha=1 - momentum)
