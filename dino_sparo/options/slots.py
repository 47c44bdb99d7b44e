"""Images without labels."""

from dataclasses import dataclass


@dataclass
class ImagesOptions:
    """A folder of images."""

    path: str
    """Folder of images (train/<class>/..., <class>/... or flat), or `shapes` for generated pictures."""
