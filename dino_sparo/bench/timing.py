"""Timing for the benchmark: interleaved rounds, and the named ranges of a step from `torch.profiler`."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from dino_sparo.parallel.device import wait_for

WARM_UP_ROUNDS = 2
CALLS_PER_ROUND = {"cuda": 5, "cpu": 1}  # consecutive, so that the host can run ahead of a GPU as in training
# Calls in which the host waits for the GPU, or reads a value from the device.
HOST_WAITS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
    "aten::_local_scalar_dense",
)
STEP = "training step"
PERCENTILES = (50, 10, 90)


def interleaved(
    contenders: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds per call of each contender by round; the order is reversed in every other round."""
    calls = CALLS_PER_ROUND[device.type]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + WARM_UP_ROUNDS):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            wait_for(device)
            started = time.perf_counter()
            for _ in range(calls):
                contenders[name]()
            wait_for(device)
            if number >= WARM_UP_ROUNDS:
                times[name].append((time.perf_counter() - started) / calls)
    return times


def spread(seconds: list[float], images: int) -> dict[str, float]:
    """Median, 10th, and 90th percentile of times for `images` images in ms, and images/s by the median."""
    names = ("median_ms", "p10_ms", "p90_ms")
    found = dict(zip(names, (1000 * np.percentile(seconds, PERCENTILES)).tolist(), strict=True))
    return found | {"images_per_second": 1000 * images / found["median_ms"]}


def spread_of_ratios(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Median, 10th, and 90th percentile of elementwise ratios."""
    percentiles = np.percentile(np.divide(numerators, denominators), PERCENTILES).tolist()
    return dict(zip(("median", "p10", "p90"), percentiles, strict=True))


def profiled(step: Callable[[], object], steps: int, device: torch.device) -> list[Any]:
    """The profiler's events of `steps` steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step()
        wait_for(device)
    return list(profiler.events() or ())


def range_seconds(events: list[Any], device_type: str) -> dict[str, float]:
    """Total seconds in each range that is directly within a step.

    On a CPU the duration of the range; on a GPU the time of all kernels that were launched during it,
    including those launched by autograd's threads.
    """
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = [e for e in on_host if e.is_user_annotation and e.cpu_parent and e.cpu_parent.name == STEP]
    launches = [(e.time_range.start, e.kernels) for e in on_host if e.kernels and not e.is_user_annotation]
    seconds: Counter[str] = Counter()
    for event in ranges:
        if "#" in event.name:  # ranges that torch adds to optimizer methods
            continue
        span = event.time_range
        kernels = [found for at, found in launches if span.start <= at <= span.end]
        on_gpu = sum(kernel.duration for found in kernels for kernel in found)
        seconds[event.name] += (on_gpu if device_type == "cuda" else span.elapsed_us()) / 1e6
    return dict(seconds)


def host_waits(events: list[Any]) -> dict[str, float]:
    """How often the host waits for the device or reads a value from it, per step, by name of the call."""
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    spans = [event.time_range for event in on_host if event.name == STEP]
    waits = [event for event in on_host if event.name in HOST_WAITS]
    counts = Counter(e.name for e in waits if any(s.start <= e.time_range.start <= s.end for s in spans))
    return {name: counts[name] / len(spans) for name in HOST_WAITS}
