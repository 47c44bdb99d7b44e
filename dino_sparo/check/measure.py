"""What a run will cost on this machine, measured: loader, step, parameters, FLOPs and checkpoint."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from multiprocessing import active_children
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dino_sparo.data.device_views import ahead, repeated
from dino_sparo.data.images import normalize
from dino_sparo.data.loader import Crops, PhotoBatch, crops_of
from dino_sparo.data.views import CropRecipe
from dino_sparo.data.workers import WatchedLoader
from dino_sparo.models.cost import bytes_saved_for_backward, counting_flops
from dino_sparo.models.encoder import DinoModel
from dino_sparo.parallel.device import wait_for
from dino_sparo.parallel.precision import DTYPES, autocast, plain_attention
from dino_sparo.training.pretrain import train_step
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.state import TrainState

MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}  # of the product that measures the peak


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
            batch = next(iterator)
        images, started = 0, time.monotonic()
        while (elapsed := time.monotonic() - started) < seconds or not images:
            batch = next(iterator)
            images += num_images(batch)
        own = [private_bytes(child.pid) for child in active_children()] if workers else []
    assert batch is not None
    return Loading(images / elapsed, workers, max(own, default=0), batch)


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
        with plain_attention(precision, device):
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
        with counting_flops() as counter, torch.set_grad_enabled(backward):
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


def bytes_of_training(
    state: TrainState, sizes: list[tuple[int, int]], batch_size: int, *, mixed: bool
) -> int:
    """What one process needs for its networks in a step, estimated from one and two images on the CPU.

    Weights of student and teacher, gradients, AdamW's moments, and what is kept for the backward pass, of
    which mixed precision halves all but what the loss keeps, the logits.

    Args:
        sizes: (crops, side) of the global and of the local crops.
        batch_size: images at once.
    """
    prototypes = state.loss_fn.center.shape[1]
    teacher_logits = torch.zeros(sizes[0][0], prototypes)
    student_logits = torch.zeros(sum(crops for crops, _ in sizes), prototypes)
    in_loss = bytes_saved_for_backward(
        lambda logits: state.loss_fn(logits, teacher_logits, 1.0), student_logits.requires_grad_()
    )
    of_one, of_two = (
        bytes_saved_for_backward(
            lambda images: state.student(images)[0],
            [torch.zeros(crops, images, 3, side, side) for crops, side in sizes if crops],
        )
        for images in (1, 2)
    )
    in_networks = 2 * of_one - of_two + batch_size * (of_two - of_one)  # some is kept once for all images
    student = sum(parameter.nbytes for parameter in state.student.parameters())
    # Weights, gradients, two moments, and the teacher's weights; then what is kept.
    return 5 * student + in_networks // (2 if mixed else 1) + batch_size * in_loss


def measured_peak(device: torch.device, precision: str, rounds: int = 5) -> float:
    """FLOP/s of one large square product in this precision, the median of some rounds after two."""
    side = MATRIX_SIDE[device.type]
    dtype = DTYPES.get(precision, torch.float32)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(rounds + 2):
        wait_for(device)
        started = time.perf_counter()
        left @ right
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / median(seconds[2:])


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def private_bytes(pid: int | None) -> int:
    """Memory of a process that no other has; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Private_", "Swap:")))


def _enlarged(batch: Crops | PhotoBatch, batch_size: int) -> Crops | PhotoBatch:
    """The same images over and over, so many."""
    if isinstance(batch, PhotoBatch):
        return PhotoBatch(repeated(batch.photos, batch_size))
    chosen = torch.arange(batch_size) % num_images(batch)
    return Crops(batch.global_crops[:, chosen], batch.local_crops[:, chosen])


def memory_free() -> int:
    """Bytes of memory that processes can still take, this one's own counted as free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):  # also what the file cache would give back
            free = 1024 * int(line.split()[1])
    return free + private_bytes(os.getpid())
