"""Generated pictures as a source of images, by the name `shapes`."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dino_sparo.data.shapes import FACTORS, draw_factors, draw_picture

SHAPES = "shapes"
SHAPES_SIZES = {"train": 4000, "val": 1000}


@dataclass(frozen=True)
class ShapesSource:
    """Pictures drawn on demand; the label is the color of the main object."""

    seed: int
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...] = FACTORS["color"]

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


def shapes_source(split: str) -> ShapesSource:
    """The generated pictures of a split, labeled by the main object's color."""
    first = 0 if split == "train" else SHAPES_SIZES["train"]
    indices = np.arange(first, first + SHAPES_SIZES[split])
    labels = np.array([draw_factors(0, int(i)).color for i in indices], dtype=np.int64)
    return ShapesSource(0, indices, labels)
