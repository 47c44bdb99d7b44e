"""CIFAR-10 and STL-10 by name: torchvision downloads them once; all processes map the array that is kept."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_sparo.data.decode import bounded
from dino_sparo.errors import UserError
from dino_sparo.files import cache_folder

log = logging.getLogger("dino_sparo")

NAMES = ("cifar10", "stl10")
STALLED_SECONDS = 60.0  # without a byte from the network
PIXELS, LABELS, ABOUT = "images.npy", "labels.npy", "set.json"
UNKNOWN = -1  # class of an unlabelled image
STL10_SHAPE = (3, 96, 96)  # of an image in its files: channels, columns, rows
AT_ONCE = 1000  # images

Part = Literal["pretrain", "train", "test"]


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Some images of such a set; pickled and forked without their pixels."""

    set_name: str
    folder: Path
    indices: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return f"{self.set_name} image {self.indices[index]}"

    def load(self, index: int, max_side: int | None = None) -> Image.Image:
        image = Image.fromarray(np.array(_mapped(self.folder)[self.indices[index]]))
        size = bounded(image.size, max_side)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

    def read(self, index: int) -> bytes:
        return b""

    def subset(self, indices: NDArray[np.int64]) -> "ArraySource":
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, indices=self.indices[indices], labels=labels)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"torchvision {self.set_name}".encode() + self.indices.tobytes()).hexdigest()

    def stats(self) -> NDArray[np.int64]:
        return np.zeros((len(self), 3), np.int64)


@lru_cache
def _mapped(folder: Path) -> NDArray[np.uint8]:
    """The pixels (N, height, width, 3) of a kept set, in the order train, unlabelled, test."""
    return np.load(folder / PIXELS, mmap_mode="r")


def open_set(name: str, part: Part) -> ArraySource:
    """The images of a set: `train` and `test` have labels, `pretrain` is train and all that have none.

    A set that is not there yet is downloaded and kept below `$DINO_SPARO_CACHE`, see `index.cached_index`.

    Raises:
        UserError: it cannot be downloaded or kept, or what is kept is damaged.
    """
    folder = _folder_of(name)
    try:
        about = json.loads((folder / ABOUT).read_text())
        labels, num_train = np.load(folder / LABELS), about["num_train"]
        num_test, classes = about["num_test"], tuple(about["classes"])
        if len(_mapped(folder)) != len(labels):
            raise ValueError("its parts do not fit together")
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"{folder}: what was kept of {name} is damaged ({reason}); remove this folder, and the same "
            f"command downloads it again"
        ) from error
    chosen = {
        "pretrain": np.arange(len(labels) - num_test),
        "train": np.arange(num_train),
        "test": np.arange(len(labels) - num_test, len(labels)),
    }[part]
    known = labels[chosen]
    return ArraySource(name, folder, chosen, None if (known == UNKNOWN).any() else known, classes)


def _place(name: str) -> Path:
    """Where a set is kept."""
    return cache_folder() / "torchvision" / name


def _folder_of(name: str) -> Path:
    """The folder of a set, which is filled first if it is not there; a second process waits for the first."""
    folder = _place(name)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(folder):
            if not folder.is_dir():
                _fill(name, folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder.parent}: {name} cannot be kept there ({error.strerror or error}); "
            f"set DINO_SPARO_CACHE to a folder that can be written and has {ROOM[name]} GB free"
        ) from error
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process fills this folder; where the file system has no locks nobody waits."""
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s: another process downloads it; waiting", folder.name)
                fcntl.flock(lock, fcntl.LOCK_EX)
            for left in folder.parent.glob(f"{folder.name}.*.part"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        except OSError:
            log.info("%s: the file system has no locks; do not start twice at once", folder.parent)
        yield


def _fill(name: str, folder: Path) -> None:
    """Download, convert, and give the folder its name when all is there.

    Raises:
        UserError: it cannot be downloaded.
        OSError: the disk refuses.
    """
    log.info("torchvision downloads %s (needs %s GB while it is unpacked) into %s", name, ROOM[name], folder)
    part = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=".part", dir=folder.parent))
    try:
        (part / "kept").mkdir()
        MAKERS[name](part / "unpacked", part / "kept")
        try:
            os.rename(part / "kept", folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, where there are no locks
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _download(name: str, url: str) -> Iterator[None]:
    """Make one sentence of what torchvision raises, and of a network that stalls."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED_SECONDS)
    try:
        yield
    except (OSError, HTTPException, RuntimeError, EOFError, ValueError, tarfile.TarError) as error:
        if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EACCES, EPERM, EROFS):
            raise  # the disk
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"{name} could not be downloaded from {urlsplit(url).hostname or url} ({reason}); run the "
            f"command once where there is a network, or copy {_place(name)} from a machine that has it"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _make_cifar10(unpacked: Path, kept: Path) -> None:
    from torchvision.datasets import CIFAR10

    with _download("cifar10", CIFAR10.url):
        train = CIFAR10(unpacked, train=True, download=True)
        test = CIFAR10(unpacked, train=False)
    labels = np.array([*train.targets, *test.targets], np.int64)
    _keep(kept, [train.data, test.data], labels, len(train), len(test), train.classes)


def _make_stl10(unpacked: Path, kept: Path) -> None:
    from torchvision.datasets import STL10

    with _download("stl10", STL10.url):
        test = STL10(unpacked, split="test", download=True)
        (unpacked / STL10.filename).unlink()  # 2.6 GB that are not needed any more
    files = unpacked / STL10.base_folder
    # Mapped, since torchvision would take 6 GB of memory for the unlabelled images.
    images = [
        np.memmap(files / f"{part}_X.bin", np.uint8, "r").reshape(-1, *STL10_SHAPE).transpose(0, 3, 2, 1)
        for part in ("train", "unlabeled", "test")
    ]
    num_train, num_unlabelled, num_test = map(len, images)
    labels = np.full(num_train + num_unlabelled + num_test, UNKNOWN, np.int64)
    for part, where in (("train", slice(num_train)), ("test", slice(num_train + num_unlabelled, None))):
        labels[where] = np.fromfile(files / f"{part}_y.bin", np.uint8).astype(np.int64) - 1  # from 0
    _keep(kept, images, labels, num_train, num_test, test.classes)


def _keep(
    folder: Path,
    images: list[NDArray[np.uint8]],
    labels: NDArray[np.int64],
    num_train: int,
    num_test: int,
    classes: list[str],
) -> None:
    """Write images (n, height, width, 3), one array after the other, and what is known of them."""
    kept = np.lib.format.open_memmap(
        folder / PIXELS, "w+", np.uint8, (sum(map(len, images)), *images[0].shape[1:])
    )
    first = 0
    for array in images:
        for start in range(0, len(array), AT_ONCE):
            some = array[start : start + AT_ONCE]
            kept[first : first + len(some)] = some
            first += len(some)
    kept.flush()
    np.save(folder / LABELS, labels)
    about = {"classes": classes, "num_train": num_train, "num_test": num_test}
    (folder / ABOUT).write_text(json.dumps(about))


MAKERS: dict[str, Callable[[Path, Path], None]] = {"cifar10": _make_cifar10, "stl10": _make_stl10}
ROOM = {"cifar10": 0.6, "stl10": 6.3}  # GB, while it is unpacked
