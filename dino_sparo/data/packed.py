"""Images that lie in larger files, read through an index: what `shards` and `parquet` have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dino_sparo.data.index import FolderIndex
from dino_sparo.data.indexed import IndexedSource


class Place(Protocol):
    """Where an image lies."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        ...

    def read(self) -> bytes:
        """The image's file. Raises OSError: it cannot be read, or what it lies in has changed."""
        ...


class PackedIndex(FolderIndex):
    """Names, classes and places of such images, read from a mapped file as those of a folder are."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Map `file`, an intact index that lies at `path`."""
        super().__init__(path, file)
        self._class_names = tuple(self.header["classes"])
        self._numbers, self._firsts = self.arrays["labels"], self.arrays["firsts"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by number; none if they are unknown."""
        return self._class_names

    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers (len(self),), made at each call; None if they are unknown."""
        return self._numbers.astype(np.int64) if self._class_names else None

    def place(self, root: Path, position: int) -> Place:
        """Where an image lies. Raises IndexError for a position that is none."""
        raise NotImplementedError

    def stats(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Three numbers for each image (len(positions), 3), in which others under its name would differ."""
        raise NotImplementedError


Packed = TypeVar("Packed", bound=PackedIndex)


@dataclass(frozen=True, eq=False)
class PackedSource(IndexedSource[Packed], Generic[Packed]):
    """Such images in the order of their index."""

    def place(self, index: int) -> Place:
        """Where an image lies."""
        return self.index.place(self.root, self.position(index))

    def name(self, index: int) -> str:
        return self.place(index).name

    def read(self, index: int) -> bytes:
        return self.place(index).read()

    def stats(self) -> NDArray[np.int64]:
        return self.index.stats(np.arange(len(self.index)) if self.chosen is None else self.chosen)
