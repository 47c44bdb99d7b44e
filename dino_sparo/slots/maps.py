"""Attention maps of slots and of the CLS token over images; without slots, of the heads of the CLS token."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_sparo.data.sources import ImageSource, spread_evenly
from dino_sparo.errors import UserError
from dino_sparo.files import atomic_write
from dino_sparo.models import Encoder
from dino_sparo.slots.attention import cls_attention, distinct_slots, slot_attention, times_uniform
from dino_sparo.slots.drawing import (
    Picture,
    as_picture,
    attention_of_each,
    beside,
    check_numbers,
    draw_attention,
    draw_grid,
    file_name,
    load_seen,
    remove_other_pictures,
)

NUM_SLOTS = 8  # slots that are drawn if none are chosen
COARSE = 14  # patches across, below which a finer map is suggested
FAINT = 1.2  # multiple of uniform attention that is hardly seen
HEADING = "Where {} look ({}): the image in gray, with color where attention is above uniform attention"


def slot_maps(
    encoder: Encoder,
    source: ImageSource,
    folder: Path,
    *,
    slots: Sequence[int] | None = None,
    images: Sequence[int] | None = None,
    num_images: int = 6,
    short_side: int | None = None,
    control: Encoder | None = None,
    batch_size: int = 64,
    num_workers: int | None = 0,
) -> dict[str, Any]:
    """Write grid.png and a picture for each image and slot; pictures of an earlier call are removed.

    Args:
        encoder: in evaluation mode; used on its device. Without slots all heads of the CLS token are drawn.
        folder: of the pictures; created if it does not exist.
        slots: numbers of slots. None: eight slots with different attention.
        images: numbers of images. None: `num_images`, spread evenly.
        short_side: draw whole images with this short side in pixels. None: evaluation crops.
        control: an encoder without slots, whose heads are drawn into control.png.
        batch_size: images per forward pass.
        num_workers: processes that load images. None: one per core, at most 16.

    Returns:
        JSON values: `images` (names), `patches` (rows and columns of each image), `slots`, and file names:
        `grid`, `control_grid`, and `overlays` by image number and then `cls`, number of the slot, or `head0`
        and so on.

    Raises:
        UserError: a slot or image number is out of range, or an image cannot be read or is too small.
    """
    if slots is not None:
        if not encoder.num_slots:
            raise UserError(
                f"slots is {list(slots)}, but the encoder has none (read-out {encoder.readout_name}); leave "
                f"slots out to draw the heads of the CLS token"
            )
        check_numbers("slots", slots, encoder.num_slots)
    if images is not None:
        check_numbers("images", images, len(source))
    numbers = spread_evenly(source, num_images) if images is None else list(images)
    loading = {"short_side": short_side, "batch_size": batch_size, "num_workers": num_workers}
    rows = look(encoder, source, numbers, slots=slots, **loading)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    rows.draw(folder / "grid.png")
    overlays: dict[str, dict[str, str]] = {}
    for number, drawn in zip(numbers, rows.drawn, strict=True):
        files = {key: f"image{number}_{_file_part(key)}.png" for key in rows.titles}
        for picture, file in zip(drawn, files.values(), strict=True):
            with atomic_write(folder / file, durable=False) as written:
                Image.fromarray(picture).save(written, "PNG")
        overlays[str(number)] = files
    names = {name for of_image in overlays.values() for name in of_image.values()}
    remove_other_pictures(folder, "image*_*.png", names)
    if control is not None:
        look(control, source, numbers, **loading).draw(folder / "control.png")  # type: ignore[arg-type]
    return {
        "images": [source.name(number) for number in numbers],
        "patches": rows.patches,
        "slots": [int(key) for key in rows.titles if key.isdecimal()],
        "grid": "grid.png",
        "control_grid": None if control is None else "control.png",
        "overlays": overlays,
    }


class Rows(NamedTuple):
    """Images and their attention maps.

    Attributes:
        names: of the images.
        plain: pictures of the images.
        drawn: for each image its attention maps.
        titles: of the maps, by `cls`, number of the slot, or `head0` and so on.
        patches: rows and columns of patches of each image.
    """

    names: list[str]
    plain: list[Picture]
    drawn: list[list[Picture]]
    titles: dict[str, str]
    patches: list[tuple[int, int]]

    def as_one(self) -> Picture:
        """All square pictures as one, one row per image, without titles, at the size of the smallest."""
        size = (min(map(len, self.plain)),) * 2

        def resized(picture: Picture) -> Picture:
            return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))

        rows = [[plain, *drawn] for plain, drawn in zip(self.plain, self.drawn, strict=True)]
        return np.concatenate([beside(*map(resized, row)) for row in rows])

    def draw(self, path: Path) -> None:
        """Write a PNG with one row per image: the image, then its maps."""
        first, *others = [[file_name(name), *[""] * len(self.titles)] for name in self.names]
        titles = [[first[0], *self.titles.values()], *others]
        rows = [[plain, *drawn] for plain, drawn in zip(self.plain, self.drawn, strict=True)]
        looking = "slots" if any(key.isdecimal() for key in self.titles) else "the heads of the CLS token"
        across = f"{min(map(min, self.patches))} patches on the short side"
        if len(set(self.patches)) == 1:
            across = "{} × {} patches".format(*self.patches[0])
        draw_grid(rows, titles, path, HEADING.format(looking, across))


def look(
    encoder: Encoder,
    source: ImageSource,
    numbers: Sequence[int],
    *,
    slots: Sequence[int] | None = None,
    num_slots: int = NUM_SLOTS,
    short_side: int | None = None,
    batch_size: int = 64,
    num_workers: int | None = 0,
) -> Rows:
    """Attention maps over images of a source. Arguments as for `slot_maps`, and:

    Args:
        numbers: of the images.
        num_slots: number of slots with different attention that are drawn if `slots` is None.
    """
    seen = list(load_seen(encoder, source, numbers, num_workers, short_side))

    def maps_of(attention: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return attention_of_each(attention, [one.pixels for one in seen], batch_size, encoder.device)

    heads = maps_of(lambda images: cls_attention(encoder, images))
    maps = [of_image.mean(dim=0, keepdim=True) for of_image in heads]
    titles = {"cls": "CLS, mean of heads"}
    if encoder.num_slots:
        of_slots = maps_of(lambda images: slot_attention(encoder, images)[0])
        chosen = list(slots or distinct_slots(of_slots, num_slots))
        titles |= {str(slot): f"slot {slot}" for slot in chosen}
        beside = [of_image[chosen] for of_image in of_slots]
    else:
        titles |= {f"head{head}": f"CLS, head {head}" for head in range(encoder.backbone.num_heads)}
        beside = heads
    maps = [torch.cat(pair) for pair in zip(maps, beside, strict=True)]
    largest = torch.stack([times_uniform(of_image).amax(dim=(1, 2)) for of_image in maps]).amax(dim=0)
    for key, times in zip(titles, largest.tolist(), strict=True):
        if times < FAINT:
            titles[key] += f"\nat most {times:.2f} × uniform" if times > 1 else "\nno patch above uniform"
    return Rows(
        [source.name(number) for number in numbers],
        [as_picture(one.picture) for one in seen],
        [
            [draw_attention(one.picture, of_column) for of_column in of_image]
            for one, of_image in zip(seen, maps, strict=True)
        ],
        titles,
        [(rows, columns) for *_, rows, columns in (of_image.shape for of_image in maps)],
    )


def _file_part(key: str) -> str:
    return f"slot{int(key):02d}" if key.isdecimal() else key
