"""Labelled images, as several commands take them."""

from dataclasses import dataclass


@dataclass
class LabelledDataOptions:
    """A labelled image folder."""

    path: str
    """Folder with train/<class>/... and val/<class>/..., shards or parquet files of such, `cifar10`, `stl10`
    or `shapes`; without val every fifth image is held out."""
