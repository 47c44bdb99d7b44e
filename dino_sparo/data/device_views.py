"""Views of whole batches on the training device, from the same random numbers as PIL's; workers only decode.

Crop and resize are two batched matrix products with PIL's kernel, each rounded to 8 bits as in PIL; the flip
is part of the matrix. Colors are changed by `color`. Source of the kernel: Pillow's Resample.c.

Axis letters: B images, C crops, S side of a crop, H and W sides of the canvas that contains an image.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_sparo.data import color
from dino_sparo.data.views import CropKind, View
from dino_sparo.parallel.device import compiled, what_is_wrong, why_not_compiled
from dino_sparo.terminal import log

Item = TypeVar("Item")
Made = TypeVar("Made", bound=tuple[Any, ...])

CANVAS_TO_COMPILE = 416, 608  # no crop's size: the compiler assumes that equal sizes always stay equal
IMAGES_AT_ONCE = 32  # images that share a canvas as large as the largest of them
CANVAS_STEP = 32  # pixels; sides are multiples of it: fast matrix products, few shapes
UNCOMPILED = (  # estimated from the bytes that are moved
    "WARNING: the code that makes views on the GPU cannot be compiled (%s) and takes about ten times as "
    "long (estimated: 0.5 ms per image on an H200, as long as the training step); install a C compiler and "
    "Python's headers"
)
TOP, LEFT, HEIGHT, WIDTH, FLIP, SOLARIZE = range(6)
JITTER = slice(6, 26)
BLUR = slice(26, None)
CONTRAST, SATURATION, HUE = 1, 2, 3  # numbers of adjustments; brightness is 0


class Photos(NamedTuple):
    """Decoded images of any size, and the numbers of their crops.

    pixels: uint8, the pixels (height, width, 3) of all images, flattened and concatenated. places: int64
    (B, 3), index of each image's first pixel, height, and width. numbers: float32 (C, B, 26 + blur taps).
    """

    pixels: Tensor
    places: Tensor
    numbers: Tensor


def numbers_of(view: View, taps: int) -> list[float]:
    """A view as numbers: box, flip, solarize, steps of the jitter, weights of the blur."""
    box = [view.top, view.left, view.height, view.width, view.flip, view.solarize]
    return [*map(float, box), *jitter_steps(view), *color.blur_weights(view.blur_radius, taps)]


def jitter_steps(view: View) -> list[float]:
    """The steps of `color.jitter` for a view; without jitter, steps that change nothing."""
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
    """A batch of `batch_size` images that repeats these."""
    chosen = torch.arange(batch_size) % len(photos.places)
    return Photos(photos.pixels, photos.places[chosen], photos.numbers[:, chosen])


def compile_views(groups: Sequence[Sequence[CropKind]], batch_size: int, device: torch.device) -> None:
    """Compile `make_crops` on a GPU for batches of this size; otherwise the first batch waits for it."""
    taps = max(color.blur_taps(kind.blur_radius[1]) for group in groups for kind in group)
    numbers = [[1.0] * (BLUR.start + taps)] * sum(map(len, groups))
    image = torch.zeros(*CANVAS_TO_COMPILE, 3, dtype=torch.uint8), numbers
    with torch.cuda.device(device):  # each thread has its own
        make_crops(repeated(collate_photos([image]), batch_size), groups, device)


def make_crops(
    photos: Photos,
    groups: Sequence[Sequence[CropKind]],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """All crops, uint8 on the device: (C_i, B, 3, S, S) per group of equal size. No host synchronization.

    Args:
        dtype: of pixels and weights in products, whose sums are float32; None: float16 on a GPU, which
            represents every pixel exactly, and weights with a relative error of 2^-11, as TF32 does.
    """
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.float16)
    sizes = [kind[0].size for kind in groups]
    interpolations = [kind[0].interpolation for kind in groups]
    num_images = len(photos.places)
    shapes = photos.places[:, 1:].tolist()  # on the host
    pixels, places, numbers = (x.to(device, non_blocking=True) for x in photos)
    of_groups = numbers.split([len(group) for group in groups])  # (C_i, B, 26 + taps) each
    resize, color_all = (_fast(function, device) for function in (_resized_crops, _colors))
    done = []
    num_parts = -(-num_images // IMAGES_AT_ONCE)
    for number in range(num_parts):
        part = slice(number * num_images // num_parts, (number + 1) * num_images // num_parts)
        canvas = [-(-max(sides) // CANVAS_STEP) * CANVAS_STEP for sides in zip(*shapes[part], strict=True)]
        boxes = [of_group[:, part, : FLIP + 1].transpose(0, 1) for of_group in of_groups]
        done.append(resize(pixels, places[part], boxes, sizes, interpolations, *canvas, dtype))
    crops = []
    for group, of_group, parts in zip(groups, of_groups, zip(*done, strict=True), strict=True):
        images = torch.cat(parts, dim=1)
        if any(map(_has_colors, group)):
            flat = of_group.flatten(0, 1)
            steps = flat[:, JITTER], flat[:, BLUR], flat[:, SOLARIZE]
            images = color_all(images.flatten(0, 1), *steps).view_as(images)
        crops.append(images)
    return crops


def ahead(items: Iterable[Item], make: Callable[[Item], Made], device: torch.device) -> Iterator[Made]:
    """Apply `make` to the items, on a GPU one item ahead in a second stream.

    `make` returns tuples; their tensors may be used in the stream that is current when they are yielded.
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
    """PIL's weights for resizing parts of a line: float32 (..., crop_size, side), each row sums to one.

    boxes: (..., 2), start of each part on a line of `side` pixels, and its length. flip: (...), 1 mirrors the
    result.
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


def _canvas(pixels: Tensor, places: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Images from the flat pixels, (B, 3, H, W); the pixels at the edges of an image continue beyond them."""
    y, x = (torch.arange(side, device=pixels.device, dtype=torch.int32) for side in (height, width))
    rows, columns = (column[:, None, None].int() for column in places[:, 1:].unbind(1))
    within = torch.minimum(y[:, None], rows - 1) * columns + torch.minimum(x, columns - 1)
    number = places[:, :1, None] + within  # (B, H, W)
    return pixels.view(-1, 3)[number].permute(0, 3, 1, 2).to(dtype).contiguous()


def _resized_crops(
    pixels: Tensor,
    places: Tensor,
    boxes: Sequence[Tensor],
    sizes: Sequence[int],
    interpolations: Sequence[str],
    height: int,
    width: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Crops (C_i, B, 3, S, S) uint8 of each group; its boxes (B, C_i, 5) are position, size, and flip."""
    canvas = _canvas(pixels, places, height, width, dtype)
    # First the lines (B, C * S, 3 * H) of all groups, rounded between the passes as in PIL, then the columns.
    weights = [
        resize_weights(box[..., LEFT : WIDTH + 1 : 2], size, width, interpolation, box[..., FLIP])
        .flatten(1, 2)
        .to(dtype)
        for box, size, interpolation in zip(boxes, sizes, interpolations, strict=True)
    ]
    all_lines = _product(torch.cat(weights, dim=1), canvas.flatten(1, 2).transpose(1, 2))
    crops = []
    of_groups = all_lines.split([one.shape[1] for one in weights], dim=1)
    for box, size, interpolation, lines in zip(boxes, sizes, interpolations, of_groups, strict=True):
        by_column = _rounded(lines).to(dtype).reshape(-1, size * 3, height)  # (B * C, S * 3, H)
        rows = resize_weights(box[..., TOP : HEIGHT + 1 : 2], size, height, interpolation).to(dtype)
        done = _product(by_column, rows.flatten(0, 1).transpose(1, 2))  # (B * C, S * 3, S)
        made = _rounded(done).to(torch.uint8).view(len(places), -1, size, 3, size)
        crops.append(made.permute(1, 0, 3, 4, 2).contiguous())
    return crops


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Batched matrix product with sums in float32."""
    if one.dtype == torch.float32 or one.device.type == "cpu":
        return torch.bmm(one.float(), other.float())
    return torch.bmm(one, other, out_dtype=torch.float32)


def _rounded(x: Tensor) -> Tensor:
    return (x + 0.5).floor().clamp(0, 255)


def _has_colors(kind: CropKind) -> bool:
    """Whether anything follows the crop."""
    probabilities = kind.jitter_probability, kind.grayscale_probability, kind.blur_probability
    return max(*probabilities, kind.solarize_probability) > 0


def _colors(images: Tensor, jitter: Tensor, blur: Tensor, solarize: Tensor) -> Tensor:
    """Jitter, grayscale, blur, and solarization: uint8 (n, 3, S, S)."""
    return color.solarize(color.blur(color.jitter(images, jitter), blur), solarize == 1)


@cache
def _fast(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function compiled on a GPU, one graph for all sizes; without a compiler the function itself."""
    if device.type != "cuda" or why_not_compiled():
        return function
    fast = compiled(function, fullgraph=True, dynamic=True)

    def run(*arguments: Any) -> Any:
        nonlocal fast
        try:
            return fast(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # training continues after any failure of the compiler
            if fast is not function:
                log.warning(UNCOMPILED, what_is_wrong(error))
            fast = function
            return function(*arguments)

    return run
