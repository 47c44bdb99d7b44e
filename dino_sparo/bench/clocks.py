"""The clock of the benchmark, and what is told of its times."""

import time
from collections.abc import Callable

import numpy as np
import torch

from dino_sparo.parallel.device import wait_for

WARM_UP_ROUNDS = 2
STEPS_A_ROUND = {"cuda": 5, "cpu": 1}  # in a row, so that the host can run ahead of a GPU as in training


class Laps:
    """Seconds between laps, at the end of which the device is waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """Begin the first lap now."""
        wait_for(self.device)
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a lap and begin the next one."""
        wait_for(self.device)
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now


def spread(seconds: list[float], images: int) -> dict[str, float]:
    """Median, 10th and 90th percentile in ms of what took so long for so many images, and images/s."""
    low, median, high = np.percentile(seconds, (10, 50, 90))
    return {
        "median_ms": 1000 * float(median),
        "p10_ms": 1000 * float(low),
        "p90_ms": 1000 * float(high),
        "images_per_second": images / float(median),
    }


def spread_of_ratios(numerators: list[float], denominators: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile of the ratios pair by pair."""
    low, median, high = np.percentile(np.divide(numerators, denominators), (10, 50, 90))
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def interleaved(
    contenders: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a call of each, round by round; every other round begins with the other end."""
    laps, calls = Laps(device), STEPS_A_ROUND[device.type]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + WARM_UP_ROUNDS):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            laps.start()
            for _ in range(calls):
                contenders[name]()
            laps.lap(name)
            if number >= WARM_UP_ROUNDS:
                times[name].append(laps.seconds[name] / calls)
    return times
