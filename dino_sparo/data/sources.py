"""Where images come from: folders (labelled by class folder or flat) and generated pictures."""

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_sparo.data.decode import decode
from dino_sparo.data.imagenet import explain, recognise, training_folder
from dino_sparo.data.index import FolderIndex, open_index
from dino_sparo.data.shapes import FACTORS, draw_factors, draw_picture
from dino_sparo.errors import UserError, UserFileNotFoundError

log = logging.getLogger("dino_sparo")

SHAPES = "shapes"
SHAPES_SIZES = {"train": 4000, "val": 1000}
STAT_THREADS, STAT_FILES = 16, 4096
HELD_OUT_EVERY = 5  # without a val folder every fifth image is held out


class ImageSource(Protocol):
    """A numbered list of images, with labels where they are known."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers of all images, None where they are unknown."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        ...

    def load(self, index: int, max_side: int | None = None) -> Image.Image:
        """The image in RGB, reduced if a side is longer than `max_side`.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        ...

    def read(self, index: int) -> bytes:
        """The image's file as it is; empty where pictures are drawn. Raises OSError."""
        ...

    def subset(self, indices: NDArray[np.int64]) -> "ImageSource":
        """The same source with these images only."""
        ...

    def fingerprint(self) -> str:
        """A hash of which images there are and in which order, whatever folder they lie in."""
        ...

    def stats(self) -> NDArray[np.int64]:
        """Size in bytes, time of the last change in ns and inode of each image's file, (num_images, 3).

        Other pixels under the same name differ in them; zeros where pictures are drawn, -1 for a lost file.
        """
        ...


@dataclass(frozen=True, eq=False)
class FolderSource:
    """Images below a folder, in torchvision's order; labelled by the top folder of each image.

    It holds no names, only the index of all images and the positions in it of those chosen (None: of all).
    `class_numbers` are the numbers in `classes` of the index's own classes.
    """

    root: Path
    index: FolderIndex
    classes: tuple[str, ...]
    class_numbers: NDArray[np.int64]
    chosen: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.index if self.chosen is None else self.chosen)

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers of all images, made anew each time; None if images are not in class folders."""
        labels = self.index.labels()
        if labels is None:
            return None
        return self.class_numbers[labels if self.chosen is None else labels[self.chosen]]

    def name(self, index: int) -> str:
        return str(self.root / self.index.name(index if self.chosen is None else int(self.chosen[index])))

    def load(self, index: int, max_side: int | None = None) -> Image.Image:
        return decode(self.read(index), max_side)

    def read(self, index: int) -> bytes:
        with open(self.name(index), "rb") as file:
            return file.read()

    def subset(self, indices: NDArray[np.int64]) -> "FolderSource":
        return replace(self, chosen=indices if self.chosen is None else self.chosen[indices])

    def fingerprint(self) -> str:
        return self.index.fingerprint if self.chosen is None else self.index.fingerprint_of(self.chosen)

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


@dataclass(frozen=True)
class ShapesSource:
    """Pictures drawn on demand; the label is one factor of the main object."""

    seed: int
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...] = FACTORS["colour"]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return f"generated picture {self.indices[index]}"

    def load(self, index: int, max_side: int | None = None) -> Image.Image:
        return draw_picture(self.seed, int(self.indices[index]))

    def read(self, index: int) -> bytes:
        return b""

    def subset(self, indices: NDArray[np.int64]) -> "ShapesSource":
        return ShapesSource(self.seed, self.indices[indices], self.labels[indices], self.classes)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"shapes {self.seed}".encode() + self.indices.tobytes()).hexdigest()

    def stats(self) -> NDArray[np.int64]:
        return np.zeros((len(self), 3), np.int64)


def open_images(path: str, max_images: int | None = None) -> ImageSource:
    """The images to pretrain on: of `path/train` if there is one, of Kaggle's train, else of `path`.

    Raises:
        UserFileNotFoundError: no such folder, or no image in it.
    """
    source: ImageSource
    if path == SHAPES:
        source = shapes_source("train")
    else:
        folder = _train_folder(path, "data.path")
        if folder == Path(path) and (folder / "val").is_dir():  # its images would be learnt from too
            raise UserError(
                f"data.path {path!r} has a val folder, but no train folder; expected train/<class>/<image>; "
                f"move the images to train on into {folder / 'train'}"
            )
        try:
            source = _open_folder(folder)
        except UserFileNotFoundError as error:  # the images may lie in tars
            raise UserFileNotFoundError(_explained(path) or str(error)) from error
    if max_images is not None and max_images < len(source):
        source = source.subset(np.linspace(0, len(source) - 1, max_images).round().astype(np.int64))
    return source


def open_val(path: str) -> ImageSource | None:
    """The validation images of a folder, labelled by their own class folders or not at all; None without."""
    if path == SHAPES:
        return shapes_source("val")
    try:
        val = recognise(Path(path)).val
    except UserFileNotFoundError:
        return None
    return _open_folder(val.path) if val and val.is_readable and val.path != Path(path) else None


def open_labelled(path: str, key: str = "data.path") -> tuple[ImageSource, ImageSource]:
    """Labelled images for evaluation: gallery and test images, with the same classes.

    `path/train` and `path/val`; without a val folder every fifth image is held out for testing. `key` is
    the option that an error about the path names.

    Raises:
        UserFileNotFoundError: no such folder, or no image in it.
        UserError: images are not in class folders, or val has a class that train lacks.
    """
    if path == SHAPES:
        return shapes_source("train"), shapes_source("val")
    train_folder = _train_folder(path, key)
    explained = _explained(path)
    if explained:
        raise UserError(explained)
    train = _open_folder(train_folder)
    if train.labels is None:
        raise UserError(
            f"{train.root}: the images are not in class folders; expected {train.root}/<class>/<image>. With "
            f"a list of their classes `dino-sparo prepare {path} --out OUT --labels FILE` makes them"
        )
    _warn_of_empty_classes(train)
    val_folder = Path(path) / "val"
    if not val_folder.is_dir():
        held_out = np.arange(len(train)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        return train.subset(np.flatnonzero(~held_out)), train.subset(np.flatnonzero(held_out))
    if train.root == Path(path):  # its images would be in the gallery too, as a class named val
        raise UserError(f"{path}: there is a val folder, but no train folder; expected train/<class>/<image>")
    val = _open_folder(val_folder)
    if val.labels is None:
        raise UserError(
            f"{val.root}: the images are not in class folders; expected {val.root}/<class>/<image>"
        )
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        problem = "has no image" if (train.root / unknown[0]).is_dir() else "does not exist"
        raise UserError(
            f"{val.root}: class folder {unknown[0]!r} {problem} in {train.root}; "
            f"both need the same classes ({len(unknown)} unknown)"
        )
    _warn_of_empty_classes(val)
    to_train = np.array([train.classes.index(name) for name in val.classes], dtype=np.int64)
    return train, replace(val, classes=train.classes, class_numbers=to_train)


def _warn_of_empty_classes(source: FolderSource) -> None:
    """A class folder without an image is no class; it may have been meant to be one."""
    folders = sorted(entry.name for entry in os.scandir(source.root) if entry.is_dir())
    empty = [name for name in folders if name not in source.classes and not name.startswith(".")]
    if empty:
        log.warning("WARNING: %s: %d class folders have no image (%s ...)", source.root, len(empty), empty[0])


def per_class(source: ImageSource, images_per_class: int) -> ImageSource:
    """At most so many images of every class, evenly spread over the class."""
    labels = source.labels
    assert labels is not None
    by_class = np.argsort(labels, kind="stable")
    firsts = np.searchsorted(labels[by_class], np.arange(1, len(source.classes)))
    chosen = []
    for members in np.split(by_class, firsts):
        spread = np.linspace(0, len(members) - 1, min(images_per_class, len(members)))
        chosen.append(members[spread.round().astype(np.int64)])
    return source.subset(np.sort(np.concatenate(chosen)))


def shapes_source(split: str) -> ShapesSource:
    """The generated pictures of a split, labelled by the main object's colour."""
    first = 0 if split == "train" else SHAPES_SIZES["train"]
    indices = np.arange(first, first + SHAPES_SIZES[split])
    labels = np.array([draw_factors(0, int(i)).colour for i in indices], dtype=np.int64)
    return ShapesSource(0, indices, labels)


def _train_folder(path: str, key: str) -> Path:
    root = Path(path)
    if not root.exists():
        raise UserFileNotFoundError(f"{key} {path!r} does not exist; give an existing folder of images")
    if not root.is_dir():
        raise UserFileNotFoundError(f"{key} {path!r} is a file; give the folder that holds the images")
    return root / "train" if (root / "train").is_dir() else training_folder(root) or root


def _explained(path: str) -> str:
    """What to do about a layout of ImageNet that is not usable as it is; empty if there is nothing to say."""
    try:
        return explain(recognise(Path(path)))
    except UserFileNotFoundError:
        return ""


def _open_folder(root: Path) -> FolderSource:
    index = open_index(root)
    if 0 < index.num_loose < len(index):
        _warn_of_loose_images(root, index.name(0))
    return FolderSource(root, index, index.classes, np.arange(len(index.classes)))


@cache  # said once a process and folder, however often that is opened
def _warn_of_loose_images(root: Path, example: str) -> None:
    log.warning("%s holds images (%s) beside folders of images; all are taken, without labels", root, example)
