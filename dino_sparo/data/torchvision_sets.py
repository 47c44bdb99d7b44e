"""CIFAR-10 and STL-10 by name: torchvision downloads and unpacks them once, for all processes."""

import shutil
import socket
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from dino_sparo.data.decode import bounded
from dino_sparo.data.shapes import NumberedImages
from dino_sparo.files import cache_folder, read_as
from dino_sparo.terminal import log

ROOM = {"cifar10": 0.4, "stl10": 5.8}  # GB for archive and files
NAMES = tuple(ROOM)
STALLED_SECONDS = 60.0  # without a byte from the network
NO_LABEL = -1
STL10_SHAPE = (3, 96, 96)  # of an image in its files: channels, columns, rows

Part = Literal["pretrain", "train", "test"]


@dataclass(frozen=True, eq=False)
class ArraySource(NumberedImages):
    """Images of a dataset, by number over train, unlabeled, and test images; pickled without pixels."""

    set_name: str
    folder: Path

    def load(self, index: int, max_side: int | None = None) -> Image.Image:
        number = int(self.indices[index])
        for images in _opened(self.set_name, self.folder)[0]:
            if number < len(images):
                break
            number -= len(images)
        image = Image.fromarray(np.array(images[number]))
        size = bounded(image.size, max_side)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def open_set(name: str, part: Part) -> ArraySource:
    """The images of a dataset: `train` and `test` have labels, `pretrain` is train and all unlabeled images.

    The first time, it is downloaded and stored below `$DINO_SPARO_CACHE`, see `index.cached_index`.

    Raises:
        UserError: it cannot be downloaded or stored, or the stored files are damaged.
    """
    folder = cache_folder() / "torchvision" / _torchvision(name).base_folder
    with read_as(
        f"{name} cannot be downloaded from {urlsplit(_torchvision(name).url).hostname} or stored",
        f"run the command once with a network and {ROOM[name]} GB of free space in {folder.parent}, set "
        f"DINO_SPARO_CACHE to another folder, or copy {folder} from a machine that has it",
    ):
        if not folder.is_dir():
            folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(folder.with_name(f"{folder.name}.lock")):
                if not folder.is_dir():  # another process may have downloaded it
                    _download(name, folder)
    remedy = "remove this folder, and the same command downloads it again"
    with read_as(f"{folder}: the stored {name} is damaged", remedy):
        images, labels, classes = _opened(name, folder)
    num_train, num_unlabeled, _ = map(len, images)
    ends = {"pretrain": num_train + num_unlabeled, "train": num_train, "test": len(labels)}
    indices = np.arange(num_train + num_unlabeled if part == "test" else 0, ends[part])
    known = labels[indices]
    return ArraySource(
        kind=f"{name} image",
        key=f"torchvision {name}",
        no_files="torchvision has verified their checksum",
        indices=indices,
        labels=None if (known == NO_LABEL).any() else known,
        classes=classes,
        set_name=name,
        folder=folder,
    )


def _torchvision(name: str) -> Any:
    """torchvision's class of a dataset."""
    from torchvision.datasets import CIFAR10, STL10

    return {"cifar10": CIFAR10, "stl10": STL10}[name]


def _download(name: str, folder: Path) -> None:
    """Let torchvision download and unpack a dataset beside `folder`, then rename it to `folder`."""
    log.info("torchvision downloads %s (needs %s GB while it is unpacked) into %s", name, ROOM[name], folder)
    part = folder.with_name(f"{folder.name}.part")
    before = socket.getdefaulttimeout()
    try:
        shutil.rmtree(part, ignore_errors=True)  # left by a killed process
        socket.setdefaulttimeout(STALLED_SECONDS)
        _torchvision(name)(part, **({"split": "test"} if name == "stl10" else {}), download=True)
        (part / folder.name).rename(folder)
    finally:
        socket.setdefaulttimeout(before)
        shutil.rmtree(part, ignore_errors=True)


@lru_cache
def _opened(name: str, folder: Path) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64], tuple[str, ...]]:
    """A dataset that torchvision has unpacked, in memory or mapped: images (n, height, width, 3) of train,
    unlabeled, and test; labels of all images; class names."""
    if name == "cifar10":
        train, test = (_torchvision(name)(folder.parent, train=is_train) for is_train in (True, False))
        labels = np.array([*train.targets, *test.targets], np.int64)
        return [train.data, train.data[:0], test.data], labels, tuple(train.classes)
    # Mapped, since torchvision would need 6 GB of memory for the unlabeled images.
    images = [
        np.memmap(folder / f"{part}_X.bin", np.uint8, "r").reshape(-1, *STL10_SHAPE).transpose(0, 3, 2, 1)
        for part in ("train", "unlabeled", "test")
    ]
    of_train, of_test = (np.fromfile(folder / f"{part}_y.bin", np.uint8) for part in ("train", "test"))
    if (len(of_train), len(of_test)) != (len(images[0]), len(images[2])):
        raise ValueError("numbers of images and labels differ")
    labels = np.concatenate([of_train, np.zeros(len(images[1]), np.uint8), of_test]).astype(np.int64)
    return images, labels - 1, tuple((folder / "class_names.txt").read_text().splitlines())
