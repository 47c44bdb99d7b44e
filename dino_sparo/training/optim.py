"""Parameter groups, AdamW, clipping, and the update of the teacher.

Source: official `utils.get_params_groups`, `clip_gradients`, and `main_dino.py`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: with weight decay, and without.

    Parameters named `*.bias` or with one dimension have no weight decay. All others have, including `query`,
    `cls_token`, `pos_embed`, the directions of the prototypes, and their norms if those are trained.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    without_decay = {name for name, p in trainable if name.endswith(".bias") or p.ndim == 1}
    return [
        {"params": [p for name, p in trainable if name not in without_decay]},
        {"params": [p for name, p in trainable if name in without_decay], "weight_decay": 0.0},
    ]


def build_optimizer(module: nn.Module) -> torch.optim.AdamW:
    """AdamW with betas 0.9 and 0.999; learning rate and weight decay are set at every step."""
    return torch.optim.AdamW(parameter_groups(module), lr=0.0, betas=(0.9, 0.999), fused=True)


def set_hyperparameters(optimizer: torch.optim.Optimizer, *, lr: float | Tensor, weight_decay: float) -> None:
    """Set the learning rate of all groups and the weight decay of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["capturable"] = isinstance(lr, Tensor)
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def step_if_finite(
    optimizer: torch.optim.Optimizer, finite: Tensor, *, lr: float | Tensor, weight_decay: float | Tensor
) -> None:
    """One optimizer step, skipped on the device if `finite` (a scalar tensor) is false.

    `lr` and `weight_decay` are numbers, or float64 scalar tensors on the device. Fused AdamW accepts a tensor
    as learning rate but not as weight decay, which is then applied before the step.
    """
    if isinstance(lr, Tensor):
        decaying = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        with torch.no_grad():
            torch._foreach_mul_(decaying, torch.where(finite, 1 - lr * weight_decay, 1.0).float())
        set_hyperparameters(optimizer, lr=lr.float(), weight_decay=0.0)
    else:
        assert isinstance(weight_decay, float)
        set_hyperparameters(optimizer, lr=lr, weight_decay=weight_decay)
    optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]  # fused AdamW skips the step if 1
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]


@torch.no_grad()
def clip_gradients_per_parameter(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the gradient of each parameter to norm `max_norm` (0: no clipping); returns the norms (P,) before.

    As in the official code, this is not the global norm of `torch.nn.utils.clip_grad_norm_`.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(0)
    norms = torch._foreach_norm(gradients)
    if not max_norm:
        return torch.stack(norms)
    factors = torch._foreach_add(norms, 1e-6)
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(factors, max_norm)
    torch._foreach_clamp_max_(factors, 1.0)
    torch._foreach_mul_(gradients, factors)
    return torch.stack(norms)


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
