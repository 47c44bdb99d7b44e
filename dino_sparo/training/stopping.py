"""Early ends of a run: signals, steps with a loss or gradients that are not finite, and bad images."""

import json
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from dino_sparo.data.loader import Replaced
from dino_sparo.errors import StoppedError, StuckError, UserError
from dino_sparo.files import read_lines, write_file
from dino_sparo.parallel.distributed import gather_objects, rank
from dino_sparo.parallel.processes import env_int, on_stop_signals
from dino_sparo.runs.rundir import BAD_IMAGES_FILE, is_bad_image

MAX_SHARE = 0.01  # of bad images
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
        if not self.received and env_int("RANK") == 0:  # without a lock, which the main thread may hold
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

    def may_continue(self) -> Tensor:
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


def too_many(bad: int, num_images: int) -> bool:
    """Whether this number of bad images ends a run: more than 1 %, and more than one image."""
    return bad > max(1, MAX_SHARE * num_images)


class BadImages:
    """The list `run_dir/bad_images.jsonl` of images that cannot be read: one line each, with name and reason.

    Args:
        run_dir: folder of the run; images that an earlier start listed are kept.
        num_images: size of the dataset.
    """

    def __init__(self, run_dir: Path, num_images: int) -> None:
        self.path, self.num_images = run_dir / BAD_IMAGES_FILE, num_images
        self._pending: list[Replaced] = []
        self._met: set[str] = set()  # of this start: those listed before may have been fixed
        self._reasons = {each["name"]: each["reason"] for each in read_lines(self.path, is_bad_image)}

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, replaced: tuple[Replaced, ...]) -> None:
        """Add images that this process has substituted, to be listed by `share`."""
        self._pending += replaced

    def share(self) -> None:
        """List the images added in all processes since the last call. A collective."""
        new = {name: reason for pending in gather_objects(self._pending) for name, reason in pending}
        self._pending = []
        self._met |= new.keys()
        self.list(new, len(self._met), self.num_images)

    def list(self, new: dict[str, str], bad: int, num_images: int) -> None:
        """List new images (name -> reason, equal in all processes).

        Raises:
            UserError: `bad` of `num_images` images are too many.
        """
        if new.keys() - self._reasons.keys():
            self._reasons = dict(sorted((new | self._reasons).items()))
            if rank() == 0:
                lines = (json.dumps({"name": name, "reason": why}) for name, why in self._reasons.items())
                write_file(self.path, "".join(f"{line}\n" for line in lines))
        if too_many(bad, num_images):
            raise UserError(
                f"{bad} of {num_images} images cannot be read, more than 1 %; repair those listed in "
                f"{self.path}, then run again"
            )
