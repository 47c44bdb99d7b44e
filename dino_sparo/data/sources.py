"""Sources of images: folders (labeled by class folder, or flat), shards, parquet files, datasets by name, and
generated pictures."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_sparo.data.decode import MAX_PIXELS, Reading
from dino_sparo.data.imagenet import explain, recognize
from dino_sparo.data.index import FolderSource, open_index
from dino_sparo.data.shapes import SHAPES, shapes_source
from dino_sparo.data.shards import ShardSource, holds_shards, is_shard, open_shards
from dino_sparo.data.split_names import same_name, splits_of_files
from dino_sparo.data.splits import (
    PACKED_ENDINGS,
    WRAPPED,
    Choice,
    Part,
    Splits,
    find_splits,
    listed,
    most_beside,
    probably_meant,
    side_by_side,
)
from dino_sparo.data.tables import (
    HUB,
    Split,
    TableSource,
    holds_tables,
    is_parquet,
    list_parquet,
    open_hub,
    open_tables,
)
from dino_sparo.data.torchvision_sets import NAMES, open_set
from dino_sparo.data.torchvision_sets import Part as PartOfSet
from dino_sparo.data.walk import found_below, list_folder, named_by_ending
from dino_sparo.errors import TooFewImagesError, UnlabeledError, UserError, UserFileNotFoundError
from dino_sparo.files import did_you_mean
from dino_sparo.terminal import counted, log

OnDisk = FolderSource | ShardSource | TableSource
HELD_OUT_EVERY, ORDINAL = 5, "fifth"  # without a val folder every fifth image is held out


class ImageSource(Protocol):
    """A numbered list of images, with labels if they are known."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers of all images, or None if they are unknown."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by number."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name of an image for messages."""
        ...

    def load(self, index: int, max_side: int | None = None) -> Image.Image:
        """The image in RGB, resized if a side is longer than `max_side`.

        Raises:
            UnreadableImageError: it cannot be read; the error contains its name and the reason.
        """
        ...

    def read(self, index: int) -> bytes:
        """The bytes of the image's file; empty without files. Raises OSError."""
        ...

    def subset(self, indices: NDArray[np.int64]) -> "ImageSource":
        """The same source with only these images."""
        ...

    def fingerprint(self) -> str:
        """A hash of the images' names in order, which does not depend on the folder."""
        ...

    def stats(self) -> NDArray[np.int64]:
        """Size in bytes, time of the last change in ns and inode of each image's file, (num_images, 3).

        They change when a file is replaced; zeros without files, -1 for a missing file.
        """
        ...


AS_FOUND = Choice()
NOTES = {  # endings of files about images
    *(".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".md", ".html", ".yaml", ".yml", ".py", ".log"),
    *(".pdf", ".pkl", ".mat", ".db", ".ini", ".cls", ".md5", ".sh", ".lst"),
}


def open_folder(
    root: Path, split: Split = "train", names: Sequence[str] = (), label_column: str | None = None
) -> OnDisk:
    """The images in the shards or parquet files of a folder if it contains any, else the files below it.

    Args:
        split: split of parquet files that are named by split; without val it is test, else train.
        names: folders, shards, or parquet files in `root` that contain the images, if not all do.
        label_column: of tables, see `open_tables`.

    Raises:
        UserFileNotFoundError: there is no image.
        UserError: a folder or file cannot be read, or the index cannot be stored.
    """
    if is_parquet(names[0]) if names else holds_tables(root):
        found = {} if names else splits_of_files(list_parquet(root))
        chosen = found.get(split) or (split == "val" and found.get("test")) or found.get("train") or names
        return open_tables(root, split, chosen, label_column)
    if label_column is not None:
        raise UserError(f"data.label_column {label_column!r}: {root} contains no parquet files; leave it out")
    if is_shard(names[0]) if names else holds_shards(root):
        return open_shards(root, names)
    index = open_index(root, names)
    if 0 < index.num_loose < len(index):
        _warn(
            f"{root} contains images ({index.name(0)}) beside folders of images; all are used, without labels"
        )
    return FolderSource.of_all(root, index)


def open_images(
    path: str,
    max_images: int | None = None,
    key: str = "data.path",
    choice: Choice = AS_FOUND,
    splits: Splits | None = None,
) -> ImageSource:
    """The images to pretrain on: train as found by `find_splits`, else all.

    Args:
        key: the option that error messages about the path name.
        splits: the result of `decide`, if it was called before.

    Raises:
        UserFileNotFoundError: the folder does not exist, or contains no image.
    """
    source = _open_named(path, "pretrain", choice)
    if source is None:
        try:
            source = _open_train(path, splits or _splits(path, key, choice), choice)
        except UserFileNotFoundError as error:  # the images may be in tars
            raise UserFileNotFoundError(_explained(path) or str(error)) from error
    return evenly(source, max_images)


def spread_evenly(source: ImageSource, count: int) -> list[int]:
    """Numbers of at most `count` evenly spaced images, including the first and the last."""
    return np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int).tolist()


def evenly(source: ImageSource, count: int | None) -> ImageSource:
    """At most `count` images, evenly spaced. None: all images."""
    if count is None or count >= len(source):
        return source
    return source.subset(np.array(spread_evenly(source, count)))


def open_val(path: str, choice: Choice = AS_FOUND, train: ImageSource | None = None) -> ImageSource | None:
    """The validation images of a folder, labeled by their own class folders or not at all; else its labeled
    test images, if `train` is None or has one of their classes; else None."""
    if named := _open_named(path, "test", choice):
        return named
    return _open_val(path, _splits(path, "data.path", choice), choice, train)


def open_labeled(
    path: str, key: str = "data.path", choice: Choice = AS_FOUND, splits: Splits | None = None
) -> tuple[ImageSource, ImageSource]:
    """Labeled images for evaluation: gallery and test images, with the same classes.

    They are train and val as found by `find_splits`; without val, every fifth image is held out for testing.
    `key` and `splits` are as in `open_images`.

    Raises:
        UserFileNotFoundError: the folder does not exist, or contains no image.
        UserError: images are not in class folders, or in fewer than two, or val has a class that train lacks.
    """
    if (named := _open_named(path, "train", choice)) and (test := _open_named(path, "test", choice)):
        say_splits(path, named, test)
        return named, test
    splits = splits or _splits(path, key, choice)
    if choice.val is None and (explained := _explained(path)):
        raise UnlabeledError(explained)
    train = _open_train(path, splits, choice)
    if train.labels is None:
        raise unlabeled(
            train,
            f"; `dino-sparo prepare {path} --out OUT --labels FILE` makes them from a list of labels",
        )
    if len(train.classes) < 2:
        raise UnlabeledError(
            f"{key}: {train.root} has only one class ({train.classes[0]}), so every encoder has 100 % "
            f"accuracy; expected at least two class folders{probably_meant(train.root)}, or data.train with "
            f"others"
        )
    _warn_of_empty_classes(train)
    val = _open_val(path, splits, choice, train)
    if val is None:
        if len(train) < HELD_OUT_EVERY:
            raise TooFewImagesError(
                f"{key}: {train.root} has {counted(len(train), 'image')}, too few to hold out every "
                f"{ORDINAL} as val; add images, or set data.val to a folder"
            )
        say_splits(path, train, None, splits)
        return hold_out(train)
    if val.labels is None:
        raise unlabeled(val)
    numbers = {same_name(name): number for number, name in enumerate(train.classes)}
    unknown = sorted(name for name in val.classes if same_name(name) not in numbers)
    if unknown:
        problem = "has no image" if (train.root / unknown[0]).is_dir() else "does not exist"
        raise UserError(
            f"{val.root}: class folder {unknown[0]!r} {problem} in {train.root}; "
            f"both need the same classes ({len(unknown)} unknown)"
        )
    _warn_of_empty_classes(val)
    say_splits(path, train, val, splits)
    to_train = np.array([numbers[same_name(name)] for name in val.classes], dtype=np.int64)
    return train, replace(val, classes=train.classes, class_numbers=to_train[val.class_numbers])


def decide(path: str, choice: Choice) -> Splits | None:
    """Which images of `data.path` are train and val; None for a dataset by name."""
    return None if path == SHAPES or is_set(path) else _splits(path, "data.path", choice)


def say_splits(
    path: str,
    train: ImageSource,
    val: ImageSource | None,
    splits: Splits | None = None,
    *,
    held_out: bool = True,
    with_val: bool = True,
) -> None:
    """Log which images are train, which are val, and which are neither.

    Args:
        splits: the result of `decide`.
        held_out: whether images of train are held out if there is no val; False if val is not opened.
        with_val: whether to say what is val.
    """
    train_at, val_at = path, path
    if splits is not None:
        train_at, val_at = str(splits.train), str(splits.val or splits.test or "")
    classes = (
        "without classes" if train.labels is None else f"in {counted(len(train.classes), 'class', 'es')}"
    )
    why = "no val or test found"
    if splits is not None and (splits.val or splits.test):
        why = f"the classes of {val_at} are unknown or different"
    if path.startswith(HUB):
        train_at, val_at = (
            f"{path}, {one.index.header['files'][0]}" if isinstance(one, TableSource) else ""
            for one in (train, val)
        )
        why = "no val or labeled test found" if held_out else "not looked for"
    if val is not None:
        of_val = f"{len(val):,} ({val_at})"
    elif not held_out and splits is not None and (splits.val or (splits.test and train.labels is not None)):
        of_val = f"({val_at})"
    else:
        of_val = f"{f'every {ORDINAL} image of train' if held_out else 'none'} ({why})"
    parts = [f"train: {counted(len(train), 'image')} {classes} ({train_at})"] + [f"val: {of_val}"] * with_val
    _say("; ".join([*parts, *notes_on(train, val, splits)]))


def notes_on(train: ImageSource, val: ImageSource | None, splits: Splits | None) -> list[str]:
    """In words: what looks like a split and is not used, what becomes classes, and what is left out."""
    notes = [] if splits is None else [*splits.notes, *_taken(train, val), *_not_read(train, val)]
    if isinstance(train, TableSource) and (known := train.index.header.get("splits")):
        used = {one.index.header["files"][0] for one in (train, val) if isinstance(one, TableSource)}
        unused = {name: rows for name, rows in known.items() if name not in used}
        notes += listed(
            "not used",
            [f"{name} ({counted(rows, 'row')})" if rows else name for name, rows in unused.items()],
        )
    return notes


def _taken(*sources: ImageSource | None) -> list[str]:
    """Classes and images whose names say that they are masks, thumbnails, and the like."""
    on_disk = [source for source in sources if isinstance(source, FolderSource | ShardSource)]
    names = dict.fromkeys(name for source in on_disk for name in source.index.header.get("about", ()))
    classes = {name for source in on_disk for name in source.classes}
    images = [name for name in names if name not in classes]
    return [
        *listed("taken as classes", [name for name in names if name in classes]),
        *listed("taken as images", images),
    ]


def _not_read(*sources: ImageSource | None) -> list[str]:
    """Numbers of files below folders of images that are not read, without files about images."""
    others: Counter[str] = Counter()
    for source in sources:
        if isinstance(source, FolderSource):
            others.update(source.index.header.get("others", {}))
    others = Counter({ending: count for ending, count in others.items() if ending not in NOTES})
    return [f"files not read: {named_by_ending(others)}"] if others else []


def absolute_path(path: str) -> str:
    """An absolute path; names of datasets and paths that do not exist are returned as they are."""
    expanded = os.path.expanduser(path)
    if path == SHAPES or path.startswith(HUB) or is_set(path) or not os.path.exists(expanded):
        return path
    return os.path.abspath(expanded)


def hold_out(source: ImageSource, every: int = HELD_OUT_EVERY) -> tuple[ImageSource, ImageSource]:
    """The images to train on, and every fifth image, or every `every`-th, to test on."""
    held_out = np.arange(len(source)) % every == every - 1
    return source.subset(np.flatnonzero(~held_out)), source.subset(np.flatnonzero(held_out))


def is_set(path: str) -> bool:
    """Whether a path names a dataset that torchvision downloads; a folder of this name has priority."""
    if path not in NAMES or not os.path.lexists(path):
        return path in NAMES
    _warn(f"using the folder {path}, not the dataset of this name that torchvision downloads")
    return False


def check_exists(path: str, key: str = "data.path") -> None:
    """Check that a path is the name of a dataset, or exists. Needs no torch.

    Raises:
        UserFileNotFoundError: it does not exist.
    """
    root = Path(os.path.expanduser(path))
    if not (path in (SHAPES, *NAMES) or path.startswith(HUB) or root.exists()):
        raise UserFileNotFoundError(
            f"{key} {path!r} does not exist{did_you_mean(root)}; give an existing folder of images, or a "
            f"name: {', '.join((SHAPES, *NAMES))}, hub:OWNER/NAME"
        )


def unlabeled(source: OnDisk, remedy: str = "") -> UnlabeledError:
    """The error for images whose labels are needed but unknown."""
    if isinstance(source, TableSource):
        columns = " or ".join(map(repr, source.index.header.get("label_columns", [])))
        return UnlabeledError(
            f"{source.root}: the files do not contain the class of every image; expected a column label "
            f"or labels of integers from 0, or one column of the hub's type ClassLabel, or data.label_column "
            f"with the name of a column ({columns or 'no column is suitable'})"
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
    """At most `images_per_class` images of every class, evenly spread over the class."""
    labels = source.labels
    assert labels is not None
    by_class = np.argsort(labels, kind="stable")
    firsts = np.searchsorted(labels[by_class], np.arange(1, len(source.classes)))
    chosen = []
    for members in np.split(by_class, firsts):
        spread = np.linspace(0, len(members) - 1, min(images_per_class, len(members)))
        chosen.append(members[spread.round().astype(np.int64)])
    return source.subset(np.sort(np.concatenate(chosen)))


def _open_named(path: str, part: PartOfSet, choice: Choice) -> ImageSource | None:
    """A part of the generated pictures or of a dataset that torchvision downloads; None for other paths."""
    if path != SHAPES and not is_set(path):
        return None
    if choice != choice.of_pixels:
        raise UserError(f"data.path {path!r} has splits and labels of its own; leave out {_options(choice)}")
    return shapes_source("val" if part == "test" else "train") if path == SHAPES else open_set(path, part)


def _options(choice: Choice) -> str:
    """Names of the options of a choice that choose images."""
    return ", ".join(
        f"data.{name}" for name, value in choice._asdict().items() if value != getattr(choice.of_pixels, name)
    )


def _splits(path: str, key: str, choice: Choice) -> Splits:
    """Train and val of a folder, or of a dataset on the hub."""
    if path.startswith(HUB):
        return Splits(Part(Path(path)))
    check_exists(path, key)
    root = Path(os.path.expanduser(path))
    if not root.is_dir():
        raise UserFileNotFoundError(f"{key} {path!r} is a file; give the folder that contains the images")
    return find_splits(root, key, choice)


def _open_train(path: str, splits: Splits, choice: Choice) -> OnDisk:
    if not path.startswith(HUB):
        return open_part(splits.train, "train", choice, choice.train)
    train = open_hub(path, "train", choice.train, choice.label_column)
    if train is None:
        raise UserError(
            f"{path} has no split named {choice.train or 'train'}; give another dataset or configuration, or "
            f"another split with data.train"
        )
    return read_by(choice, train)


def open_part(part: Part, split: Split, choice: Choice, chosen: str | None = None) -> OnDisk:
    """The images of a part of a folder.

    Raises:
        UserError: archives of images are beside so few images that it is unclear which are meant, and `.` is
            not chosen; or as `open_folder`.
    """
    source = read_by(choice, open_folder(part.folder, split, part.names, choice.label_column))
    if isinstance(source, FolderSource) and chosen != ".":
        others, images = source.index.header.get("others", {}), len(source)
        packed = sum(others.get(ending, 0) for ending in PACKED_ENDINGS)
        if packed and images <= most_beside(packed):
            one = next(found_below(part.folder, lambda name: name.endswith(PACKED_ENDINGS), WRAPPED), "")
            raise side_by_side(part.folder, packed, one, source.index.name(0), f"data.{split}")
    return source


def read_by(choice: Choice, source: OnDisk) -> OnDisk:
    """A source whose images are read as `choice` says."""
    return replace(source, reading=Reading(choice.max_pixels or MAX_PIXELS, choice.value_range))


def _open_val(path: str, splits: Splits, choice: Choice, train: ImageSource | None = None) -> OnDisk | None:
    """The validation images, else test images with known classes, else None.

    Raises:
        UserError: they cannot be read, or the chosen ones do not exist or have no classes.
    """
    val: OnDisk | None
    if path.startswith(HUB):
        val = open_hub(path, "val", choice.val, choice.label_column)
        val = val and read_by(choice, val)
    elif part := splits.val or splits.test:
        val = open_part(part, "val", choice, choice.val)
    else:
        return None
    may_lack = isinstance(val, TableSource) or splits.val is None
    if val is None or (may_lack and val.labels is None):
        if choice.val is None:
            return None
        why = f"{path} has no such split; give another one" if val is None else str(unlabeled(val))
        raise UnlabeledError(f"data.val {choice.val!r}: {why}")
    if (
        choice.val is None and splits.val is None and train is not None
    ):  # folders of a test set need not be classes
        known = set(map(same_name, train.classes))
        return val if known.intersection(map(same_name, val.classes)) else None
    return val


def _explained(path: str) -> str:
    """What to do about a layout of ImageNet that cannot be used as it is; empty if there is nothing to do."""
    layout = recognize(Path(os.path.expanduser(path)))
    return explain(layout) if layout else ""


def _warn_of_empty_classes(source: OnDisk) -> None:
    """Warn about class folders without images, which are not counted as classes."""
    if not isinstance(source, FolderSource) or source.index.header.get("class_level"):
        return
    empty = sorted(set(list_folder(source.root)[0]) - set(source.classes))
    if empty:
        log.warning("WARNING: %s: %d class folders have no image (%s ...)", source.root, len(empty), empty[0])


@cache  # logged once per process, however often a folder is opened
def _warn(text: str) -> None:
    log.warning("%s", text)


@cache
def _say(text: str) -> None:
    log.info("%s", text)
