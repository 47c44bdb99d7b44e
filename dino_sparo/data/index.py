"""An index of images, which is built once, stored in a file, and mapped by all processes.

Names are packed in the file, so a process stores no string per image. The index is valid until a folder
changes: adding, removing, or renaming an image changes the times of its folder, and replacing one in place
does not change its name. On a file system whose folders have no times, folders are walked every time.
"""

import hashlib
import json
import mmap
import os
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_sparo.data.decode import (
    AS_IS,
    Reading,
    UnreadableImageError,
    decode,
    decode_pixels,
    problem_of,
)
from dino_sparo.data.split_names import about_images, same_name
from dino_sparo.data.walk import EXTENSIONS, THREADS, Folder, named_by_ending, state_now, walk
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.files import atomic_write, cache_folder, open_regular, parsed_json, temporary_folder
from dino_sparo.terminal import log

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
MAGIC = b"dino_sparo index 1\n"  # contains the number of the format
ALIGNMENT = 64
STAT_THREADS, STAT_FILES = 16, 4096


class Index:
    """Names and classes of images in order, read from a mapped file.

    Forked processes share the mapping, and a pickle contains only the path of the file. `header` and `arrays`
    are those of `index_parts`; indexes of shards and tables contain more than those of folders.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Map `file`, an intact index with this path."""
        self.path = path
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        first = len(MAGIC) + 8
        end = first + int.from_bytes(mapped[first - 4 : first], "little")
        self.header: dict[str, Any] = parsed_json(mapped[first:end])
        self.arrays: dict[str, NDArray[Any]] = {
            name: np.frombuffer(mapped, dtype, count, _aligned(end) + offset)
            for name, (dtype, count, offset) in self.header["arrays"].items()
        }
        self.fingerprint: str = self.header["fingerprint"]
        self.num_loose: int = self.header["num_loose"]
        self.states = self.arrays["states"].reshape(-1, 3)
        self._names, self._starts = self.arrays["names"], self.arrays["starts"]
        if "shards" in self.header:  # may be beside shards, and written by somebody else
            _check_shards(self.header, self.arrays)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __reduce__(self) -> tuple:
        return _reopen, (self.path, self.fingerprint)

    def name(self, position: int) -> str:
        """Name of an image, relative to the folder. Raises IndexError: there is no such position."""
        return self._packed(range(len(self))[position]).decode("utf-8", "surrogateescape")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number; empty if they are unknown, as for images in the folder itself."""
        return tuple(self.header["classes"])

    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers (len(self),), computed at each call; None if they are unknown."""
        return self.arrays["labels"].astype(np.int64) if self.header["classes"] else None

    def fingerprint_of(self, positions: NDArray[np.int64]) -> str:
        """SHA-256 of the names at these positions joined by NUL; `fingerprint` is that of all."""
        digest = hashlib.sha256()
        for number, position in enumerate(positions.tolist()):
            digest.update(b"\0" * (number > 0) + self._packed(position))
        return digest.hexdigest()

    def _packed(self, position: int) -> bytes:
        return self._names[self._starts[position] : self._starts[position + 1] - 1].tobytes()


def open_index(root: Path, names: Sequence[str] = ()) -> Index:
    """The index of the images below `root`: the stored one if no folder has changed, else a new one.

    Args:
        names: folders in `root` that contain the images, if not all do; classes are the folders in these.

    Raises:
        UserFileNotFoundError: there is no image.
        UserError: a folder cannot be read, or the index cannot be stored.
    """
    ending = f"{key_of_names(names)}.index"
    return cached_index(root, ending, _folders_are_current, lambda: _pack(root, walk(root, names), names))


def key_of_names(names: Sequence[str]) -> str:
    """Part of the name of an index file, different for each split of a folder."""
    return f".{hashlib.sha256(os.fsencode(chr(0).join(names))).hexdigest()[:16]}" if names else ""


def _folders_are_current(index: Index, root: Path) -> bool:
    """Whether no folder below `root` has changed; reads the times of each, and lists none."""
    if not {"classes", "about"} <= index.header.keys():  # of an earlier version
        return False
    folders = index.arrays["folders"].tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]

    def unchanged(first: int) -> bool:
        return all(
            state_now(os.path.join(root, folders[i])) == tuple(index.states[i].tolist())
            for i in range(first, len(folders), THREADS)
        )

    with ThreadPoolExecutor(THREADS) as pool:
        return all(pool.map(unchanged, range(THREADS)))


def cached_index(
    root: Path, ending: str, is_current: Callable[[Index, Path], bool], make: Callable[[], list[bytes]]
) -> Index:
    """The stored index of `root` if it is current, else a new one from the parts that `make` returns.

    It is stored in `$DINO_SPARO_CACHE`, else in `dino_sparo` below `$XDG_CACHE_HOME` or `~/.cache`; if that
    is not writable, in this user's folder in the system's temporary folder. `ending` ends the file name.

    Raises:
        UserError: the index cannot be stored, or what `make` raises.
    """
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:32] + ending
    chosen, spare = cache_folder(), temporary_folder()
    for folder in (chosen, spare):
        index = current_index(folder / name, root, is_current)
        if index is not None:
            return index
    parts, refused = make(), []
    for folder in (chosen, spare):
        try:
            index = keep_index(folder / name, parts)
        except OSError as error:
            refused.append(f"{folder} ({error.strerror})")
            continue
        if refused:
            text = (
                "the index of images is stored in %s, since it cannot be stored in %s; set DINO_SPARO_CACHE"
            )
            log.warning(text, spare, refused[0])
        return index
    raise UserError(
        f"the index of images can be stored neither in {' nor in '.join(refused)}; set DINO_SPARO_CACHE to a "
        f"writable folder with {sum(map(len, parts)) / 1e6:.1f} MB of free space"
    )


def current_index(path: Path, root: Path, is_current: Callable[[Index, Path], bool]) -> Index | None:
    """The index in a file if it is intact and `root` has not changed since."""
    index = _open_intact(path)
    return index if index is not None and is_current(index, root) else None


def _open_intact(path: Path) -> Index | None:
    """The index in a file; None if there is none, or one that is damaged or of another format."""
    try:
        if path.parent == temporary_folder() and path.parent.lstat().st_uid != os.getuid():
            return None  # anybody can create a folder with this name
        with open_regular(path) as file:
            if file.read(len(MAGIC)) != MAGIC:
                return None
            stored = int.from_bytes(file.read(4), "little")
            checksum = 0
            while chunk := file.read(1 << 20):
                checksum = zlib.crc32(chunk, checksum)
            return Index(path, file) if checksum == stored else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _check_shards(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raises ValueError, LookupError, TypeError: the parts of an index of shards contradict each other."""
    lists = {name: header[name] for name in ("classes", "shards")} | {"about": header.get("about", [])}
    if not all(isinstance(listed, list) for listed in lists.values()):
        raise TypeError("wrong type")
    if not all(isinstance(one, str) for listed in lists.values() for one in listed):
        raise ValueError("a name is not a string")
    if not all(isinstance(header[name], kind) for name, kind in (("fingerprint", str), ("num_loose", int))):
        raise TypeError("wrong type")
    starts, labels, sizes = arrays["starts"], arrays["labels"], arrays["sizes"]
    firsts, num_images = arrays["firsts"], len(starts) - 1
    fits = (
        all(array.dtype.kind in "iu" for array in arrays.values())
        and num_images == len(sizes) == len(arrays["offsets"]) > 0
        and len(firsts) == len(lists["shards"]) == len(arrays["states"]) // 3
        and starts[0] == firsts[0] == 0
        and starts[-1] == len(arrays["names"]) + 1
        and firsts[-1] <= num_images
        and (starts[1:] > starts[:-1]).all()
        and (firsts[1:] >= firsts[:-1]).all()
        and (arrays["offsets"] >= 0).all()
        and len(labels) == (num_images if lists["classes"] else 0)
        and (not len(labels) or (labels.min() >= 0 and labels.max() < len(lists["classes"])))
    )
    if not fits:
        raise ValueError("arrays contradict each other")


def _reopen(path: Path, fingerprint: str) -> Index:
    """Unpickle an Index, in a data worker that was not forked."""
    index = _open_intact(path)
    if index is None or index.fingerprint != fingerprint:
        raise UserError(
            f"{path}: the index of images was removed or replaced while it was in use, since the images have "
            f"changed; run again"
        )
    return index


def keep_index(path: Path, parts: list[bytes]) -> Index:
    """Write an index and map it; processes that have mapped the old one still see that. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.writelines(parts)
        file.flush()
        return Index(path, file)


# --- Images that are listed in an index


@dataclass(frozen=True, eq=False)
class IndexedSource:
    """Images in the order of an index: an `ImageSource` without `name` and `read`.

    `chosen` are positions in the index of all images (None: all). `class_numbers` are the numbers in
    `classes` of the index's own classes, `reading` is how images are read.
    """

    root: Path
    index: Index
    classes: tuple[str, ...]
    class_numbers: NDArray[np.int64]
    chosen: NDArray[np.int64] | None = None
    reading: Reading = AS_IS

    @classmethod
    def of_all(cls, root: Path, index: Index) -> Self:
        """All images of an index, with its own classes; those whose names look alike are one class."""
        first: dict[str, str] = {}
        for name in index.classes:
            first.setdefault(same_name(name), name)
        numbers = {name: number for number, name in enumerate(first)}
        class_numbers = np.array([numbers[same_name(name)] for name in index.classes], np.int64)
        return cls(root, index, tuple(first.values()), class_numbers)

    def __len__(self) -> int:
        return len(self.index if self.chosen is None else self.chosen)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers of all images, computed each time; None if they are unknown."""
        labels = self.index.labels()
        if labels is None:
            return None
        return self.class_numbers[labels if self.chosen is None else labels[self.chosen]]

    def position(self, index: int) -> int:
        """Position of an image in the index."""
        return index if self.chosen is None else int(self.chosen[index])

    def load(self, index: int, max_side: int | None = None) -> Image.Image:
        return self._decoded(decode, index, max_side)

    def pixels(self, index: int, max_side: int | None = None) -> "Tensor":
        """The pixels of `load`, uint8 (height, width, 3), for workers. Raises UnreadableImageError."""
        return self._decoded(decode_pixels, index, max_side)

    def _decoded(self, by: Callable[[bytes, int | None, Reading], T], index: int, max_side: int | None) -> T:
        data = b""
        try:
            data = self.read(index)
            return by(data, max_side, self.reading)
        except Exception as error:  # a damaged file makes Pillow raise anything
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
class FolderSource(IndexedSource):
    """Images below a folder, in torchvision's order; labeled by the top folder of each image."""

    def name(self, index: int) -> str:
        return str(self.root / self.index.name(self.position(index)))

    def read(self, index: int) -> bytes:
        return self.reading.read_file(self.name(index))

    def stats(self) -> NDArray[np.int64]:
        with ThreadPoolExecutor(STAT_THREADS) as threads:  # which wait for the disk
            found = threads.map(self._stats_of, range(0, len(self), STAT_FILES))
            return np.concatenate([np.empty((0, 3), np.int64), *found])

    def _stats_of(self, start: int) -> NDArray[np.int64]:
        rows = np.full((min(STAT_FILES, len(self) - start), 3), -1, np.int64)
        for row in range(len(rows)):
            with suppress(OSError):
                stat = os.stat(self.name(start + row))
                rows[row] = stat.st_size, stat.st_mtime_ns, stat.st_ino % 2**63
        return rows


# --- The file: MAGIC, checksum of what follows, length of the header, header in JSON, arrays


def _pack(root: Path, folders: list[Folder], names: Sequence[str]) -> list[bytes]:
    """The parts of the file. Raises UserFileNotFoundError: there is no image."""
    level = 1 if names else 0

    def class_of(folder: Folder) -> str:
        return folder.below.split("/")[level]  # empty for the folder that contains the classes

    # As `torchvision.datasets.ImageFolder` sorts images: by class, then by folder, then by name.
    folders = sorted(folders, key=lambda folder: (class_of(folder), folder.below.rstrip("/")))
    full = [folder for folder in folders if folder.num_images]
    others: Counter[str] = Counter()
    for folder in folders:
        others.update(folder.others)
    if not full:
        where = next((folder.below for folder in folders if folder.others), "")
        there = f"there are only {named_by_ending(others)}" if others else "there are no files"
        raise UserFileNotFoundError(
            f"{root}: no images found; expected files ending in {' '.join(EXTENSIONS)}, directly or in "
            f"folders below; {there}{f' (first in {where})' if where else ''}"
        )
    about = (about_images("/".join(folder.below.split("/")[level:-1]), folder.names) for folder in full)
    num_loose = sum(folder.num_images for folder in full if not class_of(folder))
    names_of_full = [class_of(folder) for folder in full]
    classes = {} if num_loose else {name: n for n, name in enumerate(dict.fromkeys(names_of_full))}
    labels = [classes.get(name, 0) for name in names_of_full]
    return index_parts(
        root,
        b"\0".join(folder.names for folder in full),
        [folder.state for folder in folders],
        num_loose=num_loose,
        folders="".join(f"{folder.below}\0" for folder in folders),
        header={
            "classes": list(classes),
            "class_level": level,
            "others": others,
            "about": list(filter(None, about)),
        },
        arrays={"labels": np.repeat(np.array(labels, np.int32), [folder.num_images for folder in full])},
    )


def index_parts(
    root: Path,
    names: bytes,
    states: Sequence[tuple[int, int, int]],
    *,
    num_loose: int = 0,
    folders: str = "",
    header: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
) -> list[bytes]:
    """The parts of the file of an index of the images below `root`.

    Args:
        names: of the images in order, joined by NUL.
        states: of the folders or shards, to detect changes.
        num_loose: number of images in `root` itself; there are no classes then.
        folders: paths of the folders, each followed by NUL.
        header, arrays: `classes` (names) and `labels` (a class number per image), and what each kind of index
            adds.
    """
    ends = np.flatnonzero(np.frombuffer(names, np.uint8) == 0)
    arrays = {
        "names": np.frombuffer(names, np.uint8),
        "starts": np.concatenate([[0], ends + 1, [len(names) + 1]]),
        "folders": np.frombuffer(folders.encode("utf-8", "surrogateescape"), np.uint8),
        "states": np.array(states, np.uint64).ravel(),
    } | dict(arrays)
    header = {
        "root": os.path.realpath(root),
        "num_loose": num_loose,
        "fingerprint": hashlib.sha256(names).hexdigest(),
        **header,
        "arrays": (layout := {}),
    }
    offset = 0
    data: list[bytes] = []
    for name, array in arrays.items():
        layout[name] = (array.dtype.str, len(array), offset)
        size = _aligned(array.nbytes)
        data.append(array.tobytes().ljust(size, b"\0"))
        offset += size
    text = json.dumps(header).encode()
    first = len(MAGIC) + 8
    parts = [len(text).to_bytes(4, "little"), text.ljust(_aligned(first + len(text)) - first), *data]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return [MAGIC, checksum.to_bytes(4, "little"), *parts]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
