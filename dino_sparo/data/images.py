"""Single images: evaluation crops, and conversion to tensors.

Workers return uint8 pixels; `normalize` converts them to floats on the training device.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dino_sparo.data import pil_views
from dino_sparo.data.decode import AS_IS, UnreadableImageError, decode, to_rgb
from dino_sparo.data.sources import ImageSource

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_ASPECT = 32


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def normalize(pixels: Tensor) -> Tensor:
    """uint8 (..., 3, height, width) -> float32, normalized with ImageNet's mean and standard deviation."""
    mean, std = _mean_and_std(pixels.device)
    return (pixels.float() / 255 - mean) / std


@lru_cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once per device: a copy to a GPU in every step would synchronize the host."""
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


class CenterCrops(Dataset):
    """Item -> the evaluation crop of an image, uint8 (3, size, size)."""

    def __init__(self, source: ImageSource, size: int) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return evaluation_crop(self.source.load(index), self.size)


class ReadableCrops(CenterCrops):
    """Item -> the evaluation crop and "", or a black crop and the reason why the image cannot be read."""

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return super().__getitem__(index), ""
        except UnreadableImageError as error:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), error.reason


def evaluation_crop(image: Image.Image, size: int) -> Tensor:
    """Center crop of an image as in the official evaluation, uint8 (3, size, size)."""
    return to_tensor(pil_views.center_crop(_middle(image), size))


def evaluation_input(
    image: Image.Image | str | Path, size: int, value_range: tuple[float, float] | None = None
) -> Tensor:
    """Image or image file -> an encoder's input: the evaluation crop, normalized, float32 (3, size, size).

    Args:
        value_range: as the attribute of Encoder.

    Raises:
        Exception: the image cannot be read; Pillow raises many types.
    """
    if isinstance(image, Image.Image):
        rgb = to_rgb(image, value_range)
    else:
        rgb = decode(AS_IS.read_file(image), reading=AS_IS._replace(value_range=value_range))
    return normalize(evaluation_crop(rgb, size))


def _middle(image: Image.Image) -> Image.Image:
    """Cut off the ends of a very long image, which the center crop never contains.

    Resizing 20,000 x 10 pixels as a whole would take half a gigabyte. Even multiples of the short side are
    cut off, so the center crop has the same pixels; images up to 32 times as long as wide are not cut.
    """
    short = min(image.size)
    left, top = (max(0, side - MAX_ASPECT * short) // (4 * short) * 2 * short for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image
