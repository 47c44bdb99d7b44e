"""Processes that load images: how many, and which file one of them is at when it dies or hangs."""

import atexit
import ctypes
import logging
import multiprocessing
import os
import shutil
import signal
import threading
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
from dino_sparo.parallel.processes import STOP_SIGNALS, end_with_parent

log = logging.getLogger("dino_sparo")

IDLE = -1
KINDS_OF_WARNINGS = 4096  # by a hash of where in a library they come from
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT_BYTES = -1, -3, 2**26  # of glibc's mallopt


class WatchedLoader:
    """Batches that worker processes prepare ahead, and a watch over these processes.

    Args:
        dataset: what loads the items.
        image_of: the number of the image that an item is loaded from.
        name: the name of the image of a number.
        num_workers: worker processes; with 0 the items are loaded here, unwatched.
        timeout_seconds: how long the next batch may take.
        collate: makes a batch of a list of items.
        loader_options: all other arguments of torch's DataLoader.

    A UserError of the dataset is raised where the batches are taken, without a traceback in its message.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_of: Callable[[Any], int],
        name: Callable[[int], str],
        num_workers: int,
        timeout_seconds: float,
        collate: Callable[[list[Any]], Any] = default_collate,
        **loader_options: Any,
    ) -> None:
        if num_workers and os.path.exists("/dev/shm") and not os.access("/dev/shm", os.W_OK):
            raise UserError(
                "/dev/shm cannot be written, by which processes that load images hand them over; give "
                "permission there, or num_workers 0 (machine.num_workers in a recipe)"
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
            generator=torch.Generator(),  # nothing is drawn from the one that training uses
            **loader_options,
        )

    def __iter__(self) -> Iterator[Any]:
        with _without_interrupts():  # Ctrl-C is not for a worker, which could not ignore it yet
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
        """Turn a worker's death, which torch reports wherever the program is, into one sentence; and end all
        workers at once on any error of the user's and on Ctrl-C, as torch would wait for one after the other.

        Raises:
            StuckError: a worker has died.
        """
        try:
            yield
        except (KeyboardInterrupt, UserError):
            _end(self._workers)
            raise
        except (RuntimeError, ConnectionError, EOFError) as error:
            if isinstance(error, RuntimeError):
                died = str(error).startswith("DataLoader worker")
            else:  # it was handing over a batch
                died = not all(worker.is_alive() for worker in self._workers)
            if not died:
                raise
            _end(self._workers)
            raise self._stuck(f"a process that loads images has died ({error})") from error

    def _too_late(self) -> NoReturn:
        seconds = f"machine.data_timeout_seconds {self.timeout_seconds:g}"
        raise self._stuck(f"no batch of images came within {seconds}")

    def _stuck(self, what: str) -> StuckError:
        names = [self.name(number) for number in self.at.tolist() if number != IDLE]
        return StuckError(
            f"{what} while at {', '.join(names) or 'no file'}; repair the file or its disk, allow more time, "
            f"or give fewer machine.num_workers if memory or /dev/shm ran out, then start again"
        )


class _Noting(Dataset):
    """A dataset that notes in shared memory which image each worker is at; there it returns a UserError,
    which cannot be raised from one process to another. What libraries warn of is logged with the name of the
    image, once a kind for all workers: `told` is shared too."""

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
                text = "WARNING: %s: %s (said once, of the first such image)"
                log.warning(text, self.name(self.image_of(item)), warning.message)
        return loaded


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ignore SIGINT, also in the processes that start meanwhile; only the main thread can."""
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
    """Call what raises if the block is not done after so many seconds (0: never).

    By an alarm, which ends any wait: torch's own timeout does not end one for a worker that stops while
    it hands over a batch. Only the main thread gets alarms; in another one nothing is called.
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
    """Refuse prefetched views that do not fit into the shared memory by which workers hand them over.

    Raises:
        UserError: they do not; workers would stop in the middle of it.
    """
    free = shared_memory_free()
    if free is not None and num_bytes > free:
        raise UserError(
            f"prefetched views need up to {num_bytes / 2**20:.0f} MiB of shared memory, but /dev/shm has "
            f"{free / 2**20:.0f} MiB free; enlarge it (docker run --shm-size), or give fewer "
            f"machine.num_workers, machine.prefetch_batches 1 or a smaller machine.batch_size_per_gpu"
        )


def shared_memory_free() -> int | None:
    """Free bytes of /dev/shm; None where there is none."""
    return shutil.disk_usage("/dev/shm").free if os.path.exists("/dev/shm") else None


@atexit.register  # before Python's own way, which sends a SIGTERM and waits
def _end_all() -> None:
    """A worker that hangs must not keep the program from ending."""
    _end([child for child in multiprocessing.active_children() if child.daemon])


def _end(workers: Sequence[BaseProcess]) -> None:
    """End these processes without a word."""
    if not workers or threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report their death
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    signal.signal(signal.SIGCHLD, before)


def _start_worker(_worker: int) -> None:
    """Signals are the training process's business, which may need more batches; its workers end with it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)
    keep_memory()


def keep_memory() -> None:
    """Let freed memory stay with this process, up to 64 MiB: views free and take the same all the time.

    Without it glibc gives it back to the system and gets it page by page.
    """
    with suppress(AttributeError, OSError):  # another C library
        for what in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(what, KEPT_BYTES)


def default_workers(processes_here: int = 1) -> int:
    """One worker process a core that this process may use, shared by all training processes, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // processes_here))
