"""Images that are listed in an index: in the files of a folder or, in `shards`, in tars."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_sparo.data.decode import UNREADABLE, UnreadableImageError, decode, problem_of
from dino_sparo.data.index import FolderIndex, Index

STAT_THREADS, STAT_FILES = 16, 4096


@dataclass(frozen=True, eq=False)
class IndexedSource(Generic[Index]):
    """Images in the order of an index; an `ImageSource` but for where their bytes are.

    It holds no names, only the index of all images and the positions in it of those chosen (None: of all).
    `class_numbers` are the numbers in `classes` of the index's own classes.
    """

    root: Path
    index: Index
    classes: tuple[str, ...]
    class_numbers: NDArray[np.int64]
    chosen: NDArray[np.int64] | None = None

    @classmethod
    def of_all(cls, root: Path, index: Index) -> Self:
        """All images of an index, with its own classes."""
        return cls(root, index, index.classes, np.arange(len(index.classes)))

    def __len__(self) -> int:
        return len(self.index if self.chosen is None else self.chosen)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers of all images, made anew each time; None if they are unknown."""
        labels = self.index.labels()
        if labels is None:
            return None
        return self.class_numbers[labels if self.chosen is None else labels[self.chosen]]

    def position(self, index: int) -> int:
        """Where an image is in the index."""
        return index if self.chosen is None else int(self.chosen[index])

    def load(self, index: int, max_side: int | None = None) -> Image.Image:
        data = b""
        try:
            data = self.read(index)
            return decode(data, max_side)
        except UNREADABLE as error:
            raise UnreadableImageError(self.name(index), problem_of(data, error)[1]) from error

    def name(self, index: int) -> str:
        raise NotImplementedError

    def read(self, index: int) -> bytes:
        raise NotImplementedError

    def subset(self, indices: NDArray[np.int64]) -> Self:
        return replace(self, chosen=indices if self.chosen is None else self.chosen[indices])

    def fingerprint(self) -> str:
        return self.index.fingerprint if self.chosen is None else self.index.fingerprint_of(self.chosen)


@dataclass(frozen=True, eq=False)
class FolderSource(IndexedSource[FolderIndex]):
    """Images below a folder, in torchvision's order; labelled by the top folder of each image."""

    def name(self, index: int) -> str:
        return str(self.root / self.index.name(self.position(index)))

    def read(self, index: int) -> bytes:
        with open(self.name(index), "rb") as file:
            return file.read()

    def stats(self) -> NDArray[np.int64]:
        with ThreadPoolExecutor(STAT_THREADS) as threads:  # which wait for the disk together
            found = threads.map(self._stats_of, range(0, len(self), STAT_FILES))
            return np.concatenate([np.empty((0, 3), np.int64), *found])

    def _stats_of(self, start: int) -> NDArray[np.int64]:
        rows = np.full((min(STAT_FILES, len(self) - start), 3), -1, np.int64)
        for row in range(len(rows)):
            with suppress(OSError):
                stat = os.stat(self.name(start + row))
                rows[row] = stat.st_size, stat.st_mtime_ns, stat.st_ino % 2**63
        return rows
