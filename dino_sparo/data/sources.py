"""Where images come from: folders (labeled by class folder or flat), shards, parquet files, sets by name and
generated pictures."""

import logging
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_sparo.data.generated import SHAPES, shapes_source
from dino_sparo.data.imagenet import explain, recognize, training_folder
from dino_sparo.data.index import FolderSource, open_index
from dino_sparo.data.shards import ShardSource, holds_shards, open_shards
from dino_sparo.data.tables import HUB, Split, TableSource, holds_tables, open_hub, open_tables
from dino_sparo.data.torchvision_sets import NAMES, Part, open_set
from dino_sparo.data.walk import list_folder
from dino_sparo.errors import UnlabeledError, UserError, UserFileNotFoundError

log = logging.getLogger("dino_sparo")

OnDisk = FolderSource | ShardSource | TableSource
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
            UnreadableImageError: it cannot be read; the error says which and why.
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


def open_folder(root: Path, split: Split = "train") -> OnDisk:
    """The images in the shards or parquet files of a folder if it holds such, else those in files below it.

    `split` tells which of parquet files, where one folder holds those of all; without val it is train.

    Raises:
        UserFileNotFoundError: there is no image.
        UserError: a folder or file cannot be read, or the index cannot be kept.
    """
    if holds_shards(root):
        return open_shards(root)
    if holds_tables(root):
        images = open_tables(root, split) or open_tables(root, "train")
        if images is None:
            raise UserFileNotFoundError(
                f"{root} holds parquet files, but none of train; expected train-*.parquet; download these too"
            )
        return images
    index = open_index(root)
    if 0 < index.num_loose < len(index):
        _warn(
            f"{root} holds images ({index.name(0)}) beside folders of images; all are taken, without labels"
        )
    return FolderSource.of_all(root, index)


def open_images(path: str, max_images: int | None = None, key: str = "data.path") -> ImageSource:
    """The images to pretrain on: of `path/train` if there is one, of Kaggle's train, else of `path`.

    `key` is the option that an error about the path names.

    Raises:
        UserFileNotFoundError: no such folder, or no image in it.
    """
    source = _open_named(path, "pretrain") or _open_train(path, key)
    if max_images is not None and max_images < len(source):
        source = source.subset(np.linspace(0, len(source) - 1, max_images).round().astype(np.int64))
    return source


def open_val(path: str) -> ImageSource | None:
    """The validation images of a folder, labeled by their own class folders or not at all; None without."""
    if named := _open_named(path, "test"):
        return named
    if path.startswith(HUB):
        return open_hub(path, "val")
    root = Path(path)
    if holds_tables(root) or holds_tables(root / "train"):
        return open_tables(root, "val")
    if holds_shards(root / "val"):
        return open_shards(root / "val")
    layout = recognize(root)
    val = layout.val if layout else None
    return open_folder(val.path) if val and val.is_readable and val.path != root else None


def open_labeled(path: str, key: str = "data.path") -> tuple[ImageSource, ImageSource]:
    """Labeled images for evaluation: gallery and test images, with the same classes.

    `path/train` and `path/val`; without a val folder every fifth image is held out for testing. `key` is
    the option that an error about the path names.

    Raises:
        UserFileNotFoundError: no such folder, or no image in it.
        UserError: images are not in class folders, or val has a class that train lacks.
    """
    if (named := _open_named(path, "train")) and (test := _open_named(path, "test")):
        return named, test
    train: OnDisk
    if path.startswith(HUB):
        train = _open_hub_train(path)
    else:
        folder = _train_folder(path, key)
        if explained := _explained(path):
            raise UnlabeledError(explained)
        train = open_folder(folder)
    if train.labels is None:
        raise unlabeled(
            train,
            f". With a list of their classes `dino-sparo prepare {path} --out OUT --labels FILE` makes them",
        )
    _warn_of_empty_classes(train)
    val = _labeled_val(path, train)
    if val is None:
        return hold_out(train)
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


def hold_out(source: ImageSource) -> tuple[ImageSource, ImageSource]:
    """The images to learn from, and every fifth, to test on."""
    held_out = np.arange(len(source)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return source.subset(np.flatnonzero(~held_out)), source.subset(np.flatnonzero(held_out))


def is_set(path: str) -> bool:
    """Whether a path is the name of a set that torchvision downloads; a folder of that name goes first."""
    if path not in NAMES or not os.path.lexists(path):
        return path in NAMES
    _warn(f"the folder {path} here is taken, not the set of this name that torchvision downloads")
    return False


def unlabeled(source: OnDisk, remedy: str = "") -> UnlabeledError:
    """The error about images whose classes are needed and unknown."""
    if isinstance(source, TableSource):
        return UnlabeledError(
            f"{source.root}: the tables do not tell the class of every image; expected a column label "
            f"or labels of integers from 0, or one column of the hub's type ClassLabel"
        )
    if isinstance(source, ShardSource):
        return UnlabeledError(
            f"{source.root}: not every image of these shards has a class; expected KEY.cls beside "
            f"each image, as `dino-sparo shard` writes it for images in class folders"
        )
    return UnlabeledError(
        f"{source.root}: the images are not in class folders; expected {source.root}/<class>/<image>{remedy}"
    )


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


def _open_named(path: str, part: Part) -> ImageSource | None:
    """A part of the generated pictures or of a set that torchvision downloads; None if a path is none."""
    if path == SHAPES:
        return shapes_source("val" if part == "test" else "train")
    return open_set(path, part) if is_set(path) else None


def _open_train(path: str, key: str) -> OnDisk:
    """The images to pretrain on, of the hub or on disk."""
    if path.startswith(HUB):
        return _open_hub_train(path)
    folder = _train_folder(path, key)
    if folder == Path(path) and (folder / "val").is_dir():  # its images would be learnt from too
        raise UserError(
            f"{key} {path!r} has a val folder, but no train folder; expected train/<class>/<image>; "
            f"move the images to train on into {folder / 'train'}"
        )
    try:
        return open_folder(folder)
    except UserFileNotFoundError as error:  # the images may lie in tars
        raise UserFileNotFoundError(_explained(path) or str(error)) from error


def _open_hub_train(path: str) -> TableSource:
    train = open_hub(path, "train")
    if train is None:
        raise UserError(f"{path} has no split named train; name another set or configuration")
    return train


def _train_folder(path: str, key: str) -> Path:
    root = Path(path)
    if not root.exists():
        raise UserFileNotFoundError(
            f"{key} {path!r} does not exist; give an existing folder of images, or a name: "
            f"{', '.join((SHAPES, *NAMES))}"
        )
    if not root.is_dir():
        raise UserFileNotFoundError(f"{key} {path!r} is a file; give the folder that holds the images")
    return root / "train" if (root / "train").is_dir() else training_folder(root) or root


def _labeled_val(path: str, train: OnDisk) -> OnDisk | None:
    """The labeled validation images beside those of training; None without. Parquet files of a test split
    whose classes are unknown are none.

    Raises:
        UserError: they have no classes, or those of training are not in a folder of their own.
    """
    root = Path(path)
    if isinstance(train, TableSource):
        of_split = open_hub(path, "val") if path.startswith(HUB) else open_tables(root, "val")
        return of_split if of_split is not None and of_split.labels is not None else None
    if not (root / "val").is_dir():
        return None
    if train.root == root:  # its images would be in the gallery too, as a class named val
        raise UserError(f"{root}: there is a val folder, but no train folder; expected train/<class>/<image>")
    val = open_folder(root / "val")
    if val.labels is None:
        raise unlabeled(val)
    return val


def _explained(path: str) -> str:
    """What to do about a layout of ImageNet that is not usable as it is; empty if there is nothing to say."""
    layout = recognize(Path(path))
    return explain(layout) if layout else ""


def _warn_of_empty_classes(source: OnDisk) -> None:
    """A class folder without an image is no class; it may have been meant to be one."""
    if isinstance(source, TableSource):
        return
    empty = sorted(set(list_folder(source.root)[0]) - set(source.classes))
    if empty:
        log.warning("WARNING: %s: %d class folders have no image (%s ...)", source.root, len(empty), empty[0])


@cache  # said once a process, however often a folder is opened
def _warn(text: str) -> None:
    log.warning(text)
