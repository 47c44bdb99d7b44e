"""What linear probes learn from: the official training crops through the encoder, or features kept on disk.

Axis letters: B images, F numbers of a feature, N images of a set.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
    prepare_device,
)
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.views import CropKind
from dino_sparo.evaluation.probes import INPUTS, MAX_BLOCKS
from dino_sparo.models import Encoder
from dino_sparo.parallel.precision import autocast
from dino_sparo.runs.runlog import RunLog

MAX_SIDE = 1024  # longer images are reduced to it first: no crop of a usual photograph gets larger by it
TIMEOUT_SECONDS = 600.0  # that the next images may take
IMAGES_AT_ONCE = 64  # per forward pass of the encoder; it changes memory, not the experiment

Features = Mapping[str, NDArray[Any]]  # of the images of a set, each (N, F), by name
Batch = tuple[dict[str, Tensor], Tensor]  # features (B, F) by name, float32, and labels (B,)


def training_crop(image_size: int) -> CropKind:
    """torchvision's RandomResizedCrop and RandomHorizontalFlip at their defaults, but for the size."""
    return CropKind(
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


@contextmanager
def features_of_crops(
    encoder: Encoder,
    source: ImageSource,
    order: BatchOrder,
    run_log: RunLog,
    *,
    precision: str,
    executor: Executor,
    num_workers: int,
) -> Iterator[Iterator[Batch]]:
    """The official training crops through the frozen encoder: random resized crop (bilinear), flip."""
    assert source.labels is not None
    labels, device = torch.from_numpy(source.labels), encoder.device
    recipes = [training_crop(encoder.image_size)]
    pieces = _Pieces(order)
    loader = crop_batches(
        CropsDataset(source, recipes, order.seed, executor=executor, max_side=MAX_SIDE),
        pieces,
        num_workers=num_workers,
        prefetch_batches=2,
        pin_memory=device.type == "cuda",
        timeout_seconds=TIMEOUT_SECONDS,
    )

    prepare_device(recipes, executor, min(IMAGES_AT_ONCE, order.micro_batch_size), device)

    def readable() -> Iterator[Crops | PhotoBatch]:
        loaded = iter(loader)
        for _ in range(len(pieces)):
            with run_log.waiting_for_data():
                piece = next(loaded)
            yield piece

    def batches() -> Iterator[Batch]:
        made = ahead(readable(), lambda piece: crops_of(piece, recipes, device), device)
        for batch in order:
            parts = []
            for _ in range(0, len(batch), IMAGES_AT_ONCE):
                images = normalize(next(made).global_crops[0])
                with torch.no_grad(), autocast(precision, device):
                    parts.append(encoder.features(images, INPUTS, MAX_BLOCKS))
            features = {name: torch.cat([part[name].float() for part in parts]) for name in INPUTS}
            yield features, labels[[sample for _, sample in batch]].to(device)

    with loader.failures_explained():
        yield batches()


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


def features_of_rows(
    features: Features, source: ImageSource, order: BatchOrder, run_log: RunLog, device: torch.device
) -> Iterator[Batch]:
    """Features that have been computed before: the same in every epoch."""
    assert source.labels is not None
    for batch in order:
        samples = np.array([sample for _, sample in batch])
        with run_log.waiting_for_data():
            found = feature_rows(features, samples, device)
        yield found, torch.from_numpy(source.labels[samples]).to(device)


def feature_rows(features: Features, rows: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
    """Some rows of features, float32 on the device, by name."""
    return {name: torch.from_numpy(features[name][rows]).to(device).float() for name in INPUTS}
