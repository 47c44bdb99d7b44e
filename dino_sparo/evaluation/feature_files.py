"""Rows of features on disk, and which of them are there."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dino_sparo.errors import UserError


class FeatureFile:
    """One feature of a set of images; not a row of it counts before it is on disk.

    Rows are written by `pwrite`, not through the map, so that a full disk is an error that can be told.
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, int], precision: str) -> None:
        self.path, self.done_path = folder / f"{name}.{precision}", folder / f"{name}.done"
        self.shape, self.dtype = shape, np.dtype(precision)
        self.size = shape[0] * shape[1] * self.dtype.itemsize

    def exists(self) -> bool:
        """Whether a pass has begun to fill it."""
        return (
            self.path.exists()
            and self.path.stat().st_size == self.size
            and self.done_path.exists()
            and self.done_path.stat().st_size == self.shape[0]
        )

    def bytes_missing(self) -> int:
        """What the rows that are not there will take."""
        there = int(np.count_nonzero(self.done())) if self.exists() else 0
        return self.size - there * self.size // max(1, self.shape[0])

    def make(self) -> None:
        """Empty, of its full size; the marks first, so that none is ever ahead of its row."""
        self.done_path.write_bytes(bytes(self.shape[0]))
        with open(self.path, "wb") as file:
            file.truncate(self.size)

    def done(self) -> NDArray[np.bool_]:
        """Which images have been written."""
        return np.fromfile(self.done_path, dtype=np.bool_)

    def rows(self) -> NDArray[Any]:
        """All rows, mapped: they take no memory that the system cannot take back."""
        return np.memmap(self.path, self.dtype, mode="c", shape=self.shape)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """All of it: a disk that gets full takes a part at first, and only then reports it."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def check_space(folder: Path, size: int) -> None:
    """Refuse, before anything is computed, what the disk of a folder, which need not exist yet, cannot hold.

    Raises:
        UserError: naming the folder, and bytes needed and free.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise UserError(
            f"{folder}: features need {size} bytes ({size / 2**30:.1f} GiB), but only {free} "
            f"({free / 2**30:.1f} GiB) are free there; make room or give another cache folder"
        )


def cannot_write(folder: Path, error: OSError) -> UserError:
    """The error for features that a disk does not take."""
    return UserError(
        f"{folder}: features cannot be written ({error.strerror}); make room, or give a cache folder "
        f"that all processes can write"
    )
