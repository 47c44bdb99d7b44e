"""Ends of a run before its time: signals from outside, and numbers that went wrong."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import StoppedError, StuckError
from dino_sparo.files import append_line
from dino_sparo.parallel.processes import on_stop_signals

BAD_STEPS_FILE = "bad_steps.jsonl"


class StopSignals:
    """From `listen` on, the first signal that asks the run to stop is noted, and further ones change nothing.

    That ends with the block, unless the program ends with it, by a StoppedError or StuckError.

    Attributes:
        received: its name, empty before.
        interruptible: whether Ctrl-C interrupts at once instead: as long as there is nothing to save.
    """

    def __init__(self) -> None:
        self.received, self.interruptible = "", True
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        return self

    def listen(self) -> None:
        """Take the signals; in the main thread, which alone gets any."""
        if threading.current_thread() is threading.main_thread():
            self._before = on_stop_signals(self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, StoppedError | StuckError):
            return
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.interruptible and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name


class Later:
    """A small tensor on its way to the host: the device goes on meanwhile."""

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._value = value.clone()

    def wait(self) -> list[int]:
        """The numbers, as soon as the device has computed them."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.tolist()


class BadSteps:
    """Notices, one step late, the steps whose numbers went wrong: nobody waits for the device."""

    def __init__(self) -> None:
        self._seen = [0, 0]
        self._pending: list[tuple[int, Later]] = []

    @property
    def number(self) -> int:
        """Bad steps so far."""
        return self._seen[0]

    def add(self, step: int, counts: Tensor) -> None:
        """A step has been done; counts of bad steps so far, as in `TrainState`."""
        self._pending.append((step, Later(counts)))

    def found(self, *, now: bool) -> Iterator[tuple[int, str]]:
        """New bad steps and what was not finite, the loss or the gradients; of the last step only `now`."""
        while len(self._pending) > (0 if now else 1):
            step, later = self._pending.pop(0)
            before, self._seen = self._seen, later.wait()
            if self._seen[0] > before[0]:
                yield step, "loss" if self._seen[1] > before[1] else "gradients"


def note_bad_step(run_dir: Path, step: int, cause: str, samples: list[int], names: list[str]) -> None:
    """Add a line to `bad_steps.jsonl`: what was not finite, and the images of the step by number and name."""
    append_line(run_dir / BAD_STEPS_FILE, {"step": step, "cause": cause, "samples": samples, "images": names})
