"""The two sides that `dino-sparo bench` measures: training as it is here, and as plain code.

Axis letters: B images, C crops, K prototypes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from dino_sparo.bench.plain import (
    PlainState,
    PlainViews,
    crop_groups,
    plain_batches,
    plain_forward,
    plain_loss,
    plain_step,
)
from dino_sparo.data.device_views import Photos, ahead
from dino_sparo.data.images import normalize
from dino_sparo.data.loader import BatchOrder, PhotoBatch, collate_crops, crop_batches, crops_of
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.views import NUM_GLOBAL_CROPS, CropRecipe, crop_recipes
from dino_sparo.models.cost import bytes_saved_for_backward
from dino_sparo.options import PretrainOptions
from dino_sparo.parallel.device import wait_for
from dino_sparo.parallel.precision import autocast, plain_attention
from dino_sparo.runs.rundir import config_of
from dino_sparo.training.pretrain import train_step
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.setup import build_schedules, dataset_of, executor_of
from dino_sparo.training.state import TrainState, build_state

VIEWED_IMAGES = 16  # whose views fill the batch of a step, repeated
EPOCHS = 1_000_000  # more than any benchmark sees
STEPS_PER_EPOCH = 100


@dataclass(frozen=True)
class Bench:
    """A recipe's training as it is measured here."""

    options: PretrainOptions
    source: ImageSource
    device: torch.device
    precision: str
    batch_size: int
    num_workers: int
    rounds: int
    seconds: float | None

    @property
    def crop_recipes(self) -> list[CropRecipe]:
        """One a crop."""
        return crop_recipes(**asdict(self.options.views))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(crops, side) of the global and the local crops."""
        views = self.options.views
        return [(NUM_GLOBAL_CROPS, views.global_size), (views.num_local_crops, views.local_size)]

    @property
    def prefetched(self) -> int:
        """Batches that workers make ahead."""
        return self.num_workers * self.options.machine.prefetch_batches

    @property
    def hyper(self) -> Hyperparameters:
        """Of the middle of the run, when nothing is frozen."""
        return build_schedules(self.options, STEPS_PER_EPOCH).at(
            STEPS_PER_EPOCH * self.options.optim.epochs // 2
        )

    @property
    def step_arguments(self) -> dict[str, Any]:
        """What both steps take by name."""
        mixed: AbstractContextManager[Any] = autocast(self.precision, self.device)
        return {"hyper": self.hyper, "clip_norm": self.options.optim.clip_norm, "autocast": mixed}

    def new_state(self, device: torch.device) -> TrainState:
        """A run that has not begun."""
        checkpointing = self.options.machine.activation_checkpointing
        return build_state(
            config_of(self.options),
            device,
            loss_scaling=self.precision == "fp16",
            activation_checkpointing=checkpointing,
            compiled=self.options.machine.compile,
        )


def our_step(bench: Bench, state: TrainState, groups: list[Tensor]) -> None:
    """One step of training on groups of normalised crops."""
    with plain_attention(bench.precision, bench.device):
        train_step(state, repeat(groups), 1, **bench.step_arguments)


def plain_step_of(bench: Bench, state: PlainState, groups: list[Tensor]) -> None:
    """The same step, plain."""
    plain_step(state, groups, **bench.step_arguments)


def our_batches(bench: Bench) -> Iterator[list[Tensor]]:
    """Groups of normalised crops on the device, as training makes them."""
    options = bench.options
    dataset = dataset_of(options, bench.source, executor_of(options, bench.device))
    loader = crop_batches(
        dataset,
        BatchOrder(
            num_samples=len(bench.source),
            global_batch_size=bench.batch_size,
            epochs=EPOCHS,
            seed=options.seed,
        ),
        num_workers=bench.num_workers,
        prefetch_batches=options.machine.prefetch_batches,
        pin_memory=bench.device.type == "cuda",
        timeout_seconds=options.machine.data_timeout_seconds,
    )
    with loader.failures_explained():
        made = ahead(loader, lambda one: crops_of(one, dataset.crop_recipes, bench.device), bench.device)
        for crops in made:
            yield [normalize(x) for x in (crops.global_crops, crops.local_crops) if x.numel()]


def batches_of_plain(bench: Bench) -> Iterator[list[Tensor]]:
    """The same by plain code, with as many workers."""
    return plain_batches(
        PlainViews(bench.source, bench.crop_recipes, bench.options.seed),
        batch_size=bench.batch_size,
        num_workers=bench.num_workers,
        prefetch_batches=bench.options.machine.prefetch_batches,
        device=bench.device,
    )


def batch_of_photos(bench: Bench) -> PhotoBatch:
    """The first images, decoded, and the numbers of their views, as workers hand them over."""
    dataset = dataset_of(bench.options, bench.source, "device")
    batch = collate_crops([dataset[0, number] for number in range(bench.batch_size)])
    assert isinstance(batch, PhotoBatch)
    if bench.device.type == "cpu":
        return batch
    return PhotoBatch(Photos(*(values.pin_memory() for values in batch.photos)))


def batch_of_crops(bench: Bench) -> list[Tensor]:
    """Groups (C_i, B, 3, side, side) of the first images' views on the device, repeated to a batch."""
    views = PlainViews(bench.source, bench.crop_recipes, bench.options.seed)
    images = [views[number] for number in range(min(len(views), bench.batch_size, VIEWED_IMAGES))]
    which = torch.arange(bench.batch_size) % len(images)
    return crop_groups([torch.stack(crops)[which].to(bench.device) for crops in zip(*images, strict=True)])


def with_peak_memory(
    bench: Bench,
    groups: list[Tensor],
    build: Callable[[torch.device], Any],
    step: Callable[[Bench, Any, list[Tensor]], None],
) -> tuple[Any, dict[str, int | None]]:
    """A state and the peak of GPU memory that it and its first steps take, with the crops."""
    device = bench.device
    if device.type == "cpu":
        return build(device), {"peak_bytes": None}
    before = torch.cuda.memory_allocated(device) - sum(group.nbytes for group in groups)
    state = build(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):  # the first one makes the optimiser's state
        step(bench, state, groups)
    wait_for(device)
    return state, {"peak_bytes": torch.cuda.max_memory_allocated(device) - before}


def saved_by_ours(bench: Bench, state: TrainState, groups: list[Tensor]) -> int:
    """Bytes that a step keeps for its backward pass."""

    def loss(crops: list[Tensor]) -> Tensor:
        with torch.no_grad(), autocast(bench.precision, bench.device):
            teacher_logits, _ = state.teacher(crops[:1])
        with autocast(bench.precision, bench.device):
            student_logits, _ = state.parallel_student(crops)
        return state.loss_fn(student_logits, teacher_logits, bench.hyper.teacher_temp)

    return bytes_saved_for_backward(loss, groups)


def saved_by_plain(bench: Bench, state: PlainState, groups: list[Tensor]) -> int:
    """Bytes that a plain step keeps for its backward pass."""

    def loss(crops: list[Tensor]) -> Tensor:
        with autocast(bench.precision, bench.device):
            with torch.no_grad():
                teacher_logits = plain_forward(state.teacher, crops[:1])
            student_logits = plain_forward(state.student, crops)
            return plain_loss(state, student_logits, teacher_logits, bench.hyper.teacher_temp)

    return bytes_saved_for_backward(loss, groups)
