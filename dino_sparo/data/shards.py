"""Images in tar shards of webdataset's layout, read by offset from an index; nothing is unpacked.

A sample is a sequence of members with the same key: `KEY.jpg` (or another image format) and optionally
`KEY.cls` with its class; other members are ignored. A key with folders is the path of the image in the folder
that the shards were made from, and order, names, and classes are those of that folder.
"""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dino_sparo.data.imagenet import TRAIN_TAR, VAL_TAR, WNID_TAR
from dino_sparo.data.index import Index, IndexedSource, cached_index, current_index, index_parts, key_of_names
from dino_sparo.data.split_names import about_images, splits_of_folders
from dino_sparo.data.tars import tar_members
from dino_sparo.data.walk import (
    EXTENSIONS,
    PROBED_BELOW,
    PROBED_ENTRIES,
    THREADS,
    holds,
    is_image,
    list_folder,
    named_by_ending,
)
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.files import open_regular
from dino_sparo.terminal import shown, shows_bars

INDEX_FILE = "shards.index"  # beside the shards, written last by `dino-sparo shard`
RECORD = ".shards.json"  # beside the shards, written first by `dino-sparo shard`
PACKED = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tar.zst", ".tar.lz4")
OPEN_SHARDS = 128  # per process
PACKED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
LONGEST_CLASS = 256  # bytes

State = tuple[int, int]  # of a shard: size in bytes, time of its last change in ns


@lru_cache(OPEN_SHARDS)
def _opened(path: str, state: State) -> BinaryIO:
    """An open shard, closed when it is no longer used; processes can share it, since they read by offset."""
    file = open_regular(path, buffering=0)
    if state_of_file(os.fstat(file.fileno())) != state:
        raise OSError(f"{path} has changed since it was indexed")
    return file


@dataclass(frozen=True, eq=False)
class ShardSource(IndexedSource):
    """Images in the shards of a folder, in order."""

    def name(self, index: int) -> str:
        position = self.position(index)
        shard = self.index.header["shards"][self._rank(position, "firsts")]
        return f"{self.root}/{shard}: {self.index.name(position)}"

    def read(self, index: int) -> bytes:
        position, arrays = self.position(index), self.index.arrays
        number, size = self._rank(position, "firsts"), int(arrays["sizes"][position])
        if size < 0:
            raise OSError("the row contains no image, or only its path")
        path = os.path.join(self.root, self.index.header["shards"][number])
        shard = _opened(path, tuple(self.index.states[number, :2].tolist()))
        self.reading.check_size(size)
        data = os.pread(shard.fileno(), size, int(arrays["offsets"][position]))
        if len(data) < size:
            raise OSError("the shard ends within the image")
        return data

    def stats(self) -> NDArray[np.int64]:
        """Size in bytes, time of the last change in ns of its shard, and offset there (len(self), 3)."""
        arrays, chosen = self.index.arrays, slice(None) if self.chosen is None else self.chosen
        offsets, sizes = arrays["offsets"][chosen], arrays["sizes"][chosen]
        positions = np.arange(len(self.index))[chosen]
        numbers = np.searchsorted(arrays["firsts"], positions, side="right") - 1
        return np.stack([sizes, self.index.states[numbers, 1].astype(np.int64), offsets], axis=1)

    def _rank(self, position: int, firsts: str) -> int:
        """The shard or file of an image, from the array of the first position in each."""
        return int(np.searchsorted(self.index.arrays[firsts], position, side="right")) - 1


def open_shards(root: Path, names: Sequence[str] = ()) -> ShardSource:
    """The images in the shards of a folder, or in these shards of it; makes an index if none is current.

    The index of `dino-sparo shard` is beside the shards; others are stored as in `cached_index`.

    Raises:
        UserFileNotFoundError: there is no image in them.
        UserError: a shard is damaged, compressed, or cannot be read, or contains splits, or the index cannot
            be stored.
    """
    if (root / RECORD).exists() and not (root / INDEX_FILE).exists():
        raise UserError(
            f"{root}: not all shards are written yet; wait for `dino-sparo shard`, or run it again"
        )
    index = None if names else current_index(root / INDEX_FILE, root, shards_are_current)
    if index is None:
        make = partial(pack_shards, root, chosen=names)
        index = cached_index(root, f"{key_of_names(names)}.shards", shards_are_current, make)
    source = ShardSource.of_all(root, index)
    splits = splits_of_folders(source.classes)
    if "train" in splits and len(splits) > 1:
        raise UserError(
            f"{root}: the shards contain folders of splits ({', '.join(map(shown, source.classes[:4]))}), "
            f"which would become classes; unpack the shards, and give the folder"
        )
    return source


def holds_shards(folder: Path) -> bool:
    """Whether a folder contains shards, from some of its entries: tars, in it or one folder deeper, but no
    images beside them or in folders.

    Raises:
        UserError: its tars are compressed.
    """
    folders, files = list_folder(folder, PROBED_ENTRIES)
    if not files and folders:
        below = [list_folder(folder / name, PROBED_ENTRIES) for name in sorted(folders)[:PROBED_BELOW]]
        is_other = any(deeper or any(map(is_image, here)) for deeper, here in below)
        return not is_other and any(is_shard(name) for _, here in below for name in here)
    if holds(folder):
        return False
    packed = sorted(name for name in files if name.lower().endswith(PACKED))
    if packed and not packed[0].startswith("ILSVRC"):  # ImageNet's devkit is not a shard
        raise compressed(folder / packed[0])
    return any(map(is_shard, files))


def shards_are_current(index: Index, root: Path) -> bool:
    """Whether the shards are those that were indexed, by name, size and time."""
    shards = index.header.get("shards", [])
    chosen = index.header.get("chosen") and index.path.name != INDEX_FILE  # may be written by somebody else
    listed = chosen or list_shards(root) == shards
    return listed and has_states(root, shards, index.states[:, :2])


# --- Content of shards, from their headers


def list_shards(root: Path) -> list[str]:
    """Names of a folder's shards in order; if there are none, those one folder deeper.

    Raises UserError: a folder cannot be read.
    """
    folders, files = list_folder(root)
    return sorted(filter(is_shard, files)) or [
        f"{folder}/{name}"
        for folder in sorted(folders)
        for name in sorted(filter(is_shard, list_folder(root / folder)[1]))
    ]


def is_shard(name: str) -> bool:
    official = name in (TRAIN_TAR, VAL_TAR) or WNID_TAR.fullmatch(name)
    return name.endswith(".tar") and not name.startswith(".") and not official


def state_of_file(stat: os.stat_result) -> State:
    return stat.st_size, stat.st_mtime_ns


def states_of(root: Path, shards: Sequence[str]) -> list[State]:
    """Current states of shards; (0, 0) for a missing one."""

    def state(shard: str) -> State:
        with suppress(OSError):
            return state_of_file(os.stat(root / shard))
        return 0, 0

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(state, shards))


def has_states(root: Path, files: Sequence[str], states: NDArray[np.uint64]) -> bool:
    """Whether files still have the states (files, 2)."""
    return list(map(list, states_of(root, files))) == states.tolist()


def key_of(name: str) -> str:
    """A member's key, as in webdataset: its path up to the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def is_plain(name: str) -> bool:
    """Whether the file name is the key and the ending of an image, not something like `x.seg.png`."""
    return name[len(key_of(name)) :].lower() in EXTENSIONS


def compressed(path: Path) -> UserError:
    return UserError(
        f"{path} is compressed, so single images cannot be read from it; decompress it to a .tar, for "
        f"example with `gunzip`"
    )


class ImageOfShard(NamedTuple):
    """An image in a shard: name, offset and size in bytes, and the content of its .cls."""

    name: str
    offset: int
    size: int
    class_text: str | None


class Shard(NamedTuple):
    """The images of one shard: one entry per image, names joined by NUL."""

    names: bytes
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    classes: list[str | None]
    """Contents of their .cls."""

    @classmethod
    def of(cls, images: Sequence[ImageOfShard]) -> "Shard":
        """The images of a shard in order."""
        return cls(
            "\0".join(image.name for image in images).encode("utf-8", "surrogateescape"),
            np.array([image.offset for image in images], np.int64),
            np.array([image.size for image in images], np.int64),
            [image.class_text for image in images],
        )


def pack_shards(
    root: Path, known: Mapping[str, Shard] | None = None, chosen: Sequence[str] = ()
) -> list[bytes]:
    """The parts of an index file, from the headers of all or the chosen shards; those in `known`, by file
    name, are not read again.

    Raises:
        UserFileNotFoundError, UserError: as `open_shards`.
    """
    names = list(chosen) or list_shards(root)
    states = states_of(root, names)  # before reading, so that a later change is detected next time
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(lambda name: (known or {}).get(name) or read_shard(root, name), names)
        bar = tqdm(read, f"indexing {root}", len(names), unit="shard", leave=False, disable=not shows_bars())
        shards = list(bar)
    if not sum(len(shard.sizes) for shard in shards):
        raise UserFileNotFoundError(
            f"{root}: no images found in {len(names)} shards; expected members ending in "
            f"{' '.join(EXTENSIONS)}; {names[0]} contains {_endings(root / names[0])}"
        )
    packed = b"\0".join(shard.names for shard in shards if len(shard.sizes))
    paths = packed.decode("utf-8", "surrogateescape").split("\0")
    folders = [path.rpartition("/")[0] for path in paths]
    classes, labels = _classes(
        [folder.partition("/")[0] for folder in folders],
        [text for shard in shards for text in shard.classes],
    )
    return index_parts(
        root,
        packed,
        [(*state, 0) for state in states],
        header={
            "classes": classes,
            "shards": names,
            "chosen": bool(chosen),
            "about": list(filter(about_images, sorted(set(folders)))),
        },
        arrays={
            "offsets": np.concatenate([shard.offsets for shard in shards]),
            "sizes": np.concatenate([shard.sizes for shard in shards]),
            "labels": labels,
            "firsts": np.cumsum([0, *(len(shard.sizes) for shard in shards[:-1])]),
        },
    )


def _classes(folders: list[str], texts: list[str | None]) -> tuple[list[str], NDArray[np.int32]]:
    """Class names, and the class number of every image: by folder if the .cls agree or are missing, else by
    .cls; empty if neither is known for all images."""
    by_folder, by_text = "" not in folders, None not in texts
    if by_folder and by_text:
        of_folders = len(set(folders))
        by_folder = len(set(zip(folders, texts, strict=True))) == len(set(texts)) == of_folders
    known = folders if by_folder else [text or "" for text in texts] if by_text else []
    names = sorted(set(known))
    said = dict(zip(known, texts, strict=True)) if by_text and known else {}
    if said and all(text and text.isascii() and text.isdecimal() for text in said.values()):
        names.sort(key=lambda name: int(said[name] or 0))  # keep the order of numbered classes
    numbers = {name: number for number, name in enumerate(names)}
    return names, np.array([numbers[name] for name in known], np.int32)


def read_shard(root: Path, name: str) -> Shard:
    """The images of a shard. Raises UserError: it is damaged, compressed, or cannot be read."""
    path = root / name
    try:
        with open_regular(path) as file:
            if file.read(6).startswith(PACKED_STARTS):
                raise compressed(path)
            return Shard.of(list(_images(file)))
    except tarfile.TarError as error:
        raise UserError(
            f"{path}: the shard is damaged or incomplete ({error}); write or download it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: the shard cannot be read ({error.strerror}); change its permissions, or write it again"
        ) from error


def _endings(path: Path) -> str:
    """Numbers of members of a shard by ending, in words."""
    with open_regular(path) as file:
        endings = Counter(os.path.splitext(member.name)[1].lower() for member in tar_members(file))
    return named_by_ending(endings) or "no members"


def _images(file: BinaryIO) -> Iterator[ImageOfShard]:
    """The images of a tar."""
    for key, sample in groupby(tar_members(file), key=lambda member: key_of(member.name)):
        members = {member.name: member for member in sample}
        images = [name for name in members if is_image(name.rpartition("/")[2])]
        # Beside x.jpg, x.seg.png is not an image of its own; 12.30.jpg beside 12.31.jpg is.
        for name in [name for name in images if is_plain(name)] or images:
            text = members.get(f"{name.rpartition('.')[0]}.cls", members.get(f"{key}.cls"))
            class_text = None
            if text:
                said = os.pread(file.fileno(), min(text.size, LONGEST_CLASS), text.offset)
                class_text = said.decode("utf-8", "replace").strip()
            yield ImageOfShard(*members[name], class_text)
