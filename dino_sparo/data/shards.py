"""Images in tar shards of webdataset's layout, read by offset from an index; nothing is unpacked.

A sample is a run of members of one key: `KEY.jpg` (or another kind of image) and, where it is known,
`KEY.cls` with its class; other members are ignored. A key that lies in folders is the path of the image in
the folder that the shards were made of, so that order, names and classes are those of that folder.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dino_sparo.data.imagenet import TRAIN_TAR, VAL_TAR, WNID_TAR, is_image
from dino_sparo.data.index import FolderIndex, IndexedSource, cached_index, current_index, index_parts
from dino_sparo.data.tars import tar_members
from dino_sparo.data.walk import EXTENSIONS, THREADS
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.terminal import shows_bars

INDEX_FILE = "shards.index"  # beside the shards, written last by our command
RECORD = ".shards.json"  # beside the shards, written first by our command
PACKED = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tar.zst", ".tar.lz4")
PROBED_ENTRIES = 64  # a folder of a million images is not listed to see that it has no shards
OPEN_SHARDS = 128  # in each process
PACKED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
LONGEST_CLASS = 256  # bytes

State = tuple[int, int]  # of a shard: size in bytes, time of the last change in ns


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


# --- What is in shards, by their headers


def list_shards(root: Path) -> list[str]:
    """File names of a folder's shards, in order. Raises UserError if the folder cannot be read."""
    try:
        return sorted(name for name in os.listdir(root) if is_shard(name))
    except OSError as error:
        raise UserError(f"{root}: the folder cannot be read ({error.strerror}); mend its rights") from error


def is_shard(name: str) -> bool:
    official = name in (TRAIN_TAR, VAL_TAR) or WNID_TAR.fullmatch(name)
    return name.endswith(".tar") and not name.startswith(".") and not official


def state_of(stat: os.stat_result) -> State:
    return stat.st_size, stat.st_mtime_ns


def states_of(root: Path, shards: Sequence[str]) -> list[State]:
    """The present states of shards; of one that is gone, what no shard has."""

    def state(shard: str) -> State:
        with suppress(OSError):
            return state_of(os.stat(root / shard))
        return 0, 0

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(state, shards))


def key_of(name: str) -> str:
    """A member's key, as webdataset takes it: its path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def is_plain(name: str) -> bool:
    """Whether the file name is the key and the kind of image, not something like `x.seg.png`."""
    return name[len(key_of(name)) :].lower() in EXTENSIONS


def compressed(path: Path) -> UserError:
    return UserError(
        f"{path} is compressed, so that images in it cannot be read by themselves; unpack the compression "
        f"alone, as `gunzip` does, and keep the .tar"
    )


class ImageOfShard(NamedTuple):
    """An image in a shard: where its bytes are, and what its .cls says."""

    name: str
    offset: int
    size: int
    class_text: str | None


class Shard(NamedTuple):
    """The images of one shard: one entry each, names joined by NUL."""

    names: bytes
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    folders: list[str]
    """Their top folders, "" for none."""
    classes: list[str | None]
    """What their .cls say."""

    @classmethod
    def of(cls, images: Sequence[ImageOfShard]) -> "Shard":
        """The images of a shard in its order."""
        names = [image.name for image in images]
        return cls(
            "\0".join(names).encode("utf-8", "surrogateescape"),
            np.array([image.offset for image in images], np.int64),
            np.array([image.size for image in images], np.int64),
            [name.partition("/")[0] if "/" in name else "" for name in names],
            [image.class_text for image in images],
        )


def pack_shards(root: Path, known: Mapping[str, Shard] | None = None) -> list[bytes]:
    """The parts of an index file, from the headers of all shards but those `known` by their file's name.

    Raises:
        UserFileNotFoundError, UserError: as `open_shards`.
    """
    names = list_shards(root)
    states = states_of(root, names)  # before they are read: a change after that is seen the next time
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(lambda name: (known or {}).get(name) or read_shard(root, name), names)
        bar = tqdm(read, f"indexing {root}", len(names), unit="shard", leave=False, disable=not shows_bars())
        shards = list(bar)
    counts = [len(shard.offsets) for shard in shards]
    if not sum(counts):
        raise UserFileNotFoundError(
            f"{root}: no images found in {len(names)} shards; expected members ending in "
            f"{' '.join(EXTENSIONS)}"
        )
    packed = b"\0".join(shard.names for shard in shards if len(shard.offsets))
    ends = np.flatnonzero(np.frombuffer(packed, np.uint8) == 0)
    classes, labels = _classes(
        [folder for shard in shards for folder in shard.folders],
        [text for shard in shards for text in shard.classes],
    )
    return index_parts(
        {
            "root": os.path.realpath(root),  # for people
            "num_loose": 0,
            "fingerprint": hashlib.sha256(packed).hexdigest(),
            "classes": classes,
            "shards": names,
        },
        {
            "names": np.frombuffer(packed, np.uint8),
            "starts": np.concatenate([[0], ends + 1, [len(packed) + 1]]),
            "class_starts": np.zeros(1, np.int64),
            "folders": np.empty(0, np.uint8),
            "states": np.array([(*state, 0) for state in states], np.uint64).ravel(),
            "offsets": np.concatenate([shard.offsets for shard in shards]),
            "sizes": np.concatenate([shard.sizes for shard in shards]),
            "labels": labels,
            "firsts": np.cumsum([0, *counts[:-1]]),
        },
    )


def _classes(folders: list[str], texts: list[str | None]) -> tuple[list[str], NDArray[np.int32]]:
    """Class names and the class number of every image: by folder, if .cls say the same or nothing, else by
    .cls; none if neither is known of all."""
    by_folder, by_text = "" not in folders, None not in texts
    if by_folder and by_text:
        of_folders = len(set(folders))
        by_folder = len(set(zip(folders, texts, strict=True))) == len(set(texts)) == of_folders
    known = folders if by_folder else [text or "" for text in texts] if by_text else []
    names = sorted(set(known))
    said = dict(zip(known, texts, strict=True)) if by_text and known else {}
    if said and all(text and text.isascii() and text.isdecimal() for text in said.values()):
        names.sort(key=lambda name: int(said[name] or 0))  # sets with an order of their own keep it
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[name] for name in known], np.int32)


def read_shard(root: Path, name: str) -> Shard:
    """The images of a shard. Raises UserError: it is damaged, compressed or cannot be read."""
    path = root / name
    try:
        with open(path, "rb") as file:
            if file.read(6).startswith(PACKED_STARTS):
                raise compressed(path)
            return Shard.of(list(_images(file)))
    except tarfile.TarError as error:
        raise UserError(
            f"{path}: the shard is damaged or incomplete ({error}); write or download it again"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: the shard cannot be read ({error.strerror}); repair it") from error


def _images(file: BinaryIO) -> Iterator[ImageOfShard]:
    """The images of a tar."""
    for key, sample in groupby(tar_members(file), key=lambda member: key_of(member.name)):
        members = {member.name: member for member in sample}
        images = [name for name in members if is_image(name.rpartition("/")[2])]
        # Beside x.jpg, x.seg.png is no image of its own; 12.30.jpg beside 12.31.jpg is.
        for name in [name for name in images if is_plain(name)] or images:
            text = members.get(f"{name.rpartition('.')[0]}.cls", members.get(f"{key}.cls"))
            class_text = _class_text(file, text.offset, text.size) if text else None
            yield ImageOfShard(*members[name], class_text)


def _class_text(file: BinaryIO, offset: int, size: int) -> str:
    return os.pread(file.fileno(), min(size, LONGEST_CLASS), offset).decode("utf-8", "replace").strip()
