"""Options that name the images of a command."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dino_sparo.data.sources import ImageSource


@dataclass
class ImagesOptions:
    """A folder of images."""

    path: str
    """Folder of images (train/<class>/..., <class>/... or flat), of tar shards, or of parquet files;
    `hub:OWNER/NAME`, `cifar10`, `stl10`, or `shapes` for generated pictures."""
    train: str | None = None
    """What of `path` to take: a folder, or a pattern of names in it such as 'val-*.tar'; null finds train by
    names, `.` takes all."""


@dataclass
class LabeledDataOptions:
    """A labeled image folder."""

    path: str
    """Folder with train/<class>/... and val/<class>/..., shards or parquet files of such, `hub:OWNER/NAME`,
    `cifar10`, `stl10`, or `shapes`; without val every fifth image is held out."""
    train: str | None = None
    """What of `path` to learn from: a folder, or a pattern of names in it such as 'train-*.tar'; null finds
    it by names, `.` takes all."""
    val: str | None = None
    """What of `path`, or beside it, to test on; null finds it by names."""
    label_column: str | None = None
    """Column of parquet files that holds the classes; null takes `label`, `labels` or the only ClassLabel."""


def open_chosen(data: ImagesOptions, max_images: int | None = None) -> "ImageSource":
    """The images, or so many of them, spread evenly. Raises UserError as `open_images`."""
    from dino_sparo.data.sources import open_images
    from dino_sparo.data.splits import Choice

    return open_images(data.path, max_images, choice=Choice(data.train))
