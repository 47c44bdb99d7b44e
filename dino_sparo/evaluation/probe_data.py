"""What probes learn from: crops through the frozen encoder or features on disk, batch by batch.

Axis letters: B images, F numbers of a feature.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from dino_sparo.data.device_views import ahead
from dino_sparo.data.images import normalize
from dino_sparo.data.loader import (
    BatchOrder,
    Crops,
    CropsDataset,
    Executor,
    PhotoBatch,
    crop_batches,
    crops_of,
)
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.views import CropRecipe
from dino_sparo.errors import UserError
from dino_sparo.evaluation.probes import INPUTS, MAX_BLOCKS
from dino_sparo.models import Encoder
from dino_sparo.parallel.precision import autocast

MAX_SIDE = 1024  # longer images are reduced to it first: no crop of a usual photograph gets larger by it
IMAGES_AT_ONCE = 64  # of a forward pass of the encoder; it changes memory, not the experiment

Batch = tuple[dict[str, Tensor], Tensor]  # features (B, F) by name, float32, and labels (B,)
Waiting = Callable[[], AbstractContextManager[None]]


class Feed(Protocol):
    """What probes learn from: a batch for each step from the first one to the end of the run."""

    checkpoint_every_epochs: int
    """Epochs from one checkpoint to the next: what a stop costs at most."""

    def batches(self, waiting: Waiting) -> Iterator[Batch]:
        """This process's share of each global batch; `waiting` is entered while it waits for images."""
        ...

    def watch(self) -> AbstractContextManager[None]:
        """To be held while batches are taken: explains why a process that loads images has died."""
        ...


class ImageFeed:
    """The official training crops through the frozen encoder: random resized crop (bilinear), flip."""

    checkpoint_every_epochs = 1

    def __init__(
        self,
        encoder: Encoder,
        source: ImageSource,
        order: BatchOrder,
        *,
        image_size: int,
        precision: str,
        num_workers: int,
        executor: Executor = "pil",
        timeout_seconds: float = 600.0,
    ) -> None:
        assert source.labels is not None
        crops = CropsDataset(
            source, [training_crop(image_size)], order.seed, executor=executor, max_side=MAX_SIDE
        )
        self.recipes = crops.crop_recipes
        self.encoder, self.order, self.precision = encoder, order, precision
        self.labels = torch.from_numpy(source.labels)
        self.loader = crop_batches(
            crops,
            _Pieces(order),
            num_workers=num_workers,
            prefetch_batches=2,
            pin_memory=encoder.backbone.cls_token.device.type == "cuda",
            timeout_seconds=timeout_seconds,
        )

    def watch(self) -> AbstractContextManager[None]:
        return self.loader.failures_explained()

    def batches(self, waiting: Waiting) -> Iterator[Batch]:
        device = self.encoder.backbone.cls_token.device
        crops = ahead(self._pieces(waiting), lambda piece: crops_of(piece, self.recipes, device), device)
        for batch in self.order:
            parts = []
            for _ in range(0, len(batch), IMAGES_AT_ONCE):
                images = normalize(next(crops).global_crops[0])
                with torch.no_grad(), autocast(self.precision, device):
                    parts.append(self.encoder.features(images, INPUTS, MAX_BLOCKS))
            features = {name: torch.cat([part[name].float() for part in parts]) for name in INPUTS}
            yield features, self.labels[[sample for _, sample in batch]].to(device)

    def _pieces(self, waiting: Waiting) -> Iterator[Crops | PhotoBatch]:
        pieces = iter(self.loader)
        for _ in range(len(_Pieces(self.order))):
            with waiting():
                piece = next(pieces)
            yield piece


class CachedFeed:
    """Features of centre crops that have been computed before: the same in every epoch."""

    checkpoint_every_epochs = 10  # an epoch takes less time than a checkpoint

    def __init__(
        self,
        features: Mapping[str, NDArray[Any]],
        labels: NDArray[np.int64],
        order: BatchOrder,
        device: torch.device,
    ) -> None:
        self.features, self.labels, self.order, self.device = features, labels, order, device

    def watch(self) -> AbstractContextManager[None]:
        return nullcontext()

    def batches(self, waiting: Waiting) -> Iterator[Batch]:
        for batch in self.order:
            samples = np.array([sample for _, sample in batch])
            with waiting():
                features = feature_rows(self.features, samples, self.device)
            yield features, torch.from_numpy(self.labels[samples]).to(self.device)


def training_crop(image_size: int) -> CropRecipe:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip at their defaults, but for the size."""
    return CropRecipe(
        size=image_size,
        scale=(0.08, 1.0),
        flip_probability=0.5,
        jitter_probability=0.0,
        jitter_strength=(0.0, 0.0, 0.0, 0.0),
        grayscale_probability=0.0,
        blur_probability=0.0,
        blur_radius=(0.0, 0.0),
        solarize_probability=0.0,
        interpolation="bilinear",
    )


class _Pieces(Sampler):
    """The batches of an order in pieces that the encoder takes at once."""

    def __init__(self, order: BatchOrder) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.order:
            for start in range(0, len(batch), IMAGES_AT_ONCE):
                yield batch[start : start + IMAGES_AT_ONCE]

    def __len__(self) -> int:
        return len(self.order) * -(-self.order.micro_batch_size // IMAGES_AT_ONCE)


def feature_rows(
    features: Mapping[str, NDArray[Any]], rows: NDArray[np.int64], device: torch.device
) -> dict[str, Tensor]:
    """Some rows of features on disk, float32 on the device, by name."""
    return {name: torch.from_numpy(features[name][rows]).to(device).float() for name in INPUTS}


def balanced_fraction(source: ImageSource, fraction: float, seed: int) -> ImageSource:
    """A share of the images with the same number of every class, at least one, drawn by the seed.

    A class with fewer images gives all it has. A smaller fraction's images are among those of a larger one.
    """
    labels = source.labels
    assert labels is not None
    number = max(1, round(fraction * len(source) / len(source.classes)))
    drawn = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(source))
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    position = np.arange(len(source)) - np.searchsorted(labels[by_class], labels[by_class])
    return source.subset(np.sort(by_class[position < number]))


def check_batch_size(batch_size: int, num_images: int, processes: int) -> None:
    """The global batch must be there, and be divisible among the processes.

    Raises:
        UserError: it is not; it proposes one.
    """
    if batch_size > num_images:
        raise UserError(
            f"batch_size is {batch_size}, but there are only {num_images} train images; give --batch_size "
            f"{max(1, num_images // processes) * processes} or less"
        )
    if batch_size % processes:
        raise UserError(
            f"batch_size is {batch_size}, not divisible by {processes} processes; give a multiple, such as "
            f"{max(1, batch_size // processes) * processes}"
        )
