"""Training batches of linear probes: features of the official training crops, or cached features.

Axis letters: B images, F feature dimensions, N images of a set.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from dino_sparo.data.images import normalize
from dino_sparo.data.loader import (
    Batch,
    BatchOrder,
    CropsDataset,
    Executor,
    crop_batches,
    crops_on_device,
    prepare_device,
)
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.views import CropKind
from dino_sparo.evaluation.probes import INPUTS, MAX_BLOCKS, Inputs, Probes
from dino_sparo.models import Encoder
from dino_sparo.parallel.distributed import local_world_size
from dino_sparo.parallel.precision import autocast
from dino_sparo.parallel.processes import memory_free
from dino_sparo.runs.runlog import RunLog
from dino_sparo.terminal import log

MAX_SIDE = 1024  # images with a longer side are reduced to this side before cropping
ROWS_AT_ONCE = 4096  # features loaded into memory at a time
IMAGES_AT_ONCE = 64  # per forward pass of the encoder; changes memory, not the result

Features = Mapping[str, NDArray[Any]]  # name -> (N, F)
ProbeBatch = tuple[Inputs, Tensor, Tensor]  # float32 inputs of the probes, labels (B,), are all finite


def training_crop(image_size: int) -> CropKind:
    """RandomResizedCrop(image_size) and RandomHorizontalFlip with torchvision's defaults."""
    return CropKind(
        size=image_size,
        scale=(0.08, 1.0),
        flip_probability=0.5,
        interpolation="bilinear",
    )


@contextmanager
def features_of_crops(
    encoder: Encoder,
    source: ImageSource,
    order: BatchOrder,
    run_log: RunLog,
    probes: Probes,
    *,
    precision: str,
    executor: Executor,
    num_workers: int,
) -> Iterator[Iterator[ProbeBatch]]:
    """Batches of features of the official training crops: random resized crop (bilinear), flip."""
    assert source.labels is not None
    labels, device = torch.from_numpy(source.labels), encoder.device
    kinds = [training_crop(encoder.image_size)]
    pieces = _Pieces(order)
    loader = crop_batches(
        CropsDataset(source, kinds, order.seed, executor=executor, max_side=MAX_SIDE),
        pieces,
        num_workers=num_workers,
        prefetch_batches=2,
        pin_memory=device.type == "cuda",
    )

    prepare_device(kinds, executor, min(IMAGES_AT_ONCE, order.micro_batch_size), device)

    def waited_for() -> Iterator[Batch]:
        loaded = iter(loader)
        for _ in range(len(pieces)):
            with run_log.waiting_for_data():
                piece = next(loaded)
            yield piece

    def batches() -> Iterator[ProbeBatch]:
        made = crops_on_device(waited_for(), kinds, device)
        for batch in order:
            parts = []
            for _ in range(0, len(batch), IMAGES_AT_ONCE):
                images = normalize(next(made).global_crops[0])
                with torch.no_grad(), autocast(precision, device):
                    parts.append(encoder.features(images, INPUTS, MAX_BLOCKS))
            features = {name: torch.cat([part[name].float() for part in parts]) for name in INPUTS}
            inputs = probes.inputs(features)
            yield inputs, labels[[sample for _, sample in batch]].to(device), all_finite(inputs.values())

    with loader.failures_explained():
        yield batches()


class _Pieces(Sampler):
    """The batches of an order, split into pieces of at most `IMAGES_AT_ONCE` images."""

    def __init__(self, order: BatchOrder) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.order:
            for start in range(0, len(batch), IMAGES_AT_ONCE):
                yield batch[start : start + IMAGES_AT_ONCE]

    def __len__(self) -> int:
        return len(self.order) * -(-self.order.micro_batch_size // IMAGES_AT_ONCE)


def features_of_rows(
    features: Features,
    source: ImageSource,
    order: BatchOrder,
    run_log: RunLog,
    device: torch.device,
    probes: Probes,
) -> Iterator[ProbeBatch]:
    """Batches of cached features, the same in every epoch.

    The inputs of the probes are held in memory, in float32, if they need at most half of the free memory.
    """
    assert source.labels is not None
    labels = torch.from_numpy(source.labels).to(device)
    held = in_memory(features, probes, device)
    finite = None if held is None else all_finite([held[0]])
    for batch in order:
        samples = np.array([sample for _, sample in batch])
        rows = torch.from_numpy(samples).to(device)
        with run_log.waiting_for_data():
            if held is None:
                inputs = probes.inputs(feature_rows(features, samples, device))
            else:
                found = held[0].index_select(0, rows)  # indexing takes five times as long
                inputs = {seen: found[:, columns] for seen, columns in held[1].items()}
        yield inputs, labels[rows], all_finite(inputs.values()) if finite is None else finite


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all elements are finite: a bool tensor on their device."""
    return torch.stack([one.sum() for one in tensors]).isfinite().all()


def in_memory(
    features: Features, probes: Probes, device: torch.device
) -> tuple[Tensor, dict[tuple[str, int], slice]] | None:
    """Inputs of the probes for all images, float32 (N, F) on the device, and the columns of each input.

    None if they need more than half of the free memory.
    """
    blocks, encoding = (features[name] for name in INPUTS)
    ranges = {probe.seen: probe.columns(probes.width, encoding.shape[1]) for probe in probes.probes}
    first, last = min(start for start, _ in ranges.values()), max(stop for _, stop in ranges.values())
    size = 4 * len(blocks) * (last - first)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_free()
    copies = 1 if device.type == "cuda" else local_world_size()  # each process has a GPU of its own
    fits = 2 * size * copies <= free
    where = "held in memory" if fits else "read from disk in every epoch, since they need too much memory"
    log.info("train features are %s: %.2f GiB in float32", where, size / 2**30)
    if not fits:
        return None
    held = torch.empty(len(blocks), last - first, device=device)
    for start in range(0, len(blocks), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        if first:
            held[rows, :-first] = torch.from_numpy(blocks[rows, first:]).to(device)
        if last:
            held[rows, -first:] = torch.from_numpy(encoding[rows]).to(device)
    return held, {seen: slice(start - first, stop - first) for seen, (start, stop) in ranges.items()}


def feature_rows(features: Features, rows: NDArray[np.int64], device: torch.device) -> dict[str, Tensor]:
    """Some rows of each feature, float32 on the device."""
    return {name: torch.from_numpy(features[name][rows]).to(device).float() for name in INPUTS}
