"""Options that name the images of a command."""

from dataclasses import dataclass


@dataclass
class ImagesOptions:
    """A folder of images."""

    path: str
    """Folder of images (train/<class>/..., <class>/... or flat), or `shapes` for generated pictures."""


@dataclass
class LabeledDataOptions:
    """A labeled image folder."""

    path: str
    """Folder with train/<class>/... and val/<class>/..., shards or parquet files of such, `cifar10`, `stl10`
    or `shapes`; without val every fifth image is held out."""
