"""Ends of a run before its time: signals from outside, and numbers that went wrong."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import StoppedError, StuckError
from dino_sparo.parallel.processes import on_stop_signals

LISTED_BAD_STEPS = 1000  # between two looks at them


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


class BadSteps:
    """Steps whose numbers went wrong, counted on the device; the host reads them now and then.

    Args:
        device: of the tensors.
        allowed: so many may be skipped; after one more nothing changes any more.

    Attributes:
        total: how many there have been since this start, on the device.
        known: how many the log has told the host of.
    """

    def __init__(self, device: torch.device, allowed: int) -> None:
        self.allowed = allowed
        self.total = torch.zeros((), dtype=torch.int64, device=device)  # since this start
        self._steps = torch.zeros_like(self.total)  # since this start
        self._latest = torch.zeros(LISTED_BAD_STEPS, 2, dtype=torch.int64, device=device)  # step, finite loss
        self.known = self._read = 0

    def going_on(self) -> Tensor:
        """Whether steps may still change anything: a scalar on the device."""
        return self.total <= self.allowed

    def add(self, bad: Tensor, finite_loss: Tensor) -> None:
        """A step has been done, once each; whether it was bad, and whether its loss was finite (scalars)."""
        self._steps += 1
        row = torch.stack([self._steps, finite_loss.long()])
        self._latest.copy_(torch.where(bad, torch.cat([self._latest[1:], row[None]]), self._latest))
        self.total += bad

    def some_are_new(self) -> bool:
        """Whether the log has told of some that have not been read."""
        return self.known > self._read

    def new(self, first_step: int) -> list[tuple[int, int, str]]:
        """Those not read before, the last 1000 of them: how many it made, its step, what was not finite.

        The host waits for the device. Steps are numbered from that of this start.
        """
        before, self._read = self._read, int(self.total)
        rows = self._latest.tolist()[max(0, len(self._latest) + before - self._read) :]
        numbers = range(self._read - len(rows) + 1, self._read + 1)
        return [
            (number, first_step + step, "gradients" if finite_loss else "loss")
            for number, (step, finite_loss) in zip(numbers, rows, strict=True)
        ]
