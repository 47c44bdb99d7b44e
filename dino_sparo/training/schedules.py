"""Schedules, by step and as arrays. Source: official `cosine_scheduler`, `DINOLoss`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def cosine_schedule(
    base: float, final: float, total_steps: int, warmup_steps: int = 0, warmup_start: float = 0.0
) -> NDArray[np.float64]:
    """Linear warm-up from `warmup_start` to `base` over `warmup_steps`, then a half cosine to `final`.

    Returns an array (total_steps,). The last value of the warm-up and the first of the cosine are `base`.

    Raises:
        ValueError: `warmup_steps` is not between 0 and `total_steps`.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}, expected 0 to total_steps = {total_steps}")
    schedule = Cosine(base, final, total_steps, warmup_steps, warmup_start)
    return np.array([schedule.at(step) for step in range(total_steps)], np.float64)


def teacher_temp_schedule(start: float, final: float, warmup_epochs: int, epochs: int) -> NDArray[np.float64]:
    """Linear from `start` to `final` over `warmup_epochs`, then constant: an array (epochs,).

    Raises:
        ValueError: `warmup_epochs` is not between 0 and `epochs`.
    """
    if not 0 <= warmup_epochs <= epochs:
        raise ValueError(f"warmup_epochs is {warmup_epochs}, expected 0 to epochs = {epochs}")
    schedule = Linear(start, final, warmup_epochs)
    return np.array([schedule.at(epoch) for epoch in range(epochs)], np.float64)


@dataclass(frozen=True)
class Linear:
    """The values of `np.linspace(start, final, count)`, bit for bit, then `final`."""

    start: float
    final: float
    count: int

    def at(self, number: int) -> float:
        """The value with index `number`."""
        if number == 0 < self.count:
            return self.start
        if number >= self.count - 1:
            return self.final
        change, last = self.final - self.start, self.count - 1
        step = change / last
        return (number * step if step else number / last * change) + self.start


@dataclass(frozen=True)
class Cosine:
    """The schedule of `cosine_schedule` with the same arguments."""

    base: float
    final: float
    total_steps: int
    warmup_steps: int = 0
    warmup_start: float = 0.0

    def at(self, step: int) -> float:
        """The value for a step, counted from 0."""
        if step < self.warmup_steps:
            return Linear(self.warmup_start, self.base, self.warmup_steps).at(step)
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return float(self.final + 0.5 * (self.base - self.final) * (1 + np.cos(np.pi * progress)))


@dataclass(frozen=True)
class Hyperparameters:
    """The values of all schedules for one step; on a GPU `Steps` makes them float64 scalar tensors."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    freeze_last_layer: bool
    freeze_backbone: bool = False


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """All schedules of a run: by step, teacher temperature and frozen parts by epoch."""

    lr: Cosine
    weight_decay: Cosine
    momentum: Cosine
    teacher_temp: Linear
    freeze_last_layer_epochs: int
    freeze_backbone_epochs: int
    steps_per_epoch: int

    def at(self, step: int) -> Hyperparameters:
        """The hyperparameters of a step, counted from 0."""
        epoch = step // self.steps_per_epoch
        return Hyperparameters(
            lr=self.lr.at(step),
            weight_decay=self.weight_decay.at(step),
            momentum=self.momentum.at(step),
            teacher_temp=self.teacher_temp.at(epoch),
            freeze_last_layer=epoch < self.freeze_last_layer_epochs,
            freeze_backbone=epoch < self.freeze_backbone_epochs,
        )
