"""Deterministic, resumable batches of crops.

Workers return uint8 pixels: crops, or whole images if the training device makes the crops.
Axis letters: B images, C crops.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info
from torchvision.utils import make_grid

from dino_sparo.data import color, pil_views
from dino_sparo.data.decode import UnreadableImageError
from dino_sparo.data.device_views import (
    UNCOMPILED,
    Photos,
    ahead,
    collate_photos,
    compile_views,
    make_crops,
    numbers_of,
    to_pixels,
)
from dino_sparo.data.images import normalize, to_tensor
from dino_sparo.data.index import IndexedSource
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.views import NUM_GLOBAL_CROPS, CropKind, View, draw_view, sample_order, substitute_sample
from dino_sparo.data.workers import PATIENCE_SECONDS, WatchedLoader
from dino_sparo.errors import UserError
from dino_sparo.parallel.device import why_not_compiled
from dino_sparo.parallel.distributed import first_rank_first
from dino_sparo.terminal import log

SUBSTITUTE_TRIES = 10
WORKERS_FOR_PIL = 16  # PIL takes 16 ms per image; a GPU's step with uncompiled views about 1 ms per image

Executor = Literal["pil", "device"]  # what makes the views: PIL in workers, or the training device
Replaced = tuple[str, str]  # name of an image that another one replaces, and why it cannot be read


class Crops(NamedTuple):
    """A batch: global crops (2, B, 3, side, side) and local crops (C - 2, B, 3, side, side), uint8."""

    global_crops: Tensor
    local_crops: Tensor
    replaced: tuple[Replaced, ...] = ()


class PhotoBatch(NamedTuple):
    """A batch of images whose crops are not made yet, and `replaced` as in `Crops`."""

    photos: Photos
    replaced: tuple[Replaced, ...] = ()


Batch = Crops | PhotoBatch


class LoadedImage(NamedTuple):
    """Crops of one image, uint8 (3, side, side), global ones first; or the image and the crops' numbers."""

    made: list[Tensor] | tuple[Tensor, list[list[float]]]
    replaced: list[Replaced]


@dataclass(eq=False)
class CropsDataset(Dataset):
    """Item (epoch, sample) -> the crops of one image.

    With `substitute`, another image replaces one that cannot be read; it is drawn from (seed, epoch, sample)
    and does not depend on workers or processes. After ten bad images in a row, the error of the first is
    raised. An image with a side longer than `max_side` is resized first.
    """

    source: ImageSource
    crop_kinds: Sequence[CropKind]
    seed: int
    _: KW_ONLY
    substitute: bool = False
    executor: Executor = "pil"
    max_side: int | None = None

    def __post_init__(self) -> None:
        self.blur_taps = max(color.blur_taps(kind.blur_radius[1]) for kind in self.crop_kinds)

    def __getitem__(self, item: tuple[int, int]) -> LoadedImage:
        epoch, sample = item
        image, replaced = self._load(epoch, sample)
        views = self.views_of(image, epoch, sample)
        if isinstance(image, Tensor):
            return LoadedImage((image, [numbers_of(view, self.blur_taps) for view in views]), replaced)
        return LoadedImage([to_tensor(pil_views.execute(image, view)) for view in views], replaced)

    def views_of(self, image: Image.Image | Tensor, epoch: int, sample: int) -> list[View]:
        """The random numbers of all crops of an image."""
        height, width = image.shape[:2] if isinstance(image, Tensor) else image.size[::-1]
        size = {"image_width": width, "image_height": height}
        return [
            draw_view(kind, seed=self.seed, epoch=epoch, sample=sample, crop=crop, **size)
            for crop, kind in enumerate(self.crop_kinds)
        ]

    def _open(self, number: int) -> Image.Image | Tensor:
        """An image of the source, for views by PIL or on the device. Raises UnreadableImageError."""
        if self.executor == "device" and isinstance(self.source, IndexedSource) and get_worker_info():
            return self.source.pixels(number, self.max_side)
        image = self.source.load(number, self.max_side)
        return to_pixels(image) if self.executor == "device" else image

    def _load(self, epoch: int, sample: int) -> tuple[Image.Image | Tensor, list[Replaced]]:
        """An image or its substitute, and the images that were replaced."""
        errors: list[UnreadableImageError] = []
        number, num_samples = sample, len(self.source)
        while True:
            try:
                return self._open(number), [(error.name, error.reason) for error in errors]
            except UnreadableImageError as error:
                errors.append(error)
            attempt = len(errors)
            if not self.substitute or attempt == SUBSTITUTE_TRIES:
                raise errors[0]
            number = substitute_sample(
                seed=self.seed, epoch=epoch, sample=sample, attempt=attempt, num_samples=num_samples
            )


@dataclass(kw_only=True, eq=False)
class BatchOrder(Sampler):
    """Yields the (epoch, sample) pairs of each micro-batch, from an optimizer step to the end of the run.

    Every epoch is one permutation, cut into global batches; the last partial one is dropped. Rank r of R
    gets the r-th of R equal slices of each global batch, in `accumulation` equal micro-batches, so global
    batches do not depend on the number of processes.
    """

    num_samples: int
    global_batch_size: int
    epochs: int
    seed: int
    first_step: int = 0
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    def __post_init__(self) -> None:
        assert self.global_batch_size % (self.world_size * self.accumulation) == 0
        self.micro_batch_size = self.global_batch_size // (self.world_size * self.accumulation)
        self.steps_per_epoch = self.num_samples // self.global_batch_size

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
        """The numbers of the images of all processes in a step (counted from 1)."""
        epoch, number = divmod(step - 1, self.steps_per_epoch)
        order = sample_order(seed=self.seed, epoch=epoch, num_samples=self.num_samples)
        return order[number * self.global_batch_size : (number + 1) * self.global_batch_size].tolist()


def choose_executor(
    name: Literal["auto", "pil", "device"],
    device: torch.device,
    *,
    max_side: int | None,
    num_workers: int | None = None,
) -> Executor:
    """Choose what makes the views: `auto` is the GPU if there is one and `max_side` is set, else PIL.

    If code for the GPU cannot be compiled, `auto` is PIL if there are enough workers to be faster.

    Args:
        num_workers: of this process; None if the GPU may be on another machine.

    Raises:
        UserError: the device is to make the views, but `max_side` is None.
    """
    if name == "device" and max_side is None:
        raise UserError(
            "machine.views is device, which needs whole images of bounded size, but data.max_side is null; "
            "set data.max_side 1024, or machine.views pil"
        )
    if name != "device" and ((name, device.type) != ("auto", "cuda") or not max_side):
        return "pil"
    if num_workers is not None and device.type == "cuda" and (reason := why_not_compiled()):
        if name == "auto" and num_workers >= WORKERS_FOR_PIL:
            log.warning(
                "WARNING: %d workers make the views with PIL, since code for the GPU cannot be compiled "
                "(%s); with a C compiler and Python's headers, an eighth of the workers would be enough",
                *(num_workers, reason),
            )
            return "pil"
        log.warning(UNCOMPILED, reason)
    return "device"


def prepare_device(
    kinds: Sequence[CropKind], executor: Executor, batch_size: int, device: torch.device
) -> None:
    """Compile `make_crops` on a GPU: on each machine one process first, whose code the others then use.

    All processes must call it, also on a machine that cannot compile.
    """
    if executor != "device" or device.type != "cuda":
        return

    def work() -> None:
        if not why_not_compiled():
            log.info("compiling the code that makes views on the GPU: up to a minute if it is not stored yet")
            compile_views(_in_groups(kinds), batch_size, device)

    first_rank_first(work)


def crop_batches(
    dataset: CropsDataset,
    order: Sampler,
    *,
    num_workers: int,
    prefetch_batches: int,
    pin_memory: bool,
    timeout_seconds: float = PATIENCE_SECONDS,
) -> WatchedLoader:
    """Batches of `Crops` or `PhotoBatch` for (epoch, sample) pairs, made by workers."""
    return WatchedLoader(
        dataset,
        image_of=itemgetter(1),
        name=dataset.source.name,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
        batch_sampler=order,
        collate=collate_crops,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_batches if num_workers else None,
    )


def collate_crops(images: list[LoadedImage]) -> Batch:
    """The crops of images -> one batch, crop-major."""
    made: list[Any] = [image.made for image in images]
    replaced = tuple(one for image in images for one in image.replaced)
    if isinstance(made[0], tuple):
        return PhotoBatch(collate_photos(made), replaced)
    groups = _in_groups([torch.stack(crops) for crops in zip(*made, strict=True)])
    return _as_crops([torch.stack(list(group)) for group in groups], replaced)


def crops_of(batch: Batch, kinds: Sequence[CropKind], device: torch.device) -> Crops:
    """The crops of a batch, copied to the device or made there."""
    if isinstance(batch, PhotoBatch):
        return _as_crops(make_crops(batch.photos, _in_groups(kinds), device), batch.replaced)
    global_crops, local_crops = (crops.to(device, non_blocking=True) for crops in batch[:2])
    return Crops(global_crops, local_crops, batch.replaced)


def crops_on_device(
    batches: Iterable[Batch], kinds: Sequence[CropKind], device: torch.device
) -> Iterator[Crops]:
    """Batches from workers -> crops on the device, made or copied there; on a GPU one batch in advance."""
    return ahead(batches, lambda batch: crops_of(batch, kinds, device), device)


def normalized(crops: Crops) -> list[Tensor]:
    """uint8 crops -> normalized groups (C_i, B, 3, side, side), the two global crops first."""
    return [normalize(x) for x in (crops.global_crops, crops.local_crops) if x.numel()]


def _in_groups(by_crop: Sequence[Any]) -> list[Sequence[Any]]:
    """Split one entry per crop into those of global and of local crops, if there are any."""
    groups = [by_crop[:NUM_GLOBAL_CROPS], by_crop[NUM_GLOBAL_CROPS:]]
    return [group for group in groups if group]


def _as_crops(groups: Sequence[Tensor], replaced: tuple[Replaced, ...]) -> Crops:
    no_crops = groups[0].new_empty(0, groups[0].shape[1], 3, 0, 0)
    return Crops(groups[0], groups[1] if len(groups) > 1 else no_crops, replaced)


def crops_picture(crops: Crops, num_images: int = 4) -> Tensor:
    """The crops of the first images, one row per image: float (3, height, width) in 0..1."""
    margin = crops.global_crops.shape[-1] - crops.local_crops.shape[-1]
    local_crops = F.pad(crops.local_crops, (0, margin, 0, margin), value=255)
    by_image = torch.cat([crops.global_crops, local_crops])[:, :num_images].transpose(0, 1)  # (B, C, ...)
    return make_grid(by_image.flatten(0, 1).float() / 255, nrow=by_image.shape[1], pad_value=1.0)
