"""Views of whole batches on the training device: workers only decode. Executes the same numbers as PIL.

Crop and resize are two batched matrix products by PIL's kernel, rounded to 8 bits after each as PIL does; the
flip is part of the matrix. The colors are those of `color`. Source of the kernel: Pillow's Resample.c.

Axis letters: B images, C crops, S side of a crop, H and W sides of the canvas that holds an image.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_sparo.data import color
from dino_sparo.data.views import CropKind, View
from dino_sparo.parallel.device import compiled

log = logging.getLogger("dino_sparo")

Item = TypeVar("Item")
Made = TypeVar("Made", bound=tuple[Any, ...])

IMAGES_AT_ONCE = 32  # share a canvas, which is as large as the largest of them
CANVAS_STEP = 32  # pixels; sides are multiples, so that matrix products are fast and few shapes occur
TOP, LEFT, HEIGHT, WIDTH, FLIP, SOLARIZE = range(6)
JITTER = slice(6, 26)
BLUR = slice(26, None)
CONTRAST, SATURATION, HUE = 1, 2, 3  # of the adjustments; the first is the brightness


class Photos(NamedTuple):
    """Decoded images of any sizes, and the numbers of their crops.

    pixels: uint8, (height, width, 3) of one image after the other, flat. places: int64 (B, 3), the number of
    each image's first pixel, its height and width. numbers: float32 (C, B, 26 + taps of the blur).
    """

    pixels: Tensor
    places: Tensor
    numbers: Tensor


def numbers_of(view: View, taps: int) -> list[float]:
    """A view as numbers: box, flip, solarize, steps of the jitter, weights of the blur."""
    box = [view.top, view.left, view.height, view.width, view.flip, view.solarize]
    return [*map(float, box), *jitter_steps(view), *color.blur_weights(view.blur_radius, taps)]


def jitter_steps(view: View) -> list[float]:
    """The steps of `color.jitter` for a view; such that change nothing for one without."""
    steps = [[*color.NOTHING], [*color.NOTHING]]
    part, places = 0, [*color.BLENDS_BEFORE]
    contrast = 1.0
    for adjustment in view.jitter_order:
        factor = view.jitter_factors[adjustment]
        if adjustment == CONTRAST:
            contrast, part, places = factor, 1, [*color.BLENDS_BEFORE]
        elif adjustment == HUE:
            steps[part][color.SHIFT] = float(np.int32(factor * 255) % 256)
            places = [*color.BLENDS_AFTER]
        else:
            kind_at, factor_at = places.pop(0)
            steps[part][kind_at] = float(adjustment == SATURATION)
            steps[part][factor_at] = factor
    return [*steps[0], contrast, *steps[1], float(view.grayscale)]


def to_pixels(image: Image.Image) -> Tensor:
    """PIL RGB -> uint8 (height, width, 3)."""
    return torch.from_numpy(np.array(image))


def collate_photos(images: Sequence[tuple[Tensor, Sequence[Sequence[float]]]]) -> Photos:
    """Images, each uint8 (height, width, 3) and the numbers (C, ...) of its crops, as one batch."""
    shapes = [pixels.shape[:2] for pixels, _ in images]
    starts = accumulate((height * width for height, width in shapes[:-1]), initial=0)
    return Photos(
        torch.cat([pixels.flatten() for pixels, _ in images]),
        torch.tensor([(start, *shape) for start, shape in zip(starts, shapes, strict=True)]),
        torch.tensor([numbers for _, numbers in images]).transpose(0, 1).contiguous(),
    )


def repeated(photos: Photos, batch_size: int) -> Photos:
    """So many images, over and over the same ones."""
    chosen = torch.arange(batch_size) % len(photos.places)
    return Photos(photos.pixels, photos.places[chosen], photos.numbers[:, chosen])


def make_crops(photos: Photos, groups: Sequence[Sequence[CropKind]], device: torch.device) -> list[Tensor]:
    """All crops, uint8 on the device: (C_i, B, 3, S, S) for each group of equally large ones. Never waits."""
    shapes = photos.places[:, 1:].tolist()  # on the host
    pixels, places, numbers = (x.to(device, non_blocking=True) for x in photos)
    resized: list[list[Tensor]] = [[] for _ in groups]
    of_groups = numbers.split([len(group) for group in groups])  # (C_i, B, 26 + taps) each
    for first in range(0, len(shapes), IMAGES_AT_ONCE):
        part = slice(first, first + IMAGES_AT_ONCE)
        height, width = (
            -(-max(side) // CANVAS_STEP) * CANVAS_STEP for side in zip(*shapes[part], strict=True)
        )
        canvas = _canvas(pixels, places[part], height, width)
        for group, of_group, done in zip(groups, of_groups, resized, strict=True):
            boxes = of_group[:, part, : FLIP + 1].transpose(0, 1)
            with _fast_products(device):
                resize = _fast(_resized_crops, device)
                done.append(resize(canvas, boxes, group[0].size, group[0].interpolation))
    crops = []
    for group, of_group, done in zip(groups, of_groups, resized, strict=True):
        images = torch.cat(done, dim=1)
        if any(map(_has_colors, group)):
            flat = of_group.flatten(0, 1)
            steps = flat[:, JITTER], flat[:, BLUR], flat[:, SOLARIZE]
            images = _fast(_colors, device)(images.flatten(0, 1), *steps).view_as(images)
        crops.append(images)
    return crops


def ahead(items: Iterable[Item], make: Callable[[Item], Made], device: torch.device) -> Iterator[Made]:
    """What `make` makes of the items, one ahead of its use: on a GPU in a stream beside the training's.

    It makes tuples, whose tensors may be used in the stream that is current when they are taken.
    """
    if device.type != "cuda":
        yield from map(make, items)
        return
    stream = torch.cuda.Stream(device)

    def begin(item: Item) -> tuple[Made, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return make(item), stream.record_event()

    begun = map(begin, items)
    ahead_of_use = next(begun, None)
    while ahead_of_use is not None:
        made, ready = ahead_of_use
        ahead_of_use = next(begun, None)
        current = torch.cuda.current_stream(device)
        current.wait_event(ready)
        for value in made:
            if isinstance(value, Tensor):
                value.record_stream(current)
        yield made


def resize_weights(
    boxes: Tensor, crop_size: int, side: int, interpolation: str, flip: Tensor | None = None
) -> Tensor:
    """PIL's weights of resizing parts of a line: float32 (..., crop_size, side), each row sums to one.

    boxes: (..., 2), where a part begins on a line of `side` pixels, and its length. `flip` (...) turns
    the result round where it is 1.
    """
    start, length = boxes[..., :1, None], boxes[..., 1:, None]
    at = torch.arange(crop_size, device=boxes.device, dtype=torch.float32)[:, None]
    if flip is not None:
        at = torch.where(flip[..., None, None] == 1, crop_size - 1 - at, at)
    scale = length / crop_size
    stretch = scale.clamp(min=1)  # the kernel grows when the image shrinks
    center = (at + 0.5) * scale
    reach = (2.0 if interpolation == "bicubic" else 1.0) * stretch
    first = (center - reach + 0.5).floor().clamp(min=0)
    end = torch.minimum((center + reach + 0.5).floor(), length)
    x = torch.arange(side, device=boxes.device, dtype=torch.float32) - start
    weights = _kernel((x - center + 0.5) / stretch, interpolation)
    weights = torch.where((x >= first) & (x < end), weights, 0)
    return weights / weights.sum(dim=-1, keepdim=True)


def _kernel(x: Tensor, interpolation: str) -> Tensor:
    x = x.abs()
    if interpolation == "bilinear":
        return (1 - x).clamp(min=0)
    inner = (1.5 * x - 2.5) * x * x + 1  # a = -0.5
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0))


def _canvas(pixels: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """Images out of the flat pixels, float32 (B, 3, H, W); beyond its edges an image's last pixels go on."""
    y, x = (torch.arange(side, device=pixels.device) for side in (height, width))
    start, rows, columns = (column[:, None, None] for column in places.unbind(1))
    number = (
        start + torch.minimum(y[:, None], rows - 1) * columns + torch.minimum(x, columns - 1)
    )  # (B, H, W)
    return pixels.view(-1, 3)[number].permute(0, 3, 1, 2).float().contiguous()


def _resized_crops(canvas: Tensor, boxes: Tensor, size: int, interpolation: str) -> Tensor:
    """Crops (C, B, 3, S, S) uint8 of the canvas (B, 3, H, W); boxes (B, C, 5): place, size and flip."""
    images, _, height, width = canvas.shape
    crops = boxes.shape[1]
    columns = resize_weights(boxes[..., LEFT : WIDTH + 1 : 2], size, width, interpolation, boxes[..., FLIP])
    rows = resize_weights(boxes[..., TOP : HEIGHT + 1 : 2], size, height, interpolation)
    # First all lines (B, 3 * H, C * S), rounded as PIL does between its passes, then all columns.
    lines = _rounded(torch.bmm(canvas.flatten(1, 2), columns.flatten(1, 2).transpose(1, 2)))
    by_crop = lines.view(images, 3, height, crops, size).permute(0, 3, 2, 1, 4)  # (B, C, H, 3, S)
    done = torch.bmm(rows.flatten(0, 1), by_crop.reshape(images * crops, height, 3 * size))
    pixels = _rounded(done).to(torch.uint8).view(images, crops, size, 3, size)
    return pixels.permute(1, 0, 3, 2, 4).contiguous()


def _rounded(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)


def _has_colors(recipe: CropKind) -> bool:
    """Whether anything follows the crop."""
    probabilities = recipe.jitter_probability, recipe.grayscale_probability, recipe.blur_probability
    return max(*probabilities, recipe.solarize_probability) > 0


def _colors(images: Tensor, jitter: Tensor, blur: Tensor, solarize: Tensor) -> Tensor:
    """All that follows the crop: uint8 (n, 3, S, S)."""
    return color.solarize(color.blur(color.jitter(images, jitter), blur), solarize == 1)


@cache
def _fast(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """A few compiled kernels on a GPU, one for all sizes; without a compiler it is only slower."""
    if device.type != "cuda":
        return function
    fast = compiled(function, fullgraph=True, dynamic=True)
    numbers = torch.ones(2, 26, device=device)
    try:
        if function is _colors:
            images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=device)
            fast(images, numbers[:, JITTER], numbers[:, :3], numbers[:, SOLARIZE])
        else:
            fast(torch.zeros(2, 3, 64, 96, device=device), numbers.view(2, 2, 13)[..., :5], 48, "bicubic")
    except Exception as error:  # whatever is wrong with the compiler, training can go on
        log.warning("WARNING: the views cannot be compiled and are slower (%s)", str(error).split("\n")[0])
        return function
    return fast


@contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """TF32 on a GPU: pixels are exact in it, and weights by a thousandth."""
    before = torch.get_float32_matmul_precision()
    try:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        yield
    finally:
        torch.set_float32_matmul_precision(before)
