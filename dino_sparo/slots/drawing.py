"""Pictures of attention: images to draw on, maps drawn over them, and grids of such pictures with titles."""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from dino_sparo.data.images import normalize
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.workers import WatchedLoader, default_workers
from dino_sparo.errors import UserError
from dino_sparo.terminal import shown

TIMEOUT_SECONDS = 600.0  # for one image to come
DPI = 110
CELL_INCHES, GAP_INCHES = 1.35, 0.06  # width of a picture in a grid, and between two
TITLE_POINTS, TITLE_LINE_INCHES = 8, 0.15  # above a picture
HEADING_POINTS, HEADING_LINE_INCHES, LETTER_INCHES = 9, 0.17, 0.078  # above the grid
LONGEST = 3.0  # a picture in a grid is at most so many times as high as wide
COLORS = matplotlib.colormaps["inferno"]
OPACITIES = 0.4, 0.75  # of the color: without attention the image stays visible

Picture = NDArray[np.uint8]


def check_numbers(key: str, numbers: Sequence[int], count: int) -> None:
    """Raises UserError unless these are different numbers of `count` slots or images; `key` says of which."""
    for number in numbers:
        if not 0 <= number < count:
            raise UserError(
                f"{key} has {number}, expected numbers from 0 to {count - 1}, since there are {count} {key}; "
                f"leave {number} out"
            )
        if list(numbers).count(number) > 1:
            raise UserError(f"{key} has {number} more than once, expected different numbers; give it once")


def load_images(
    dataset: Dataset, source: ImageSource, numbers: Sequence[int], num_workers: int | None = 0
) -> Iterator[Tensor]:
    """The pixels, uint8 (3, height, width), that a dataset over `source` gives for these images, in order.

    num_workers: None takes one per core, at most 16.

    Raises:
        UserError: an image cannot be read, or is none that the dataset takes.
    """
    workers = default_workers() if num_workers is None else num_workers
    loader = WatchedLoader(
        dataset,
        image_of=int,
        name=source.name,
        num_workers=min(workers, len(numbers)),
        timeout_seconds=TIMEOUT_SECONDS,
        batch_size=None,
        sampler=numbers,
    )
    with loader.failures_explained():
        yield from loader


def attention_of_each(
    attention: Callable[[Tensor], Tensor], images: Sequence[Tensor], batch_size: int, device: torch.device
) -> list[Tensor]:
    """Attention over each of some images, (x, rows, columns) on the CPU; neighbors of one size share a pass.

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


def overlay(pixels: Tensor, attention: Tensor, peak: float) -> Picture:
    """A map drawn over its image, at the image's own size, brighter with the square root of the share.

    In proportion to the share, one patch far above all others would leave the rest without color.

    Args:
        pixels: uint8 (3, height, width).
        attention: (rows, columns), the share of each patch.
        peak: the share that gets the brightest color; where one slot's maps on several images have the
            same, their colors are comparable.

    Returns:
        uint8 (height, width, 3), bright where the attention is.
    """
    enlarged = F.interpolate(attention[None, None].float().cpu(), size=pixels.shape[1:], mode="bilinear")
    heat = (enlarged[0, 0] / peak if peak > 0 else enlarged[0, 0]).clamp(0, 1).sqrt().numpy()
    least, most = OPACITIES
    opacity = least + (most - least) * heat[..., None]
    mixed = (1 - opacity) * as_picture(pixels) + opacity * 255 * np.asarray(COLORS(heat))[..., :3]
    return mixed.round().astype(np.uint8)


def draw_slot_maps(
    pixels: Sequence[Tensor], maps: Sequence[Tensor], slots: Sequence[int], path: Path
) -> None:
    """Write a PNG: one row an image, uint8 (3, height, width), then each slot's attention over it.

    maps: of each image (L, rows, columns); the brightest color of a slot is its largest share in any image.
    """
    peaks = peaks_of(maps)
    rows = [
        [as_picture(image), *(overlay(image, of_image[slot], peaks[slot]) for slot in slots)]
        for image, of_image in zip(pixels, maps, strict=True)
    ]
    titles = [["image", *(f"slot {slot}" for slot in slots)]]
    draw_grid(rows, titles + [[""] * len(titles[0])] * (len(rows) - 1), path)


def peaks_of(maps: Sequence[Tensor]) -> list[float]:
    """The largest share of a patch in any image, for each slot: maps are (L, rows, columns) of each image."""
    return np.max([of_image.amax(dim=(1, 2)).cpu().numpy() for of_image in maps], axis=0).tolist()


def share(peak: float) -> str:
    """A share in per cent, of two digits."""
    return f"{100 * peak:.0f} %" if peak >= 0.0995 else f"{100 * peak:.1f} %"


def draw_grid(
    rows: Sequence[Sequence[Picture]], titles: Sequence[Sequence[str]], path: Path, heading: str = ""
) -> None:
    """Write a PNG of rows of pictures, each (height, width, 3), below titles and a heading of several lines.

    Pictures of a row may differ in shape, and rows in length.
    """
    heading, titles = _plain(heading), [[*map(_plain, of_row)] for of_row in titles]
    columns = max(map(len, rows))
    width = GAP_INCHES + columns * (CELL_INCHES + GAP_INCHES)
    lines = heading.split("\n") if heading else []
    page_width = max(width, LETTER_INCHES * max(map(len, lines), default=0))
    heights = [
        CELL_INCHES * min(LONGEST, max(picture.shape[0] / picture.shape[1] for picture in row))
        for row in rows
    ]
    above = [
        TITLE_LINE_INCHES * max(title.count("\n") + bool(title) for title in of_row) + GAP_INCHES
        for of_row in titles
    ]
    top = HEADING_LINE_INCHES * len(lines) + GAP_INCHES
    page_height = top + sum(heights) + sum(above) + GAP_INCHES
    figure = Figure(figsize=(page_width, page_height))
    if heading:
        below_edge = 1 - GAP_INCHES / page_height
        figure.text(
            0.5, below_edge, heading, parse_math=False, ha="center", va="top", fontsize=HEADING_POINTS
        )
    for pictures, of_row, height, title_height in zip(rows, titles, heights, above, strict=True):
        top += title_height + height
        left = (page_width - width) / 2 + GAP_INCHES
        for picture, title in zip(pictures, of_row, strict=True):
            box = left / page_width, 1 - top / page_height, CELL_INCHES / page_width, height / page_height
            axis: Any = figure.add_axes(box)
            axis.set_axis_off()
            axis.imshow(picture)
            axis.set_title(title, parse_math=False, fontsize=TITLE_POINTS, pad=2)
            left += CELL_INCHES + GAP_INCHES
    figure.savefig(path, dpi=DPI)


def remove_other_pictures(folder: Path, pattern: str, names: Collection[str]) -> None:
    """Remove files of this pattern, which an earlier run has left in its folder, but for these names."""
    for path in folder.glob(pattern):
        if path.name not in names:
            path.unlink(missing_ok=True)


def _plain(text: str) -> str:
    """Lines of names that a figure can show."""
    return "\n".join(map(shown, text.split("\n")))
