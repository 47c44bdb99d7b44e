"""The stages of training, each alone: what `bench` measures, and with which clock.

Axis letters: B images, C crops.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from dino_sparo.bench.clocks import Laps
from dino_sparo.data import pil_views
from dino_sparo.data.decode import decode
from dino_sparo.data.images import to_tensor
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.views import CropRecipe, draw_view
from dino_sparo.data.workers import keep_memory
from dino_sparo.parallel.device import wait_for
from dino_sparo.training.optim import clip_gradients_per_parameter, set_hyperparameters, step_if_finite
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.state import TrainState
from dino_sparo.training.teacher import update_teacher

# Dense bfloat16 products in FLOP/s (float16 on a V100), *published* by the maker; the first name that fits.
PUBLISHED_PEAKS = (
    *(("B200", 2250e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H200", 989e12), ("H100", 989e12)),
    *(("A100", 312e12), ("L40S", 362e12), ("V100", 125e12)),
)
# What the host waits for a GPU in, and what reads a number from any device.
HOST_WAITS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    "aten::_local_scalar_dense",
)
STEP = "training step"


@contextmanager
def one_core() -> Iterator[None]:
    """Tensor work on the CPU takes one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def image_stages(
    source: ImageSource, crop_recipes: list[CropRecipe], seed: int, num_images: int
) -> dict[str, list[float]]:
    """Seconds an image on one core: read, decode, and all its views by PIL, in turn.

    The first image warms up. The files have been written or read before: reading is from the system's cache.
    """
    laps = Laps(torch.device("cpu"))
    times: dict[str, list[float]] = {}
    with one_core():
        keep_memory()  # as a worker does
        for number in range(num_images + 1):
            sample = number % len(source)
            laps.start()
            data = source.read(sample)
            laps.lap("read")
            image = decode(data) if data else source.load(sample)
            laps.lap("decode")
            numbers = {"seed": seed, "epoch": 0, "sample": sample}
            size = {"image_width": image.width, "image_height": image.height}
            views = [draw_view(r, **numbers, **size, crop=crop) for crop, r in enumerate(crop_recipes)]
            laps.lap("draw views")
            for view in views:
                to_tensor(pil_views.execute(image, view))
            laps.lap("views by PIL")
            for name, seconds in laps.seconds.items():
                times.setdefault(name, []).extend([seconds] if number else [])
    return times


def step_in_stages(
    state: TrainState,
    crop_groups: list[Tensor],
    hyper: Hyperparameters,
    *,
    clip_norm: float,
    autocast: AbstractContextManager[Any],
) -> dict[str, float]:
    """Seconds of the pieces of `train_step`; changes the state as that does when nothing is frozen."""
    laps = Laps(state.loss_fn.center.device)
    set_hyperparameters(state.optimizer, lr=hyper.lr, weight_decay=hyper.weight_decay)
    state.optimizer.zero_grad(set_to_none=True)
    laps.start()
    with torch.inference_mode(), autocast:
        teacher_logits, _ = state.teacher(crop_groups[:1])  # (2*B, K)
    laps.lap("teacher forward")
    with autocast:
        student_logits, _ = state.student(crop_groups)  # (C*B, K)
    loss = state.loss_fn(student_logits, teacher_logits, hyper.teacher_temp)
    laps.lap("student forward, loss")
    state.loss_scale.scaled(loss).backward()
    laps.lap("backward")
    state.loss_fn.add_to_center(teacher_logits)
    state.loss_scale.unscale([p.grad for p in state.student.parameters() if p.grad is not None])
    norms = clip_gradients_per_parameter(state.student.parameters(), clip_norm)
    finite = state.check_finite(loss.detach().isfinite(), norms.isfinite().all())
    step_if_finite(state.optimizer, finite)
    update_teacher(state.teacher, state.student, hyper.momentum, finite)
    state.loss_fn.commit_center(finite)
    laps.lap("clip, optimiser, EMA")
    return laps.seconds


def published_peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s of half-precision products as published for this GPU; None where we know none."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PUBLISHED_PEAKS if part in name), None)


def warm_up(
    batches: Iterator[list[Tensor]],
    step: Callable[[list[Tensor]], object],
    *,
    prefetched: int,
    device: torch.device,
) -> None:
    """Take the batches that were prepared ahead, and make two steps."""
    for _ in range(prefetched):  # made while nothing was taken: no measure of the workers' speed
        next(batches)
    for _ in range(2):
        step(next(batches))
    wait_for(device)


def end_to_end(
    batches: Iterator[list[Tensor]],
    step: Callable[[list[Tensor]], object],
    *,
    batch_size: int,
    seconds: float,
    device: torch.device,
) -> dict[str, float]:
    """Steps on the batches for about so many seconds.

    The share of time waiting for data is that in which the device has nothing else to do; on a GPU copies
    and whatever else stands between two steps in its stream belong to it.
    """
    waits: list[tuple[Any, Any]] = []
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not waits:
        before = _mark(device)
        crop_groups = next(batches)
        waits.append((before, _mark(device)))
        step(crop_groups)
    wait_for(device)
    elapsed = time.perf_counter() - started
    return {
        "images_per_second": len(waits) * batch_size / elapsed,
        "data_wait_share": sum(_seconds_between(*wait) for wait in waits) / elapsed,
        "seconds": elapsed,
        "steps": len(waits),
    }


def host_waits(step: Callable[[], object], *, steps: int, device: torch.device, trace: str | None) -> dict:
    """How often a step lets the host wait for the device or read a number from it, by the call's name.

    With `trace` a file for chrome://tracing is written.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step()
        wait_for(device)
    if trace is not None:
        profiler.export_chrome_trace(trace)
    events = [event for event in profiler.events() or () if event.device_type == DeviceType.CPU]
    spans = [event.time_range for event in events if event.name == STEP]
    counts = Counter(
        event.name
        for event in events
        if event.name in HOST_WAITS
        and any(span.start <= event.time_range.start <= span.end for span in spans)
    )
    return {name: counts[name] / steps for name in HOST_WAITS}


def _mark(device: torch.device) -> Any:
    """Now, in the order of the device's work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(earlier: Any, later: Any) -> float:
    return later - earlier if isinstance(earlier, float) else earlier.elapsed_time(later) / 1000
