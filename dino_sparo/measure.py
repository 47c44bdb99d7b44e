"""What a run will cost on this machine, measured: loader, step, parameters, FLOPs and checkpoint."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dino_sparo.data.device_views import ahead, repeated
from dino_sparo.data.images import UnreadableImage, normalize
from dino_sparo.data.loader import Crops, PhotoBatch, crops_of
from dino_sparo.data.views import CropRecipe
from dino_sparo.data.workers import WatchedLoader
from dino_sparo.device import wait_for
from dino_sparo.models.encoder import DinoModel
from dino_sparo.training.precision import autocast
from dino_sparo.training.pretrain import train_step
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.state import TrainState


@dataclass(frozen=True)
class Loading:
    """How fast all workers of this machine together load images, and make views if that is theirs to do."""

    images_per_second: float
    workers: int
    worker_bytes: int
    """Memory of the largest worker that no other process has; 0 without workers."""
    batch: Crops | PhotoBatch
    """The last one."""


@dataclass(frozen=True)
class Stepping:
    """Whole training steps of one process on one device."""

    images_per_second: float
    batch_size: int
    loss: float
    memory_gib: float | None = None
    """Peak on a GPU; None on the CPU."""
    gpu_memory_gib: float | None = None
    """All that the GPU has."""


def measure_loading(batches: WatchedLoader, *, seconds: float) -> Loading:
    """Take batches for so many seconds, after each worker has made the two that start-up delays.

    Raises:
        UserError: an image cannot be read, or a worker fails.
    """
    workers = batches.num_workers
    with batches.failures_explained():
        batch, iterator = None, iter(batches)
        for _ in range(2 * max(1, workers)):
            batch = _readable(next(iterator))
        images, started = 0, time.monotonic()
        while (elapsed := time.monotonic() - started) < seconds or not images:
            batch = _readable(next(iterator))
            images += num_images(batch)
        worker_bytes = max((private_bytes(child.pid) for child in active_children()), default=0)
    assert batch is not None
    return Loading(images / elapsed, workers, worker_bytes, batch)


def num_images(batch: Crops | PhotoBatch) -> int:
    """Images in a batch."""
    return len(batch.photos.places) if isinstance(batch, PhotoBatch) else batch.global_crops.shape[1]


def measure_steps(
    state: TrainState,
    batch: Crops | PhotoBatch,
    recipes: Sequence[CropRecipe],
    batch_size: int,
    hyper: Hyperparameters,
    *,
    steps: int,
    clip_norm: float,
    precision: str,
    device: torch.device,
) -> Stepping:
    """Time whole steps on `batch_size` images, repeated from the batch, after two that warm up.

    Views that the device makes are made anew for each step.

    Raises:
        torch.OutOfMemoryError: the batch does not fit.
    """
    same = _enlarged(batch, batch_size)
    if isinstance(same, Crops):
        same = crops_of(same, recipes, device)
    crops = ahead(repeat(same), lambda one: crops_of(one, recipes, device), device)
    batches = ([normalize(x) for x in (c.global_crops, c.local_crops) if x.numel()] for c in crops)
    mixed = autocast(precision, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for number in range(steps + 2):
        if number == 2:
            wait_for(device)
            started = time.monotonic()
        output = train_step(state, batches, 1, hyper, clip_norm=clip_norm, autocast=mixed)
    wait_for(device)
    elapsed = time.monotonic() - started
    measured = Stepping(steps * batch_size / elapsed, batch_size, output.loss.item())
    if device.type == "cpu":
        return measured
    total = torch.cuda.get_device_properties(device).total_memory
    peak = torch.cuda.max_memory_allocated(device)
    return replace(measured, memory_gib=peak / 2**30, gpu_memory_gib=total / 2**30)


def count_flops(student: DinoModel, sizes: list[tuple[int, int]]) -> dict[str, float]:
    """Floating point operations an image (a multiply-add is two), on the CPU.

    sizes: (crops, side) of the global and of the local crops. `encoder` is one pass on a global crop,
    `training` what a step takes an image: student forward and backward on all, teacher forward on the
    global crops.
    """
    groups = [torch.zeros(crops, 1, 3, side, side) for crops, side in sizes if crops]

    def flops(*, forward: Any, backward: bool) -> float:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
            output = forward()
            if backward:
                output.sum().backward()
        return float(counter.get_total_flops())

    counted = {
        "encoder": flops(forward=lambda: student.encoder(groups[0][0]), backward=False),
        "training": flops(forward=lambda: student(groups)[0], backward=True)
        + flops(forward=lambda: student(groups[:1])[0], backward=False),
    }
    student.zero_grad(set_to_none=True)
    return counted


def private_bytes(pid: int | None) -> int:
    """Memory of a process that no other has; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Private_", "Swap:")))


def _readable(batch: Crops | PhotoBatch | UnreadableImage) -> Crops | PhotoBatch:
    if isinstance(batch, UnreadableImage):
        batch.raise_error()
    return batch


def _enlarged(batch: Crops | PhotoBatch, batch_size: int) -> Crops | PhotoBatch:
    """The same images over and over, so many."""
    if isinstance(batch, PhotoBatch):
        return PhotoBatch(repeated(batch.photos, batch_size))
    chosen = torch.arange(batch_size) % num_images(batch)
    return Crops(batch.global_crops[:, chosen], batch.local_crops[:, chosen])
