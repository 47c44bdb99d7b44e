"""Deterministic, resumable batches of crops.

Workers hand over uint8 pixels; `normalize` makes them floats on the training device.
Axis letters: B images, C crops.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.utils import make_grid

from dino_sparo.data import pil_views
from dino_sparo.data.scan import problem_of
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.views import NUM_GLOBAL_CROPS, CropRecipe, draw_view, sample_order, substitute_sample
from dino_sparo.data.workers import WatchedLoader
from dino_sparo.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUBSTITUTE_TRIES = 10
MAX_ASPECT = 32


@dataclass(frozen=True)
class UnreadableImage:
    """What a worker returns instead of crops, so that the training process can name the file."""

    name: str
    reason: str

    def raise_error(self, remedy: str = "repair or remove the file") -> NoReturn:
        """End the run with one sentence that names the file."""
        raise UserError(f"{self.name}: the image cannot be read ({self.reason}); {remedy}, then start again")


class Crops(NamedTuple):
    """A batch: global crops (2, B, 3, side, side) and local crops (C - 2, B, 3, side, side), uint8."""

    global_crops: Tensor
    local_crops: Tensor
    replaced: tuple[UnreadableImage, ...] = ()
    """Images that could not be read, for which others stand in."""


class ImageCrops(NamedTuple):
    """The crops of one image, uint8 (3, side, side) each, global ones first."""

    crops: list[Tensor]
    replaced: list[UnreadableImage]


class CropsDataset(Dataset):
    """Item (epoch, sample) -> the crops of one image.

    With `substitute` another image stands in for one that cannot be read: which one is drawn from (seed,
    epoch, sample), so it does not depend on workers or processes. After ten bad ones in a row the first is
    returned as unreadable.
    """

    def __init__(
        self, source: ImageSource, crop_recipes: Sequence[CropRecipe], seed: int, *, substitute: bool = False
    ) -> None:
        self.source = source
        self.crop_recipes = crop_recipes
        self.seed = seed
        self.substitute = substitute

    def __getitem__(self, item: tuple[int, int]) -> ImageCrops | UnreadableImage:
        epoch, sample = item
        image, replaced = _load(self.source, sample), []
        while isinstance(image, UnreadableImage):
            replaced.append(image)
            if not self.substitute or len(replaced) == SUBSTITUTE_TRIES:
                return replaced[0]
            other = substitute_sample(
                seed=self.seed,
                epoch=epoch,
                sample=sample,
                attempt=len(replaced),
                num_samples=len(self.source),
            )
            image = _load(self.source, other)
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
        return ImageCrops(crops, replaced)


class BatchOrder(Sampler):
    """Yields each micro-batch's (epoch, sample) pairs from a given optimiser step to the end of the run.

    Every epoch is one permutation, cut into global batches; the last partial one is dropped. Rank r of R
    takes the r-th of R equal slices of each global batch, in `accumulation` equal micro-batches: however
    many processes there are, all together see the same global batches.
    """

    def __init__(
        self,
        *,
        num_samples: int,
        global_batch_size: int,
        epochs: int,
        seed: int,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        assert global_batch_size % (world_size * accumulation) == 0
        self.num_samples, self.global_batch_size, self.epochs = num_samples, global_batch_size, epochs
        self.seed, self.first_step, self.rank = seed, first_step, rank
        self.accumulation = accumulation
        self.micro_batch_size = global_batch_size // (world_size * accumulation)
        self.steps_per_epoch = num_samples // global_batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.first_step // self.steps_per_epoch, self.epochs):
            order = sample_order(seed=self.seed, epoch=epoch, num_samples=self.num_samples)
            first = max(0, self.first_step - epoch * self.steps_per_epoch)
            for step in range(first, self.steps_per_epoch):
                for micro_batch in range(self.accumulation):
                    number = self.rank * self.accumulation + micro_batch
                    start = step * self.global_batch_size + number * self.micro_batch_size
                    yield [(epoch, s) for s in order[start : start + self.micro_batch_size].tolist()]

    def __len__(self) -> int:
        return (self.steps_per_epoch * self.epochs - self.first_step) * self.accumulation

    def global_batch(self, step: int) -> list[int]:
        """The images of all processes in a step (counted from 1), by number."""
        epoch, number = divmod(step - 1, self.steps_per_epoch)
        order = sample_order(seed=self.seed, epoch=epoch, num_samples=self.num_samples)
        return order[number * self.global_batch_size : (number + 1) * self.global_batch_size].tolist()


def crop_batches(
    dataset: CropsDataset,
    order: Sampler,
    *,
    num_workers: int,
    prefetch_batches: int,
    pin_memory: bool,
    timeout_seconds: float,
) -> WatchedLoader:
    """Batches of `Crops` (or `UnreadableImage`) of (epoch, sample) pairs, prepared ahead by workers."""
    return WatchedLoader(
        dataset,
        image_of=itemgetter(1),
        name=dataset.source.name,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
        batch_sampler=order,
        collate_fn=collate_crops,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_batches if num_workers else None,
    )


def collate_crops(images: list[ImageCrops | UnreadableImage]) -> Crops | UnreadableImage:
    """The crops of images -> one batch, crop-major; the first unreadable image instead, if there is one."""
    readable, replaced = [], []
    for image in images:
        if isinstance(image, UnreadableImage):
            return image
        readable.append(image.crops)
        replaced += image.replaced
    by_crop = [torch.stack(crops) for crops in zip(*readable, strict=True)]
    local_crops = by_crop[NUM_GLOBAL_CROPS:]
    return Crops(
        torch.stack(by_crop[:NUM_GLOBAL_CROPS]),
        torch.stack(local_crops) if local_crops else torch.empty(0, len(images), 3, 0, 0, dtype=torch.uint8),
        tuple(replaced),
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
        return to_tensor(pil_views.center_crop(_middle(image), self.size))


def collate_images(images: list[Tensor | UnreadableImage]) -> Tensor | UnreadableImage:
    """Images (3, size, size) -> (B, 3, size, size); the first unreadable one instead, if there is one."""
    for image in images:
        if isinstance(image, UnreadableImage):
            return image
    return torch.stack(images)  # type: ignore[arg-type]


def _middle(image: Image.Image) -> Image.Image:
    """An image without the far ends of a very long one, which no central square reaches.

    Resized whole, 20,000 x 10 pixels would take half a gigabyte. Even multiples of the short side are cut,
    so that the crop falls on the same pixels as without; images up to 32 times as long as wide stay.
    """
    short = min(image.size)
    left, top = (max(0, side - MAX_ASPECT * short) // (4 * short) * 2 * short for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left or top else image


def _load(source: ImageSource, index: int) -> Image.Image | UnreadableImage:
    try:
        return source.load(index)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what PIL raises
        name, data = source.name(index), b""
        if isinstance(error, UnidentifiedImageError):  # which only the content explains
            with suppress(OSError):
                data = source.read(index)
        return UnreadableImage(name, problem_of(data, error)[1])


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
