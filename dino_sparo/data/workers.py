"""Processes that load images: how many, and which file one of them was at when it died or hung."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from dino_sparo.errors import UserError

IDLE = -1


class Watched(Dataset):
    """A dataset that notes in shared memory which image each worker is at.

    Args:
        dataset: what loads the items.
        image_of: the number of the image that an item is loaded from.
        name: the name of the image of a number.
        num_workers: worker processes of the loader; with 0 nothing is watched.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        image_of: Callable[[Any], int],
        name: Callable[[int], str],
        num_workers: int,
    ) -> None:
        self.dataset, self.image_of, self.name = dataset, image_of, name
        self.at: Tensor = torch.full((num_workers,), IDLE).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, item: Any) -> Any:
        worker = get_worker_info()
        if worker is None:
            return self.dataset[item]
        self.at[worker.id] = self.image_of(item)
        loaded = self.dataset[item]
        self.at[worker.id] = IDLE
        return loaded

    @contextmanager
    def failures_explained(self, timeout_seconds: float) -> Iterator[None]:
        """Turn a worker's death or a loader's timeout within into one sentence that names the files.

        Raises:
            UserError: a worker has died, or no batch came within the timeout.
        """
        try:
            yield
        except RuntimeError as error:
            message = str(error)
            if not message.startswith("DataLoader"):
                raise
            if "timed out" in message:
                what = f"no batch of images came within machine.data_timeout_seconds {timeout_seconds:g}"
                remedy = "repair or remove the file or its disk, or allow more time"
            else:
                what = f"a process that loads images has died ({message})"
                remedy = (
                    "repair or remove the file, or give fewer machine.num_workers if memory or "
                    "shared memory ran out"
                )
            names = [self.name(number) for number in self.at.tolist() if number != IDLE]
            at = f"while at {', '.join(names)}"
            if not names:  # then they were handing over what they had made
                at = "while at no file"
                remedy = "memory or shared memory (/dev/shm) may have run out: give fewer machine.num_workers"
            raise UserError(f"{what} {at}; {remedy}, then start again") from error


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


def start_worker(_worker: int) -> None:
    """Ctrl-C is the training process's business; its workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def default_workers(processes_here: int = 1) -> int:
    """One worker process a core that this process may use, shared by all training processes, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // processes_here))
