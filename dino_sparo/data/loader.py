"""Deterministic, resumable batches of crops.

Workers hand over uint8 pixels; `normalize` makes them floats on the training device.
Axis letters: B images, C crops.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.utils import make_grid

from dino_sparo.data import pil_views
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.views import NUM_GLOBAL_CROPS, CropRecipe, draw_view, sample_order
from dino_sparo.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class UnreadableImage:
    """What a worker returns instead of crops, so that the training process can name the file."""

    name: str
    reason: str

    def raise_error(self) -> NoReturn:
        """End the run with one sentence that names the file."""
        raise UserError(
            f"{self.name}: the image cannot be read ({self.reason}); repair or remove the file, "
            f"then start again"
        )


class Crops(NamedTuple):
    """A batch: global crops (2, B, 3, side, side) and local crops (C - 2, B, 3, side, side), uint8."""

    global_crops: Tensor
    local_crops: Tensor


class CropsDataset(Dataset):
    """Item (epoch, sample) -> the crops of one image, uint8 (3, side, side) each, global ones first."""

    def __init__(self, source: ImageSource, crop_recipes: Sequence[CropRecipe], seed: int) -> None:
        self.source = source
        self.crop_recipes = crop_recipes
        self.seed = seed

    def __getitem__(self, item: tuple[int, int]) -> list[Tensor] | UnreadableImage:
        epoch, sample = item
        image = _load(self.source, sample)
        if isinstance(image, UnreadableImage):
            return image
        crops = []
        for crop, recipe in enumerate(self.crop_recipes):
            view = draw_view(
                recipe,
                seed=self.seed,
                epoch=epoch,
                sample=sample,
                crop=crop,
                image_width=image.width,
                image_height=image.height,
            )
            crops.append(to_tensor(pil_views.execute(image, view)))
        return crops


class BatchOrder(Sampler):
    """Yields each batch's (epoch, sample) pairs from a given step to the end of the run.

    Every epoch is one permutation, cut into global batches; the last partial one is dropped.
    """

    def __init__(
        self, *, num_samples: int, batch_size: int, epochs: int, seed: int, first_step: int = 0
    ) -> None:
        self.num_samples, self.batch_size, self.epochs = num_samples, batch_size, epochs
        self.seed, self.first_step = seed, first_step
        self.steps_per_epoch = num_samples // batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.first_step // self.steps_per_epoch, self.epochs):
            order = sample_order(seed=self.seed, epoch=epoch, num_samples=self.num_samples).tolist()
            first = max(0, self.first_step - epoch * self.steps_per_epoch)
            for step in range(first, self.steps_per_epoch):
                samples = order[step * self.batch_size : (step + 1) * self.batch_size]
                yield [(epoch, sample) for sample in samples]

    def __len__(self) -> int:
        return self.steps_per_epoch * self.epochs - self.first_step


def crop_batches(
    dataset: CropsDataset, order: BatchOrder, *, num_workers: int, prefetch_batches: int, pin_memory: bool
) -> DataLoader:
    """Batches of `Crops` (or `UnreadableImage`) in the given order, prepared ahead by worker processes."""
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=num_workers,
        collate_fn=collate_crops,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_batches if num_workers else None,
        worker_init_fn=ignore_interrupt,
    )


def collate_crops(images: list[list[Tensor] | UnreadableImage]) -> Crops | UnreadableImage:
    """Lists of crops -> one batch, crop-major; the first unreadable image instead, if there is one."""
    readable = []
    for crops in images:
        if isinstance(crops, UnreadableImage):
            return crops
        readable.append(crops)
    by_crop = [torch.stack(crops) for crops in zip(*readable, strict=True)]
    local_crops = by_crop[NUM_GLOBAL_CROPS:]
    return Crops(
        torch.stack(by_crop[:NUM_GLOBAL_CROPS]),
        torch.stack(local_crops) if local_crops else torch.empty(0, len(images), 3, 0, 0, dtype=torch.uint8),
    )


class CenterCrops(Dataset):
    """Item -> the evaluation crop of an image, uint8 (3, size, size)."""

    def __init__(self, source: ImageSource, size: int) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor | UnreadableImage:
        image = _load(self.source, index)
        if isinstance(image, UnreadableImage):
            return image
        return to_tensor(pil_views.center_crop(image, self.size))


def collate_images(images: list[Tensor | UnreadableImage]) -> Tensor | UnreadableImage:
    """Images (3, size, size) -> (B, 3, size, size); the first unreadable one instead, if there is one."""
    for image in images:
        if isinstance(image, UnreadableImage):
            return image
    return torch.stack(images)  # type: ignore[arg-type]


def _load(source: ImageSource, index: int) -> Image.Image | UnreadableImage:
    try:
        return source.load(index)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL raises
        return UnreadableImage(source.name(index), str(error) or type(error).__name__)


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def crops_picture(crops: Crops, num_images: int = 4) -> Tensor:
    """The crops of the first images, one row an image: float (3, height, width) in 0..1."""
    side = crops.global_crops.shape[-1]
    tiles = []
    for image in range(min(num_images, crops.global_crops.shape[1])):
        for crop in (*crops.global_crops[:, image], *crops.local_crops[:, image]):
            margin = side - crop.shape[-1]
            tiles.append(F.pad(crop, (0, margin, 0, margin), value=255))
    per_row = crops.global_crops.shape[0] + crops.local_crops.shape[0]
    return make_grid(torch.stack(tiles).float() / 255, nrow=per_row, pad_value=1.0)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 (..., 3, height, width) -> float32 by ImageNet's mean and standard deviation."""
    mean, std = _mean_and_std(pixels.device)
    return (pixels.float() / 255 - mean) / std


@lru_cache
def _mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Made once a device: a copy to a GPU in every step would make the host wait."""
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def ignore_interrupt(_worker: int) -> None:
    """Ctrl-C is the training process's business; its workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def default_workers() -> int:
    """One worker process a core that this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
