"""Options that name the images of a command."""

from dataclasses import dataclass


@dataclass
class ImagesOptions:
    """A folder of images."""

    path: str
    """Folder of images (train/<class>/..., <class>/... or flat), of tar shards, or of parquet files;
    `hub:OWNER/NAME`, `cifar10`, `stl10`, or `shapes` for generated pictures."""


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
