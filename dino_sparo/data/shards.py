"""Images in tar shards of webdataset's layout, read by offset from an index; nothing is unpacked.

What counts as an image of theirs, and of which class, is decided in `shard_headers`.
"""

import os
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dino_sparo.data.imagenet import is_image
from dino_sparo.data.index import FolderIndex, cached_index, current_index
from dino_sparo.data.indexed import IndexedSource
from dino_sparo.data.shard_headers import (
    State,
    compressed,
    is_shard,
    list_shards,
    pack_shards,
    state_of,
    states_of,
)
from dino_sparo.errors import UserError

INDEX_FILE = "shards.index"  # beside the shards, written last by our command
RECORD = ".shards.json"  # beside the shards, written first by our command
PACKED = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tar.zst", ".tar.lz4")
PROBED_ENTRIES = 64  # a folder of a million images is not listed to see that it has no shards
OPEN_SHARDS = 128  # in each process


class Place(NamedTuple):
    """Where an image lies: in which shard, as it was when it was indexed, and at which bytes."""

    name: str
    path: str
    state: State
    offset: int
    size: int

    def read(self) -> bytes:
        """The image's file. Raises OSError: the shard is gone, has changed or cannot be read."""
        if self.size < 0:
            raise OSError("the row holds no image, or only its path")
        data = os.pread(_opened(self.path, self.state).descriptor, self.size, self.offset)
        if len(data) < self.size:
            raise OSError("the shard ends before the image does")
        return data


class _OpenShard:
    """A shard that is open until nobody uses it any more. Reading by offset, processes can share it."""

    def __init__(self, path: str, state: State) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)
        if state_of(os.fstat(self.descriptor)) != state:
            raise OSError(f"{path} has changed since it was indexed")

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


_opened = lru_cache(OPEN_SHARDS)(_OpenShard)


class ShardIndex(FolderIndex):
    """Names, classes and places of the images in shards, read from a mapped file as those of a folder are."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Map `file`, an intact index of shards that lies at `path`."""
        super().__init__(path, file)
        self.shards: list[str] = self.header["shards"]
        self._class_names = tuple(self.header["classes"])
        self._numbers, self._firsts = self.arrays["labels"], self.arrays["firsts"]
        self._offsets, self._sizes = self.arrays["offsets"], self.arrays["sizes"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by number; none if they are unknown."""
        return self._class_names

    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers (len(self),), made at each call; None if they are unknown."""
        return self._numbers.astype(np.int64) if self._class_names else None

    def place(self, root: Path, position: int) -> Place:
        """Where an image lies. Raises IndexError for a position that is none."""
        position = range(len(self))[position]
        number = int(np.searchsorted(self._firsts, position, side="right")) - 1
        size, changed, _ = self.states[number].tolist()
        return Place(
            self.place_name(root, position),
            os.path.join(root, self.shards[number]),
            (size, changed),
            int(self._offsets[position]),
            int(self._sizes[position]),
        )

    def place_name(self, root: Path, position: int) -> str:
        """What to call an image in a message."""
        number = int(np.searchsorted(self._firsts, position, side="right")) - 1
        return f"{root}/{self.shards[number]}: {self.name(position)}"

    def stats(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Size in bytes, time of the last change in ns of its shard, and offset there (len(positions), 3)."""
        numbers = np.searchsorted(self._firsts, positions, side="right") - 1
        changed = self.states[numbers, 1].astype(np.int64)
        return np.stack([self._sizes[positions], changed, self._offsets[positions]], axis=1)

    def is_current(self, root: Path) -> bool:
        """Whether the shards are those that were indexed, by name, size and time."""
        states = self.states[:, :2].tolist()
        return list_shards(root) == self.shards and list(map(list, states_of(root, self.shards))) == states


@dataclass(frozen=True, eq=False)
class ShardSource(IndexedSource[ShardIndex]):
    """Images in the shards of a folder, in their order."""

    def place(self, index: int) -> Place:
        """Where an image lies."""
        return self.index.place(self.root, self.position(index))

    def name(self, index: int) -> str:
        return self.place(index).name

    def read(self, index: int) -> bytes:
        return self.place(index).read()

    def stats(self) -> NDArray[np.int64]:
        return self.index.stats(np.arange(len(self.index)) if self.chosen is None else self.chosen)


def open_shards(root: Path) -> ShardSource:
    """The images in the shards of a folder; an index that is not there, or not up to date, is made and kept.

    Ours lies beside the shards; others are kept where those of folders are, see `open_index`.

    Raises:
        UserFileNotFoundError: there is no image in them.
        UserError: a shard is damaged, compressed or unreadable, or the index cannot be kept.
    """
    if (root / RECORD).exists() and not (root / INDEX_FILE).exists():
        raise UserError(f"{root}: not all shards are written yet; let `dino-sparo shard` do so first")
    index = current_index(ShardIndex, root / INDEX_FILE, root)
    if index is None:
        index = cached_index(ShardIndex, root, ".shards", partial(pack_shards, root))
    return ShardSource.of_all(root, index)


def holds_shards(folder: Path) -> bool:
    """Whether a folder is one of shards, by a look at some entries: tars, but neither images nor folders.

    Raises:
        UserError: its tars are compressed.
    """
    try:
        with os.scandir(folder) as scan:
            entries = list(
                islice((entry for entry in scan if not entry.name.startswith(".")), PROBED_ENTRIES)
            )
        if any(is_image(entry.name) or entry.is_dir() for entry in entries):
            return False
    except OSError:  # who opens the folder will say so
        return False
    packed = sorted(entry.name for entry in entries if entry.name.lower().endswith(PACKED))
    if packed and not packed[0].startswith("ILSVRC"):  # ImageNet's devkit is no shard
        raise compressed(folder / packed[0])
    return any(is_shard(entry.name) for entry in entries)


def is_finished(root: Path) -> bool:
    """Whether an index lies beside the shards and they are those that it was made of."""
    return current_index(ShardIndex, root / INDEX_FILE, root) is not None
