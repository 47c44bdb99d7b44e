"""Where images come from: folders (labelled by class folder or flat), shards and generated pictures."""

import hashlib
import logging
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_sparo.data.imagenet import explain, recognise, training_folder
from dino_sparo.data.index import open_index
from dino_sparo.data.indexed import FolderSource
from dino_sparo.data.shapes import FACTORS, draw_factors, draw_picture
from dino_sparo.data.shards import ShardSource, holds_shards, open_shards
from dino_sparo.errors import UserError, UserFileNotFoundError

log = logging.getLogger("dino_sparo")

SHAPES = "shapes"
SHAPES_SIZES = {"train": 4000, "val": 1000}
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


def open_folder(root: Path) -> FolderSource | ShardSource:
    """The images in the shards of a folder if it holds shards, else those in files below it.

    Raises:
        UserFileNotFoundError: there is no image.
        UserError: a folder or shard cannot be read, or the index cannot be kept.
    """
    if holds_shards(root):
        return open_shards(root)
    index = open_index(root)
    if 0 < index.num_loose < len(index):
        _warn_of_loose_images(root, index.name(0))
    return FolderSource.of_all(root, index)


def open_images(path: str, max_images: int | None = None, key: str = "data.path") -> ImageSource:
    """The images to pretrain on: of `path/train` if there is one, of Kaggle's train, else of `path`.

    `key` is the option that an error about the path names.

    Raises:
        UserFileNotFoundError: no such folder, or no image in it.
    """
    source: ImageSource
    if path == SHAPES:
        source = shapes_source("train")
    else:
        folder = _train_folder(path, key)
        if folder == Path(path) and (folder / "val").is_dir():  # its images would be learnt from too
            raise UserError(
                f"{key} {path!r} has a val folder, but no train folder; expected train/<class>/<image>; "
                f"move the images to train on into {folder / 'train'}"
            )
        try:
            source = open_folder(folder)
        except UserFileNotFoundError as error:  # the images may lie in tars
            raise UserFileNotFoundError(_explained(path) or str(error)) from error
    if max_images is not None and max_images < len(source):
        source = source.subset(np.linspace(0, len(source) - 1, max_images).round().astype(np.int64))
    return source


def open_val(path: str) -> ImageSource | None:
    """The validation images of a folder, labelled by their own class folders or not at all; None without."""
    if path == SHAPES:
        return shapes_source("val")
    if holds_shards(Path(path) / "val"):
        return open_folder(Path(path) / "val")
    try:
        val = recognise(Path(path)).val
    except UserFileNotFoundError:
        return None
    return open_folder(val.path) if val and val.is_readable and val.path != Path(path) else None


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
    train = open_folder(train_folder)
    if train.labels is None:
        raise unlabelled(
            train,
            f". With a list of their classes `dino-sparo prepare {path} --out OUT --labels FILE` makes them",
        )
    _warn_of_empty_classes(train)
    val_folder = Path(path) / "val"
    if not val_folder.is_dir():
        held_out = np.arange(len(train)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        return train.subset(np.flatnonzero(~held_out)), train.subset(np.flatnonzero(held_out))
    if train.root == Path(path):  # its images would be in the gallery too, as a class named val
        raise UserError(f"{path}: there is a val folder, but no train folder; expected train/<class>/<image>")
    val = open_folder(val_folder)
    if val.labels is None:
        raise unlabelled(val)
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


def unlabelled(source: FolderSource | ShardSource, remedy: str = "") -> UserError:
    """The error about images of a folder or of shards whose classes are needed and unknown."""
    if isinstance(source, ShardSource):
        return UserError(
            f"{source.root}: not every image of these shards has a class; expected KEY.cls beside "
            f"each image, as `dino-sparo shard` writes it for images in class folders"
        )
    return UserError(
        f"{source.root}: the images are not in class folders; expected {source.root}/<class>/<image>{remedy}"
    )


def _warn_of_empty_classes(source: FolderSource | ShardSource) -> None:
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


@cache  # said once a process and folder, however often that is opened
def _warn_of_loose_images(root: Path, example: str) -> None:
    log.warning("%s holds images (%s) beside folders of images; all are taken, without labels", root, example)
