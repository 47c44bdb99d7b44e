"""Pictures of attention, drawn in color over the image in gray, and grids of pictures with titles."""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dino_sparo.data.images import evaluation_crop, normalize, to_tensor
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.workers import WatchedLoader, default_workers
from dino_sparo.errors import UserError
from dino_sparo.files import write_figure
from dino_sparo.models import Encoder
from dino_sparo.slots.attention import FULL, strength, times_uniform
from dino_sparo.terminal import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ASPECT = 16  # of a whole image; longer ones would have too many tokens
SIDES = 224, 448  # range of the short side of a picture in pixels; within it the image is not resized
GRAY, LIGHTEST = 0.3, 0.92  # gray levels of black and of white, as fractions of 255
COLOR = 255, 80, 0  # orange, which differs from gray also with color blindness
OPACITY = 0.75  # of the full color, so that the image stays visible
CELL_INCHES, GAP_INCHES = 1.6, 0.06  # width of a picture in a grid, and between two
TITLE_POINTS, TITLE_LINE_INCHES, TITLE_LETTERS_PER_INCH = 8, 0.15, 14  # above a picture
HEADING_POINTS, HEADING_LINE_INCHES, LETTER_INCHES = 9, 0.17, 0.078  # above the grid
SCALE_INCHES = 2.2, 0.12, 0.34  # of the scale: width, height, and height with its numbers
LONGEST = 3.0  # largest height of a picture in a grid, as a multiple of its width
SCALE_TEXT = "attention on a patch, as a multiple of uniform attention"

Picture = NDArray[np.uint8]


class Seen(NamedTuple):
    """An image, uint8 (3, height, width) each: `pixels` are the input of the encoder, `picture` is the same
    part of the image to draw on, at the image's resolution within the range `SIDES`."""

    pixels: Tensor
    picture: Tensor


class SeenImages(Dataset):
    """Item -> `Seen` of the evaluation crop, or of the whole image.

    Args:
        size: side of the evaluation crop in pixels.
        short_side: short side of whole images in pixels (bicubic); they are center-cropped to multiples of
            the patch size. None: evaluation crops.

    Raises:
        UserError: `short_side` is less than a patch; for an item: the image is too long.
    """

    def __init__(
        self, source: ImageSource, patch_size: int, size: int, short_side: int | None = None
    ) -> None:
        if short_side is not None and short_side < patch_size:
            raise UserError(f"short_side is {short_side}; expected at least {patch_size}, the patch size")
        self.source, self.patch_size, self.size, self.short_side = source, patch_size, size, short_side

    def __getitem__(self, index: int) -> Seen:
        image = self.source.load(index)
        short = min(image.size)
        if self.short_side is not None and max(image.size) > MAX_ASPECT * short:
            raise UserError(
                f"{self.source.name(index)} has {image.width}x{image.height} pixels; expected a long side of "
                f"at most {MAX_ASPECT} times the short side; choose other images"
            )
        least, most = SIDES
        if self.short_side is None:
            side = min(max(least, round(short * 224 / 256)), most)
            return Seen(evaluation_crop(image, self.size), evaluation_crop(image, side))
        scale = self.short_side / short
        width, height = (round(side * scale) for side in image.size)
        wide, high = (side // self.patch_size * self.patch_size for side in (width, height))
        left, top = (width - wide) // 2, (height - high) // 2
        box = left, top, left + wide, top + high
        pixels = to_tensor(image.resize((width, height), Image.Resampling.BICUBIC).crop(box))
        zoom = min(max(least, short), most) / min(wide, high)
        sides = round(zoom * wide), round(zoom * high)
        across, down = image.width / width, image.height / height
        own = left * across, top * down, (left + wide) * across, (top + high) * down
        picture = image.resize(sides, Image.Resampling.BICUBIC, box=own)
        return Seen(pixels, to_tensor(picture))


def check_numbers(key: str, numbers: Sequence[int], count: int) -> None:
    """Raises UserError unless `numbers` are distinct and from 0 to `count` - 1; `key` is slots or images."""
    for number in numbers:
        if not 0 <= number < count:
            raise UserError(
                f"{key} has {number}; expected numbers from 0 to {count - 1}, since there are {count} {key}"
            )
        if list(numbers).count(number) > 1:
            raise UserError(f"{key} has {number} more than once; give it once")


def load_seen(
    encoder: Encoder,
    source: ImageSource,
    numbers: Sequence[int],
    num_workers: int | None = 0,
    short_side: int | None = None,
) -> Iterator[Seen]:
    """Images of a source by number, as `SeenImages` of an encoder; arguments and errors of `load_images`."""
    dataset = SeenImages(source, encoder.backbone.patch_size, encoder.image_size, short_side)
    return load_images(dataset, source, numbers, num_workers)


def load_images(
    dataset: Dataset, source: ImageSource, numbers: Sequence[int], num_workers: int | None = 0
) -> Iterator[Any]:
    """The items `numbers` of a dataset over `source`, in this order.

    Args:
        num_workers: processes that load images. None: one per core, at most 16.

    Raises:
        UserError: an image cannot be read, or the dataset refuses it.
    """
    workers = default_workers() if num_workers is None else num_workers
    loader = WatchedLoader(
        dataset,
        image_of=int,
        name=source.name,
        num_workers=min(workers, len(numbers)),
        batch_size=None,
        sampler=numbers,
    )
    with loader.failures_explained():
        yield from loader


def attention_of_each(
    attention: Callable[[Tensor], Tensor], images: Sequence[Tensor], batch_size: int, device: torch.device
) -> list[Tensor]:
    """Attention over each image, (x, rows, columns) on the CPU; consecutive images of one size are batched.

    Args:
        attention: normalized images (B, 3, height, width) on the device -> (B, x, rows, columns).
        images: uint8 (3, height, width).
    """
    maps: list[Tensor] = []
    for _, alike in groupby(images, key=lambda image: image.shape):
        for pixels in torch.stack(list(alike)).split(batch_size):
            maps += attention(normalize(pixels.to(device))).cpu()
    return maps


def as_picture(pixels: Tensor) -> Picture:
    """uint8 (3, height, width) -> (height, width, 3)."""
    return pixels.permute(1, 2, 0).numpy()


def draw_attention(picture: Tensor, attention: Tensor) -> Picture:
    """Draw attention over its image in gray: in color where it is above uniform attention.

    The opacity of the color is `strength`, on the same scale in all pictures.

    Args:
        picture: uint8 (3, height, width), of any size.
        attention: on the patches (rows, columns), where attention over all tokens with CLS sums to one.

    Returns:
        uint8 (height, width, 3).
    """
    times = times_uniform(attention.float().cpu().nan_to_num())[None, None]
    times = F.interpolate(times, size=picture.shape[1:], mode="bicubic", align_corners=False)[0, 0]
    opacity = (OPACITY * strength(times)).numpy()[..., None]
    luminance = as_picture(picture) @ np.array([0.299, 0.587, 0.114])
    gray = (GRAY * 255 + (LIGHTEST - GRAY) * luminance)[..., None]
    return ((1 - opacity) * gray + opacity * np.array(COLOR)).round().astype(np.uint8)


def beside(*pictures: Picture) -> Picture:
    """Join pictures of the same height side by side."""
    gap = np.full((len(pictures[0]), max(1, len(pictures[0]) // 60), 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (gap, picture)][1:], axis=1)


def file_name(name: str, inches: float = CELL_INCHES) -> str:
    """The last part of a path, shortened to fit above a picture."""
    name, most = Path(name).name, round(inches * TITLE_LETTERS_PER_INCH)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"


def draw_grid(
    rows: Sequence[Sequence[Picture]],
    titles: Sequence[Sequence[str]],
    path: Path,
    heading: str = "",
    *,
    inches: float = CELL_INCHES,
    scale: bool = True,
) -> None:
    """Write a PNG of rows of pictures, each (height, width, 3), with titles, a heading, and the color scale.

    Pictures may differ in shape, and rows in length.

    Args:
        inches: width of a picture.
        scale: draw the color scale of attention.
    """
    from matplotlib.figure import Figure  # slow to import, and training does not need it

    heading, titles = _plain(heading), [[*map(_plain, of_row)] for of_row in titles]
    columns = max(map(len, rows))
    width = GAP_INCHES + columns * (inches + GAP_INCHES)
    lines = heading.split("\n") if heading else []
    letters = max([*map(len, lines), len(SCALE_TEXT) + 30 if scale else 0], default=0)
    page_width = max(width, LETTER_INCHES * letters)
    heights = [
        inches * min(LONGEST, max(picture.shape[0] / picture.shape[1] for picture in row)) for row in rows
    ]
    above = [
        TITLE_LINE_INCHES * max(title.count("\n") + bool(title) for title in of_row) + GAP_INCHES
        for of_row in titles
    ]
    top = HEADING_LINE_INCHES * len(lines) + GAP_INCHES
    scale_top = top
    top += scale * SCALE_INCHES[2]
    page_height = top + sum(heights) + sum(above) + GAP_INCHES
    figure = Figure(figsize=(page_width, page_height))
    left = GAP_INCHES
    if heading:
        at = left / page_width, 1 - GAP_INCHES / page_height
        figure.text(*at, heading, parse_math=False, va="top", fontsize=HEADING_POINTS)
    if scale:
        _draw_scale(figure, left, scale_top, page_width, page_height)
    for pictures, of_row, height, title_height in zip(rows, titles, heights, above, strict=True):
        top += title_height + height
        left = GAP_INCHES
        for picture, title in zip(pictures, of_row, strict=True):
            box = left / page_width, 1 - top / page_height, inches / page_width, height / page_height
            axis: Any = figure.add_axes(box, anchor="N")
            axis.set_axis_off()
            axis.imshow(picture)
            axis.set_title(title, parse_math=False, fontsize=TITLE_POINTS, pad=2)
            left += inches + GAP_INCHES
    write_figure(path, figure)


def _draw_scale(figure: "Figure", left: float, top: float, page_width: float, page_height: float) -> None:
    """Draw the color scale, `left` and `top` inches from the upper left corner."""
    width, height, _ = SCALE_INCHES
    box = left + 0.25, page_height - top - height, width, height
    axis: Any = figure.add_axes(
        (box[0] / page_width, box[1] / page_height, box[2] / page_width, box[3] / page_height)
    )
    weight = np.linspace(0, OPACITY, 100)[:, None]
    middle = (GRAY + LIGHTEST) / 2 * 255
    axis.imshow(
        ((1 - weight) * middle + weight * np.array(COLOR)).round().astype(np.uint8)[None],
        aspect="auto",
        extent=(0, 1, 0, 1),
    )
    steps = 2.0 ** np.arange(np.log2(FULL) + 1)
    labels = [f"{step:.0f}" for step in steps]
    axis.set_xticks(
        np.log(steps) / np.log(FULL), [f"{labels[0]} or less", *labels[1:-1], f"{labels[-1]} or more"]
    )
    axis.set_yticks([])
    axis.tick_params(labelsize=TITLE_POINTS, length=2, pad=1)
    text = (left + width + 0.75) / page_width, 1 - (top + height / 2) / page_height
    figure.text(*text, SCALE_TEXT, va="center", fontsize=HEADING_POINTS)


def remove_other_pictures(folder: Path, pattern: str, names: Collection[str]) -> None:
    """Remove files of this pattern except `names`: they are from an earlier call."""
    for path in folder.glob(pattern):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _plain(text: str) -> str:
    """Text with unprintable characters escaped, line by line."""
    return "\n".join(map(shown, text.split("\n")))
