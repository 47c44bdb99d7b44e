"""Measurements of a run on this machine: loader, step, FLOPs, and memory."""

import time
from collections.abc import Callable, Sequence
from itertools import repeat
from multiprocessing import active_children
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dino_sparo.data.device_views import repeated
from dino_sparo.data.loader import Batch, Crops, PhotoBatch, crops_of, crops_on_device, normalized
from dino_sparo.data.views import CropKind
from dino_sparo.data.workers import WatchedLoader
from dino_sparo.models.cost import counting_flops
from dino_sparo.models.encoder import DinoModel
from dino_sparo.parallel.device import wait_for
from dino_sparo.parallel.precision import DTYPES
from dino_sparo.parallel.processes import private_bytes
from dino_sparo.training.pretrain import step_of
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.state import TrainState
from dino_sparo.training.steps import Steps

MATRIX_SIDE = {"cuda": 8192, "cpu": 2048}  # of the matrix product that measures the peak


def measure_loading(batches: WatchedLoader, *, seconds: float) -> tuple[dict[str, Any], Batch]:
    """Load batches for `seconds`, after two warm-up batches per worker.

    Returns:
        A dictionary with images_per_second of all workers, their number (workers), and the largest private
        memory of a worker (worker_bytes); and the last batch.

    Raises:
        UserError: an image cannot be read, or a worker fails.
    """
    workers = batches.num_workers
    with batches.failures_explained():
        iterator = iter(batches)
        for _ in range(2 * max(1, workers)):
            batch = next(iterator)
        images, started = 0, time.monotonic()
        while (elapsed := time.monotonic() - started) < seconds or not images:
            batch = next(iterator)
            images += num_images(batch)
        own = [private_bytes(child.pid) for child in active_children()] if workers else [0]
    return {"images_per_second": images / elapsed, "workers": workers, "worker_bytes": max(own)}, batch


def num_images(batch: Batch) -> int:
    """Images in a batch."""
    return len(batch.photos.places) if isinstance(batch, PhotoBatch) else batch.global_crops.shape[1]


def measure_steps(
    state: TrainState,
    batch: Batch,
    kinds: Sequence[CropKind],
    batch_size: int,
    hyper: Hyperparameters,
    *,
    steps: int,
    clip_norm: float,
    precision: str,
    device: torch.device,
) -> dict[str, Any]:
    """Time training steps after two warm-up steps.

    The images of `batch` are repeated or cut to `batch_size`. Views that the device makes are made in each
    step.

    Returns:
        images_per_second of this process, batch_size, loss, and for a GPU its peak and total memory
        (memory_gib, gpu_memory_gib; None on a CPU).

    Raises:
        torch.OutOfMemoryError: the batch does not fit.
    """
    if isinstance(batch, PhotoBatch):
        batch = PhotoBatch(repeated(batch.photos, batch_size))
    else:
        chosen = torch.arange(batch_size) % num_images(batch)
        batch = Crops(batch.global_crops[:, chosen], batch.local_crops[:, chosen])
        batch = crops_of(batch, kinds, device)
    batches = map(normalized, crops_on_device(repeat(batch), kinds, device))
    taking = Steps(step_of(state, clip_norm=clip_norm, precision=precision), device, 1, capture=False)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    for number in range(steps + 2):
        if number == 2:
            wait_for(device)
            started = time.monotonic()
        output = taking.take(batches, hyper, logged=False)
    wait_for(device)
    return {
        "images_per_second": steps * batch_size / (time.monotonic() - started),
        "batch_size": batch_size,
        "loss": output.loss.item(),
        "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        "gpu_memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else None,
    }


def count_flops(student: DinoModel, sizes: list[tuple[int, int]]) -> float:
    """FLOPs per image of a step (a multiply-add is two): student forward and backward on all crops, teacher
    forward on the global crops.

    Args:
        student: on the CPU.
        sizes: (crops, side) of the global and of the local crops.
    """
    groups = [torch.zeros(crops, 1, 3, side, side) for crops, side in sizes if crops]

    def flops(forward: Callable[[], Tensor], *, backward: bool = False) -> float:
        with counting_flops() as counter, torch.set_grad_enabled(backward):
            output = forward()
            if backward:
                output.sum().backward()
        return float(counter.get_total_flops())

    of_student = flops(lambda: student(groups)[0], backward=True)
    student.zero_grad(set_to_none=True)
    of_teacher = flops(lambda: student(groups[:1])[0])
    return of_student + of_teacher


def measured_peak(device: torch.device, precision: str, rounds: int = 5) -> float:
    """FLOP/s of a large square matrix product, the median of `rounds` after two warm-up rounds."""
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
