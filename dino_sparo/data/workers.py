"""Worker processes that load images: how many, and which image one of them loads when it dies or hangs."""

import atexit
import ctypes
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from dino_sparo.errors import StuckError, UserError
from dino_sparo.parallel.processes import STOP_SIGNALS, cores, end_with_parent
from dino_sparo.terminal import log

IDLE = -1
PATIENCE_SECONDS = 600.0  # for the next batch, unless training sets another timeout
KILL_SECONDS = 5.0  # until killed workers have ended
KINDS_OF_WARNINGS = 4096  # by a hash of the line of code that warns
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT_BYTES = -1, -3, 2**26  # of glibc's mallopt


class WatchedLoader:
    """A DataLoader that detects when its workers die or hang.

    Args:
        dataset: loads the items.
        image_of: returns the number of the image that an item is loaded from.
        name: returns the name of the image with a number.
        num_workers: worker processes; 0: items are loaded in this process, without a timeout.
        timeout_seconds: timeout for the next batch.
        collate: makes a batch from a list of items.
        loader_options: other arguments of torch's DataLoader.

    A UserError of the dataset is raised in the process that iterates, without a traceback in its message.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_of: Callable[[Any], int],
        name: Callable[[int], str],
        num_workers: int,
        timeout_seconds: float = PATIENCE_SECONDS,
        collate: Callable[[list[Any]], Any] = default_collate,
        **loader_options: Any,
    ) -> None:
        if num_workers and os.path.exists("/dev/shm") and not os.access("/dev/shm", os.W_OK):
            raise UserError(
                "/dev/shm is not writable, but workers return images through it; change its permissions, or "
                "set num_workers 0 (machine.num_workers in a recipe)"
            )
        self.name, self.num_workers, self.timeout_seconds = name, num_workers, timeout_seconds
        self._workers: list[BaseProcess] = []
        self.at = torch.full((num_workers,), IDLE)
        told = torch.zeros(KINDS_OF_WARNINGS, dtype=torch.bool)
        for shared in (self.at, told) if num_workers else ():  # without workers /dev/shm is not needed
            shared.share_memory_()
        if loader_options.get("batch_size", 1) is not None:
            loader_options["collate_fn"] = partial(_collate, collate)
        self.loader: DataLoader = DataLoader(
            _Noting(dataset, image_of, self.at, name, told),
            num_workers=num_workers,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # leaves the global one unchanged
            **loader_options,
        )

    def __iter__(self) -> Iterator[Any]:
        with _without_interrupts():  # a new worker cannot ignore Ctrl-C yet
            others = set(multiprocessing.active_children())
            batches = iter(self.loader)  # the workers start now, not with the first batch
            self._workers += set(multiprocessing.active_children()) - others
        return self._in_time(batches)

    def _in_time(self, batches: Iterator[Any]) -> Iterator[Any]:
        for _ in range(len(self.loader)):
            with _at_most(self.timeout_seconds if self.num_workers else 0, self._too_late):
                batch = next(batches)
            if isinstance(batch, UserError):
                raise batch
            yield batch

    @contextmanager
    def failures_explained(self) -> Iterator[None]:
        """Turn a worker's death, which torch reports wherever the program is, into one sentence. On any
        error kill all workers at once: torch would wait for one after the other, and in a notebook, which
        keeps the exception, they would stay.

        Raises:
            StuckError: a worker has died, or cannot be killed after a UserError.
        """
        try:
            yield
        except BaseException as error:
            died = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
            if isinstance(error, (ConnectionError, EOFError)):  # died while returning a batch
                died = not all(worker.is_alive() for worker in self._workers)
            _end(self._workers)
            if died:
                raise self._stuck(f"a process that loads images died ({error})") from error
            if isinstance(error, UserError) and any(worker.is_alive() for worker in self._workers):
                raise StuckError(str(error)) from error  # so that the program does not wait for them
            raise

    def _too_late(self) -> NoReturn:
        seconds = f"machine.data_timeout_seconds {self.timeout_seconds:g}"
        raise self._stuck(f"no batch of images came within {seconds}")

    def _stuck(self, what: str) -> StuckError:
        names = [self.name(number) for number in self.at.tolist() if number != IDLE]
        return StuckError(
            f"{what} while loading {', '.join(names) or 'no file'}; repair the file or its disk, allow more "
            f"time, or use fewer machine.num_workers if memory or /dev/shm ran out, then run again"
        )


class _Noting(Dataset):
    """A dataset that records in shared memory which image each worker loads. In a worker it returns a
    UserError instead of raising it. Warnings of libraries are logged with the name of the image, once per
    kind over all workers, since `told` is shared too."""

    def __init__(
        self,
        dataset: Dataset,
        image_of: Callable[[Any], int],
        at: Tensor,
        name: Callable[[int], str],
        told: Tensor,
    ) -> None:
        self.dataset, self.image_of, self.at, self.name, self.told = dataset, image_of, at, name, told

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, item: Any) -> Any:
        worker = get_worker_info()
        if worker is None:
            return self._load(item)
        self.at[worker.id] = self.image_of(item)
        try:
            loaded = self._load(item)
        except UserError as error:
            loaded = error
        self.at[worker.id] = IDLE
        return loaded

    def _load(self, item: Any) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            loaded = self.dataset[item]
        for warning in caught:
            kind = zlib.crc32(f"{warning.filename} {warning.lineno}".encode()) % KINDS_OF_WARNINGS
            if not self.told[kind]:
                self.told[kind] = True
                text = "WARNING: %s: %s (logged for the first such image only)"
                log.warning(text, self.name(self.image_of(item)), warning.message)
        return loaded


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ignore SIGINT, also in processes that start in the block; no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _collate(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    """A batch of items, or the first error among them."""
    errors = (item for item in items if isinstance(item, UserError))
    return next(errors, None) or collate(items)


@contextmanager
def _at_most(seconds: float, too_late: Callable[[], NoReturn]) -> Iterator[None]:
    """Call `too_late`, which raises, if the block takes longer than `seconds` (0: never).

    An alarm ends any wait; torch's own timeout does not work if a worker stops while it returns a batch. Only
    the main thread gets alarms; in another thread there is no timeout.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: too_late())
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_shared_memory(num_bytes: int) -> None:
    """Check that prefetched views fit into the shared memory through which workers return them.

    Raises:
        UserError: they do not fit, so workers would fail during training.
    """
    free = shared_memory_free()
    if free is not None and num_bytes > free:
        raise UserError(
            f"prefetched views need up to {num_bytes / 2**20:.0f} MiB of shared memory, but /dev/shm has "
            f"{free / 2**20:.0f} MiB free; enlarge it (docker run --shm-size), or use fewer "
            f"machine.num_workers, machine.prefetch_batches 1, or a smaller machine.batch_size_per_gpu"
        )


def shared_memory_free() -> int | None:
    """Free bytes of /dev/shm; None if it does not exist."""
    return shutil.disk_usage("/dev/shm").free if os.path.exists("/dev/shm") else None


@atexit.register  # before Python's own handler, which sends SIGTERM and waits
def _end_all() -> None:
    """Kill workers, so that one that hangs does not block the end of the program."""
    _end([child for child in multiprocessing.active_children() if child.daemon])


def _end(workers: Sequence[BaseProcess]) -> None:
    """Kill these processes without an error message."""
    if not workers or threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their death
    for worker in workers:
        worker.kill()
    deadline = time.monotonic() + KILL_SECONDS  # a worker that waits for a broken disk does not die
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
    signal.signal(signal.SIGCHLD, before)


def _start_worker(_worker: int) -> None:
    """Ignore signals, since training may need more batches; workers end with the training process."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    keep_memory()


def keep_memory() -> None:
    """Let this process reuse freed memory, up to 64 MiB, since views allocate the same sizes all the time.

    Otherwise glibc returns it to the system and requests it again page by page.
    """
    with suppress(AttributeError, OSError):  # another C library
        for what in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(what, KEPT_BYTES)


def default_workers(processes_here: int = 1) -> int:
    """One worker per core that this process may use, divided among the training processes, at most 16."""
    return max(1, min(16, cores() // processes_here))
