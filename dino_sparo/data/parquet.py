"""Images in parquet files, read where they are through an index of them; pyarrow is needed.

A parquet file can only be read by row groups, of about a hundred images on the Hugging Face hub. In order
that is as quick as a folder; in a random order each image costs the reading of its whole group.
"""

import logging
import os
import shlex
from collections import OrderedDict
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dino_sparo.data.index import cached_index
from dino_sparo.data.packed import PackedIndex, PackedSource
from dino_sparo.data.parquet_files import Split, import_parquet, list_parquet, pack_parquet
from dino_sparo.data.shard_headers import State, state_of, states_of

log = logging.getLogger("dino_sparo")

OPEN_FILES = 128  # in each process
KEPT_BYTES = 2**26  # of row groups in each process, and one group at least
SLOW_BYTES = 2**20  # read for each image


class RowPlace(NamedTuple):
    """Where an image lies: in which file, as it was when it was indexed, and at which row of which group."""

    name: str
    path: str
    state: State
    column: str
    group: int
    row: int

    def read(self) -> bytes:
        """The image's file. Raises OSError: there is none, or the parquet file has changed or is damaged."""
        image = _row_groups.get(self.path, self.state, self.column, self.group)[self.row]
        data = image["bytes"].as_py() if image.is_valid else None
        if data is None:
            raise OSError("the row holds no image, or only its path")
        return data


class _RowGroups:
    """The row groups that were read last, as pyarrow.ChunkedArray of structs, up to so many bytes."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[str, State, str, int], Any] = OrderedDict()
        self.num_bytes = 0

    def get(self, path: str, state: State, column: str, group: int) -> Any:
        """The images of a row group. Raises OSError: it cannot be read."""
        import pyarrow as pa

        key = path, state, column, group
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        file = _opened(path, state)
        try:
            table = file.read_row_group(group, columns=[f"{column}.bytes"], use_threads=False)
        except (pa.ArrowException, OSError) as error:  # its messages have several lines
            raise OSError(f"the parquet file is damaged: {str(error).partition(chr(10))[0]}") from error
        images = self.kept[key] = table.column(column)
        self.num_bytes += images.nbytes
        while len(self.kept) > 1 and self.num_bytes > KEPT_BYTES:
            self.num_bytes -= self.kept.popitem(last=False)[1].nbytes
        return images


_row_groups = _RowGroups()  # of this process


@lru_cache(OPEN_FILES)
def _opened(path: str, state: State) -> Any:
    """A pyarrow.parquet.ParquetFile, which reads by offset, so that processes can share it."""
    if state_of(os.stat(path)) != state:
        raise OSError(f"{path} has changed since it was indexed")
    return import_parquet().ParquetFile(path, pre_buffer=False)


class ParquetIndex(PackedIndex):
    """Names, classes and places of the images of a split, read from a mapped file as a folder's are."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Map `file`, an intact index of parquet files that lies at `path`."""
        super().__init__(path, file)
        self.files: list[str] = self.header["files"]
        self.split: Split = self.header["split"]
        self._group_firsts, self._group_bytes = self.arrays["group_firsts"], self.arrays["group_bytes"]

    def place(self, root: Path, position: int) -> RowPlace:
        """Where an image lies. Raises IndexError for a position that is none."""
        position = range(len(self))[position]
        group = int(np.searchsorted(self._group_firsts, position, side="right")) - 1
        file = int(self.arrays["group_files"][group])
        path, (size, changed, _) = f"{root}/{self.files[file]}", self.states[file].tolist()
        return RowPlace(
            f"{path}, row {position - int(self._firsts[file])}",
            path,
            (size, changed),
            self.header["column"],
            int(self.arrays["group_numbers"][group]),
            position - int(self._group_firsts[group]),
        )

    def stats(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Mean size in bytes of the images of its row group, time of the last change in ns of its file, and
        row there (len(positions), 3)."""
        groups = np.searchsorted(self._group_firsts, positions, side="right") - 1
        sizes = self._group_bytes // np.maximum(1, np.diff(self._group_firsts, append=len(self)))
        files = self.arrays["group_files"][groups]
        changed = self.states[files, 1].astype(np.int64)
        return np.stack([sizes[groups], changed, positions - self._firsts[files]], axis=1)

    def is_current(self, root: Path) -> bool:
        """Whether the files are those that were indexed, by name, size and time."""
        states = self.states[:, :2].tolist()
        now = list_parquet(root, self.split)
        return now == self.files and list(map(list, states_of(root, now))) == states

    def bytes_in_random_order(self) -> int:
        """What is read for an image, in the mean, if its row group is not kept; 0 if all of them are."""
        rows = np.diff(self._group_firsts, append=len(self))
        fits = int(self._group_bytes.sum()) <= KEPT_BYTES
        return 0 if fits else int((rows * self._group_bytes).sum() // len(self))


class ParquetSource(PackedSource[ParquetIndex]):
    """Images in the parquet files of a split, in their order."""


def open_parquet(root: Path, split: Split) -> ParquetSource | None:
    """The images of a split in the parquet files of a folder; None if no file is of this split.

    Raises:
        UserFileNotFoundError: there is no image in them.
        UserError: pyarrow is missing, a file is damaged or has no images, or the index cannot be kept.
    """
    if not list_parquet(root, split):
        return None
    import_parquet()
    make = partial(pack_parquet, root, split)
    return ParquetSource.of_all(root, cached_index(ParquetIndex, root, f".{split}.parquet", make))


def warn_of_random_order(source: object) -> None:
    """Say, once a folder, that images are to be read in a random order from where that is slow."""
    if isinstance(source, ParquetSource) and source.index.bytes_in_random_order() > SLOW_BYTES:
        _warn(source.root, source.index.bytes_in_random_order())


@cache
def _warn(root: Path, num_bytes: int) -> None:
    log.warning(
        "WARNING: %s holds parquet files, where every image in a random order costs the reading of its whole "
        "row group (%.1f MB); dino-sparo shard %s --out OUT makes shards that are as quick as a folder",
        root,
        num_bytes / 1e6,
        shlex.quote(str(root)),
    )
