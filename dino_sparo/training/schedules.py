"""Schedules as arrays, one number a step or an epoch. Source: official `cosine_scheduler`, `DINOLoss`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def cosine_schedule(
    base: float, final: float, total_steps: int, warmup_steps: int = 0, warmup_start: float = 0.0
) -> NDArray[np.float64]:
    """Linear from `warmup_start` to `base` over `warmup_steps`, then a half cosine to `final`.

    Returns an array (total_steps,). The warm-up's last value is `base`, as is the cosine's first.

    Raises:
        ValueError: if the warm-up is longer than the whole.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}, expected 0 to total_steps = {total_steps}")
    warmup = np.linspace(warmup_start, base, warmup_steps)
    progress = np.arange(total_steps - warmup_steps) / max(1, total_steps - warmup_steps)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * progress))
    return np.concatenate((warmup, cosine))


def teacher_temp_schedule(start: float, final: float, warmup_epochs: int, epochs: int) -> NDArray[np.float64]:
    """Linear from `start` to `final` over whole epochs, then constant: (epochs,).

    Raises:
        ValueError: if the warm-up is longer than the whole.
    """
    if not 0 <= warmup_epochs <= epochs:
        raise ValueError(f"warmup_epochs is {warmup_epochs}, expected 0 to epochs = {epochs}")
    return np.concatenate((np.linspace(start, final, warmup_epochs), np.full(epochs - warmup_epochs, final)))


@dataclass(frozen=True)
class Hyperparameters:
    """What the schedules say for one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    freeze_last_layer: bool


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """Every schedule of a run: by step, the teacher temperature by epoch."""

    lr: NDArray[np.float64]
    weight_decay: NDArray[np.float64]
    momentum: NDArray[np.float64]
    teacher_temp: NDArray[np.float64]
    freeze_last_layer_epochs: int
    steps_per_epoch: int

    def at(self, step: int) -> Hyperparameters:
        """For step number `step`, counted from 0."""
        epoch = step // self.steps_per_epoch
        return Hyperparameters(
            lr=float(self.lr[step]),
            weight_decay=float(self.weight_decay[step]),
            momentum=float(self.momentum[step]),
            teacher_temp=float(self.teacher_temp[epoch]),
            freeze_last_layer=epoch < self.freeze_last_layer_epochs,
        )
