"""Estimates for a run on kinds of GPUs without having them: speed, hours, memory, and cores to decode."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import torch

from dino_sparo.check.counting import (
    BANDWIDTH_SHARE,
    GPUS,
    OPERATOR_SECONDS,
    PEAK_SHARE,
    Operators,
    count_step,
    count_views,
    seconds_on,
)
from dino_sparo.data.loader import Executor, choose_executor
from dino_sparo.data.views import crop_kinds, crop_sizes
from dino_sparo.recipe.sections import Recipe, less_memory, split_batch
from dino_sparo.terminal import aligned_table
from dino_sparo.training.setup import unfrozen_step
from dino_sparo.training.state import TrainState

# CPU time for an image of 500 x 375 pixels: read, decode, draw the random numbers of its views; `pil`: also
# make the views. Measured: 1.7 and 15.5 ms.
ASSUMED_DECODE_MS: dict[Executor, float] = {"device": 2.0, "pil": 16.0}
HOST_MS = 0.025  # per operator launch; measured on one core: 49 ms for the 2,055 of a step and its views


@dataclass(frozen=True, kw_only=True)
class GpuRun:
    """A run on GPUs of one kind.

    Attributes:
        gpu: kind of GPU, or the name of the measured one.
        measured: whether the values were measured on this machine's GPU; else they are estimated.
        batch_size: images per micro-batch.
        step_ms: GPU time of one step with its views.
        host_ms: host time to launch the operators of a step; None if measured. The longer of the two times
            limits the speed.
        images_per_second: of one GPU.
        hours: of the remaining steps, if loading keeps up.
        memory_bytes: of one GPU: peak of a step plus that of the views made concurrently; if measured, the
            peak of all tensors.
        decode_ms: time of one core per image.
        decode_measured: whether `decode_ms` was measured on this machine; else it is assumed.
        cores: CPU cores that decode for all GPUs.
    """

    gpu: str
    measured: bool
    precision: str
    batch_size: int
    step_ms: float
    host_ms: float | None
    images_per_second: float
    hours: float
    memory_bytes: int
    decode_ms: float
    decode_measured: bool
    cores: float


def executor_on_gpu(recipe: Recipe) -> Executor:
    """The executor of the views of a run on GPUs."""
    return choose_executor(recipe.machine.views, torch.device("cuda"), max_side=recipe.data.max_side)


def estimate(
    recipe: Recipe,
    state: TrainState,
    kinds: Sequence[str],
    *,
    num_processes: int,
    num_images: int,
    decode_ms: float | None = None,
) -> list[GpuRun]:
    """Estimates of the run on each kind of GPU, with one GPU per process.

    Args:
        state: of the recipe, on the CPU; it is not changed.
        kinds: keys of `GPUS`.
        num_images: images of all remaining steps.
        decode_ms: measured time of one core per image. None: an assumed value.
    """
    machine, optim = recipe.machine, recipe.optim
    batch_size, accumulation = split_batch(optim.global_batch_size, machine.batch_size_per_gpu, num_processes)
    kinds_of_crops = crop_kinds(**asdict(recipe.views))
    sizes = crop_sizes(kinds_of_crops)
    executor = executor_on_gpu(recipe)
    max_side = recipe.data.max_side if executor == "device" else None
    making = count_views(kinds_of_crops, batch_size, max_side)
    per_image = ASSUMED_DECODE_MS[executor] if decode_ms is None else decode_ms

    @cache
    def counted(micro_batches: int, precision: str) -> Operators:
        return count_step(
            *(state, sizes, batch_size, micro_batches, unfrozen_step(optim, recipe.loss)),
            clip_norm=optim.clip_norm,
            precision=precision,
        )

    def on(kind: str) -> GpuRun:
        gpu = GPUS[kind]
        precision = gpu.half_precision if machine.precision == "auto" else machine.precision
        few, more = counted(1, precision), max(0, accumulation - 1)
        step = seconds_on(gpu, few.found, tf32=machine.tf32)
        operators, peak = len(few.found), few.peak_bytes
        if more:  # further micro-batches, whose costs are all equal
            two = counted(2, precision)
            step += more * (seconds_on(gpu, two.found, tf32=machine.tf32) - step)
            operators += more * (len(two.found) - operators)
            peak = two.peak_bytes
        step += accumulation * seconds_on(gpu, making.found, tf32=True)
        if machine.capture:  # a CUDA graph is one launch, and keeps its own crops
            operators = 1
            peak += accumulation * sum(12 * count * batch_size * side**2 for count, side in sizes)
        launches = HOST_MS / 1000 * (operators + accumulation * len(making.found))
        speed = batch_size * accumulation / max(step, launches)
        return GpuRun(
            gpu=kind,
            measured=False,
            precision=precision,
            batch_size=batch_size,
            step_ms=1000 * step,
            host_ms=1000 * launches,
            images_per_second=speed,
            hours=num_images / (speed * num_processes) / 3600,
            memory_bytes=peak + making.peak_bytes,
            decode_ms=per_image,
            decode_measured=decode_ms is not None,
            cores=speed * num_processes * per_image / 1000,
        )

    return [on(kind) for kind in kinds]


def memory_problems(
    runs: Sequence[GpuRun], recipe: Recipe, num_processes: int, real: Mapping[str, int]
) -> list[str]:
    """A message for each estimated GPU whose memory is too small. `real`: bytes by kind, where known."""
    memory = {kind: int(gpu.memory_gb * 2**30) for kind, gpu in GPUS.items()} | dict(real)
    share = recipe.optim.global_batch_size // num_processes
    return [
        f"{run.gpu}: {run.batch_size} images per GPU need about {run.memory_bytes / 2**30:.0f} GiB of GPU "
        f"memory (estimate), but it has {memory[run.gpu] / 2**30:.0f}; use "
        f"{less_memory(share, run.batch_size, recipe.machine.activation_checkpointing)}"
        for run in runs
        if not run.measured and run.memory_bytes > memory[run.gpu]
    ]


def describe_runs(name: str, runs: Sequence[GpuRun], num_processes: int) -> str:
    """A table with a column for each run."""
    of_gpus = f"{num_processes} GPU{'s' * (num_processes > 1)}"
    cells = {
        f"images/s, {of_gpus}": [f"{num_processes * run.images_per_second:,.0f}" for run in runs],
        "hours": [f"{run.hours:,.1f}" for run in runs],
        "memory per GPU, GiB": [f"{run.memory_bytes / 2**30:.1f}" for run in runs],
        "cores to decode": [f"{run.cores:,.1f}" for run in runs],
        "images per GPU": [f"{run.batch_size}, {run.precision}" for run in runs],
        "step, ms": [f"{run.step_ms:,.1f}" for run in runs],
        "kernel launches, ms": ["" if run.host_ms is None else f"{run.host_ms:,.0f}" for run in runs],
    }
    header = [name, *(f"{run.gpu}, {'measured' if run.measured else 'estimated'}" for run in runs)]
    return aligned_table(header, [[row, *columns] for row, columns in cells.items()])


def describe_assumptions(run: GpuRun) -> str:
    """The assumptions of an estimate as text."""
    return (
        f"Estimated by counting the operators of one step: bytes at {100 * BANDWIDTH_SHARE:.0f} % of the "
        f"published bandwidth, FLOPs at {100 * PEAK_SHARE:.0f} % of the published dense peak, at least "
        f"{1e6 * OPERATOR_SECONDS:g} µs per operator. Decoding: {run.decode_ms:.1f} ms per image on one core "
        f"({'measured here' if run.decode_measured else 'assumed'}). Kernel launches: {1000 * HOST_MS:g} µs "
        f"of host time per operator (assumed); they limit the speed if they take longer than the step. "
        f"Memory: that of a step and of the views made at the same time; torch's allocator needs about a "
        f"tenth more, CUDA about 0.5 GiB. Not included: communication between GPUs, k-NN, and waiting for "
        f"images."
    )
