"""Attention of chosen slots over chosen images, beside that of the CLS token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dino_sparo.data.images import evaluation_crop, to_tensor
from dino_sparo.data.sources import ImageSource
from dino_sparo.errors import UserError
from dino_sparo.models import Encoder
from dino_sparo.slots.attention import cls_attention, distinct_slots, slot_attention
from dino_sparo.slots.drawing import (
    as_picture,
    attention_of_each,
    check_numbers,
    draw_grid,
    load_images,
    overlay,
    peaks_of,
    remove_other_pictures,
    share,
)

NUM_SLOTS = 8  # where none are named
MAX_ASPECT = 16  # a longer image would have more tokens than one can see or compute


def slot_maps(
    encoder: Encoder,
    source: ImageSource,
    folder: Path,
    *,
    slots: Sequence[int] | None = None,
    images: Sequence[int] | None = None,
    num_images: int = 6,
    short_side: int | None = None,
    batch_size: int = 64,
    num_workers: int | None = 0,
) -> dict[str, Any]:
    """Write grid.png and an overlay for each image and slot into the folder; others of this name go.

    In grid and overlays the brightest color of a slot is its largest share of a patch in all images shown.

    Args:
        encoder: with slots, in evaluation mode, used on its device.
        slots: numbers of slots; None takes eight that look at different places.
        images: numbers of images; None takes `num_images` spread evenly.
        short_side: draw whole images with this short side in pixels; None takes the evaluation's crops.

    Returns:
        plain values: names of images, slots, and the pictures' files: `grid`, and `overlays` by image number,
        then `cls` or the slot.

    Raises:
        UserError: a number is not that of a slot or an image, or an image cannot be read or is too small.
    """
    if slots is not None:
        check_numbers("slots", slots, encoder.num_slots)
    if images is not None:
        check_numbers("images", images, len(source))
    spread = np.linspace(0, len(source) - 1, min(num_images, len(source))).round().astype(int).tolist()
    numbers = spread if images is None else list(images)
    dataset = MapImages(source, encoder.backbone.patch_size, encoder.image_size, short_side)
    pixels = list(load_images(dataset, source, numbers, num_workers))
    of_slots, of_cls = (
        attention_of_each(attention, pixels, batch_size, encoder.device)
        for attention in (
            lambda x: slot_attention(encoder, x)[0],
            lambda x: cls_attention(encoder, x).mean(dim=1, keepdim=True),
        )
    )
    chosen = list(slots or distinct_slots(of_slots, NUM_SLOTS))
    folder.mkdir(parents=True, exist_ok=True)
    overlays = _draw(folder, pixels, numbers, of_cls, [maps[chosen] for maps in of_slots], chosen)
    names = {name for of_image in overlays.values() for name in of_image.values()}
    remove_other_pictures(folder, "image*_*.png", names)
    return {
        "images": [source.name(number) for number in numbers],
        "slots": chosen,
        "grid": "grid.png",
        "overlays": overlays,
    }


class MapImages(Dataset):
    """Item -> the evaluation crop of an image, uint8 (3, size, size), or the whole image, uint8 (3, height,
    width), its short side resized to `short_side` (bicubic).

    What both sides of a whole image have beyond multiples of the patch is cut off, the same on either side.
    An image that is smaller than a patch or too long to look at raises a UserError.
    """

    def __init__(self, source: ImageSource, patch_size: int, size: int, short_side: int | None) -> None:
        if short_side is not None and short_side < patch_size:
            raise UserError(
                f"short_side is {short_side}, expected at least the {patch_size} pixels of a patch; give more"
            )
        self.source, self.patch_size, self.size, self.short_side = source, patch_size, size, short_side

    def __getitem__(self, index: int) -> Tensor:
        image = self.source.load(index)
        expected = ""
        if min(image.size) < self.patch_size:
            expected = f"at least a patch of {self.patch_size}"
        elif self.short_side is not None and max(image.size) > MAX_ASPECT * min(image.size):
            expected = f"at most {MAX_ASPECT} times as long as wide"
        if expected:
            raise UserError(
                f"{self.source.name(index)} has {image.width}x{image.height} pixels, expected {expected}; "
                f"choose other images"
            )
        if self.short_side is None:
            return evaluation_crop(image, self.size)
        scale = self.short_side / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        wide, high = (side // self.patch_size * self.patch_size for side in (width, height))
        left, top = (width - wide) // 2, (height - high) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return to_tensor(resized.crop((left, top, left + wide, top + high)))


def _draw(
    folder: Path,
    pixels: list[Tensor],
    numbers: list[int],
    of_cls: list[Tensor],
    of_slots: list[Tensor],
    slots: list[int],
) -> dict[str, dict[str, str]]:
    """Write the overlays and the grid; the names of the overlays by image number, then `cls` or the slot."""
    names = ["cls", *(f"slot{slot:02d}" for slot in slots)]
    titles = ["CLS, last block", *(f"slot {slot}" for slot in slots)]
    peaks = [*peaks_of(of_cls), *peaks_of(of_slots)]
    overlays: dict[str, dict[str, str]] = {}
    rows = []
    for image, number, cls, chosen in zip(pixels, numbers, of_cls, of_slots, strict=True):
        drawn = [overlay(image, one, peak) for one, peak in zip([*cls, *chosen], peaks, strict=True)]
        files = [f"image{number}_{name}.png" for name in names]
        for picture, file in zip(drawn, files, strict=True):
            Image.fromarray(picture).save(folder / file)
        overlays[str(number)] = dict(zip(["cls", *map(str, slots)], files, strict=True))
        rows.append([as_picture(image), *drawn])
    above = [f"{title}\nup to {share(peak)}" for title, peak in zip(titles, peaks, strict=True)]
    first = [f"image {numbers[0]}\n", *above]
    others = [[f"image {number}", *[""] * len(titles)] for number in numbers[1:]]
    heading = (
        "where CLS and slots look: the brightest color of a column is the share of one patch named above it"
    )
    draw_grid(rows, [first, *others], folder / "grid.png", heading)
    return overlays
