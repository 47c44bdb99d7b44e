"""The log of a run: progress bar or lines in the terminal, metrics.jsonl, and TensorBoard events."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dino_sparo.files import clean_lines, named, read_lines, set_aside
from dino_sparo.parallel.device import wait_for_event
from dino_sparo.terminal import colored, log, shows_bars

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
GROUPS = {  # of curves in TensorBoard, by prefixes of their names; all others are in "machine"
    "machine": ("loss_scale", "knn20_images"),
    "loss": ("loss", "kl"),  # with `knn` on TensorBoard's first screen
    "knn": ("knn",),
    "networks": ("entropy", "feature_std", "center_norm", "gradient_norm"),
    "slots": ("slot",),
    "schedule": ("lr", "weight_decay", "momentum", "teacher_temp", "student_temp"),
}


class RunLog:
    """The log of a run after `first_step` steps; entries of an earlier start after this step are removed.

    TensorBoard hides them by `purge_step`.

    Args:
        run_dir: existing folder of the run.
        first_step: steps already done.
        steps_per_epoch, total_steps: for the progress bar and the remaining time.
        silent: write nothing; for all processes except the first.
        group: group of all curves in TensorBoard, for probes; None: by `GROUPS`.
        events: folder of the TensorBoard events. None: `tensorboard` in `run_dir`, for probes no events.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        first_step: int,
        steps_per_epoch: int,
        total_steps: int,
        silent: bool = False,
        group: str | None = None,
        events: Path | None = None,
    ) -> None:
        self.group = group
        self._events: SummaryWriter | None = None
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.first_step = self.last_step = first_step
        self.started = self.last_time = time.monotonic()
        self.seconds_waited = self.seconds_logging = 0.0
        self._bar: tqdm | None = None
        self._postfix: dict[str, str] = {}
        self._postponed: tuple[Callable[[], None], torch.cuda.Event] | None = None
        self.silent, self.path = silent, run_dir / METRICS_FILE
        if silent:
            return
        clean_lines(self.path, _is_whole, keep=lambda entry: 0 < first_step >= entry["step"])
        self._metrics = open(self.path, "a")  # noqa: SIM115 closed by __exit__
        if events is None:
            if group:
                return
            events = run_dir / EVENTS_FOLDER
            if events.exists() and not events.is_dir():
                set_aside(events, "it is not a folder")
        cut_from = first_step + 1 if first_step else 0
        self._events = SummaryWriter(str(events), purge_step=cut_from, flush_secs=30)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(RuntimeError):  # raised by `query` after a failure of the GPU
            if self._postponed is not None and self._postponed[1].query():  # it may explain the exception
                self._write_postponed()
        if self._bar is not None:
            self._bar.close()
        if not self.silent:
            with named(self.path):
                self._metrics.close()
                if self._events is not None:
                    self._events.close()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Log the time spent in the block as time in which training waited for data."""
        started = time.monotonic()
        yield
        self.seconds_waited += time.monotonic() - started

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Log the time spent in the block, in the next entry, as time for logging."""
        started = time.monotonic()
        yield
        self.seconds_logging += time.monotonic() - started

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """Exclude the time spent in the block from the speed."""
        started = time.monotonic()
        yield
        self.started += time.monotonic() - started
        self.last_time += time.monotonic() - started

    def step_done(self, step: int) -> None:
        """Advance the progress bar to `step`, and write the postponed entry if its numbers are ready."""
        if self._postponed is not None and self._postponed[1].query():
            self._write_postponed()
        if not shows_bars():
            return
        done = self._step_in_epoch(step)
        if self._bar is None:
            self._bar = tqdm(
                total=self.steps_per_epoch,
                initial=done - 1,
                desc=self._epoch_of(step),
                unit="step",
                leave=self.group is None,  # probes print a line after each epoch
                dynamic_ncols=True,
            )
        self._bar.set_postfix(self._postfix, refresh=False)
        self._bar.update(1)
        if done == self.steps_per_epoch:
            self._bar.close()
            self._bar = None

    def postpone(self, write: Callable[[], None], until: torch.cuda.Event | None) -> None:
        """Call `write` once a GPU has computed the numbers of an entry, before the next entry or checkpoint.

        `write` must not use collectives, since other processes may call it at another step.
        """
        self._write_postponed()
        if until is None:
            write()
        else:
            self._postponed = write, until

    def _write_postponed(self) -> None:
        if self._postponed is not None:
            write, until = self._postponed
            wait_for_event(until)
            self._postponed = None
            write()

    def speed(self, step: int, *, batch_size: int) -> dict[str, float]:
        """Speed and shares of time since the previous entry; call it once per entry."""
        now = time.monotonic()
        seconds = max(1e-9, now - self.last_time)
        images_per_second = batch_size * (step - self.last_step) / seconds
        speed = {
            "seconds": seconds,  # since the start after a resume between two entries
            "images_per_second": images_per_second,
            "data_wait_share": self.seconds_waited / seconds,
            "log_share": self.seconds_logging / seconds,
        }
        self.last_time, self.last_step = now, step
        self.seconds_waited = self.seconds_logging = 0.0
        return speed

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log one entry of the training curve, with its speed."""
        self._write(step, values)
        now, images_per_second = time.monotonic(), values["images_per_second"]
        seconds_per_step = (now - self.started) / max(1, step - self.first_step)
        run_left = _duration(seconds_per_step * (self.total_steps - step))
        self._postfix = {
            "loss": f"{values['loss']:.3f}",
            "img/s": f"{images_per_second:.0f}",
            "run left": run_left,
        }
        if not shows_bars():
            in_epoch = self._step_in_epoch(step)
            epoch_left = _duration(seconds_per_step * (self.steps_per_epoch - in_epoch))
            log.info(
                f"{self._epoch_of(step)} step {in_epoch}/{self.steps_per_epoch}  loss {values['loss']:.4f}  "
                f"{images_per_second:.0f} images/s  left: epoch {epoch_left}, run {run_left}"
            )

    def evaluation(self, step: int, values: dict[str, float], shown: str) -> None:
        """Log the results of an evaluation, and print `shown`."""
        self._write_postponed()
        self._write(step, values)
        if log.isEnabledFor(logging.INFO):
            tqdm.write(f"after epoch {step // self.steps_per_epoch}: {shown}", file=sys.stderr)

    def alarm(self, step: int, text: str) -> None:
        """Print a warning, and add it to TensorBoard as text."""
        if not self.silent:
            tqdm.write(colored(f"WARNING: step {step}: {text}", "yellow"), file=sys.stderr)
        if self._events is not None:
            self._events.add_text("alarm", text, step)

    def recipe(self, text: str) -> None:
        """Add the recipe, as YAML, to TensorBoard as text."""
        if self._events is not None:
            self._events.add_text("recipe", "\n".join(f"    {line}" for line in text.splitlines()))

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """Add an image (3, height, width), float from 0 to 1 or uint8, to TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, image, step)

    def flush(self) -> None:
        """Flush all entries to disk, before a checkpoint of their steps is written."""
        self._write_postponed()
        if not self.silent:
            with named(self.path):
                self._metrics.flush()
                os.fsync(self._metrics.fileno())
                if self._events is not None:
                    self._events.flush()

    def _step_in_epoch(self, step: int) -> int:
        return (step - 1) % self.steps_per_epoch + 1

    def _epoch_of(self, step: int) -> str:
        return f"epoch {(step - 1) // self.steps_per_epoch + 1}/{self.total_steps // self.steps_per_epoch}"

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.silent:
            return
        entry = {"step": step, "epoch": round(step / self.steps_per_epoch, 4), **values}
        with named(self.path):
            self._metrics.write(json.dumps(entry) + "\n")
            self._metrics.flush()
            if self._events is None:
                return
            scalars = [
                Summary.Value(tag=f"{self.group or group_of(name)}/{name}", simple_value=value)
                for name, value in values.items()
            ]
            writer: Any = self._events.file_writer
            writer.add_summary(Summary(value=scalars), step)  # ten times faster than add_scalar for each


def group_of(name: str) -> str:
    """The group of a curve in TensorBoard."""
    return next((group for group, begins in GROUPS.items() if name.startswith(begins)), "machine")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All entries of a run's metrics.jsonl, oldest first."""
    return list(each_metric(run_dir))


def each_metric(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Iterate over the entries of a run's metrics.jsonl, oldest first; there may be millions."""
    return read_lines(run_dir / METRICS_FILE, _is_whole)


def _is_whole(entry: dict[str, Any]) -> bool:
    """Whether an entry has only numbers that a float can hold, with finite step and epoch among them."""
    return (
        {"step", "epoch"} <= entry.keys()
        and all(
            isinstance(one, float) or (isinstance(one, int) and abs(one) < 2**63) for one in entry.values()
        )
        and isfinite(entry["step"] + entry["epoch"])
    )


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))
