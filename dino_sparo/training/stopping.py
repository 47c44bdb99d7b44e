"""Early ends of a run: signals, and steps with a loss or gradients that are not finite."""

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import StoppedError, StuckError
from dino_sparo.parallel.processes import on_stop_signals, told

LISTED_BAD_STEPS = 1000  # since `new` was last called


class StopSignals:
    """Records the first stop signal after `listen` until the end of the block; later ones are ignored.

    After a StoppedError or StuckError signals stay ignored, since the program ends.

    Attributes:
        received: name of the signal, empty before.
        interruptible: True while there is nothing to save: Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.received, self.interruptible = "", True
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        return self

    def listen(self) -> None:
        """Set the signal handlers; only in the main thread, which alone receives signals."""
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
        if not self.received and told("RANK") == 0:  # by no lock, which the main thread may hold
            with suppress(OSError):  # nobody reads it
                os.write(
                    2, f"\n{signal.Signals(number).name}: stopping after this step, and saving\n".encode()
                )
        self.received = self.received or signal.Signals(number).name


class BadSteps:
    """Steps with a loss or gradients that are not finite, counted on the device.

    Args:
        device: of the tensors.
        allowed: number of bad steps to skip; after one more the state no longer changes.

    Attributes:
        total: number of bad steps since this start, on the device.
        known: number of bad steps in the last log entry, on the CPU.
    """

    def __init__(self, device: torch.device, allowed: int) -> None:
        self.allowed = allowed
        self.total = torch.zeros((), dtype=torch.int64, device=device)
        self._steps = torch.zeros_like(self.total)  # all steps since this start
        self._latest = torch.zeros(LISTED_BAD_STEPS, 2, dtype=torch.int64, device=device)  # step, finite loss
        self.known = self._read = 0

    def going_on(self) -> Tensor:
        """Whether steps may still change the state: a bool scalar on the device."""
        return self.total <= self.allowed

    def add(self, bad: Tensor, finite_loss: Tensor) -> None:
        """Count a step: whether it was bad, and whether its loss was finite (bool scalars)."""
        self._steps += 1
        row = torch.stack([self._steps, finite_loss.long()])
        self._latest.copy_(torch.where(bad, torch.cat([self._latest[1:], row[None]]), self._latest))
        self.total += bad

    def some_are_new(self) -> bool:
        """Whether the log has counted bad steps that `new` has not returned yet."""
        return self.known > self._read

    def new(self, first_step: int) -> list[tuple[int, int, str]]:
        """Bad steps since the last call, at most 1000: count since this start, step, and what was not finite.

        Synchronizes with the device.

        Args:
            first_step: steps done before this start.
        """
        before, self._read = self._read, int(self.total)
        rows = self._latest.tolist()[max(0, len(self._latest) + before - self._read) :]
        numbers = range(self._read - len(rows) + 1, self._read + 1)
        return [
            (number, first_step + step, "gradients" if finite_loss else "loss")
            for number, (step, finite_loss) in zip(numbers, rows, strict=True)
        ]
