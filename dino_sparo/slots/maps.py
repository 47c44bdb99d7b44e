"""`dino-sparo slots maps`: attention of chosen slots over chosen images, beside that of the CLS token."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dino_sparo.data.images import evaluation_crop, to_tensor
from dino_sparo.data.sources import ImageSource, open_images
from dino_sparo.errors import UserError
from dino_sparo.slots.attention import cls_attention, distinct_slots, slot_attention
from dino_sparo.slots.drawing import (
    as_picture,
    draw_grid,
    overlay,
    peaks_of,
    remove_other_pictures,
    save_picture,
    share,
)
from dino_sparo.slots.program import (
    attention_of_each,
    check_numbers,
    check_slots,
    load_images,
    open_slots,
    output_folder,
    write_json,
)

if TYPE_CHECKING:
    from dino_sparo.options import SlotMapsOptions

NUM_SLOTS = 8  # where none are named
MAX_ASPECT = 16  # a longer image would have more tokens than one can see or compute


def run(options: "SlotMapsOptions") -> None:
    """Write maps.json, grid.png and an overlay for each image and slot into `<out>/maps`.

    In grid and overlays the brightest colour of a slot is its largest share of a patch in all images shown.
    """
    encoder, device = open_slots(options)
    if options.slots is not None:
        check_slots(options.slots, encoder.num_slots)
    source = open_images(options.data.path)
    numbers = _choose_images(options, len(source))
    backbone = encoder.backbone
    dataset: Dataset
    if options.short_side is None:
        dataset = MiddleCrops(source, backbone.native_grid * backbone.patch_size, backbone.patch_size)
    else:
        dataset = WholeImages(source, options.short_side, backbone.patch_size)
    pixels = list(load_images(dataset, source, numbers, options.num_workers))
    of_slots = attention_of_each(lambda x: slot_attention(encoder, x)[0], pixels, options.batch_size, device)
    of_cls = attention_of_each(
        lambda x: cls_attention(encoder, x).mean(dim=1, keepdim=True), pixels, options.batch_size, device
    )
    slots = options.slots or distinct_slots(of_slots, NUM_SLOTS)
    folder = output_folder(options, "maps")
    overlays = _draw(folder, pixels, numbers, of_cls, [maps[slots] for maps in of_slots], slots)
    content = {
        "run": options.run,
        "which": options.which,
        "data": options.data.path,
        "images": [source.name(number) for number in numbers],
        "slots": slots,
        "grid": "grid.png",
        "overlays": overlays,
    }
    write_json(folder / "maps.json", content)
    names = {name for of_image in overlays.values() for name in of_image.values()}
    remove_other_pictures(folder, "image*_*.png", names)
    print(f"slots {', '.join(map(str, slots))} on {len(numbers)} images: {folder / 'grid.png'}")


class MiddleCrops(Dataset):
    """Item -> the evaluation crop of an image, uint8 (3, size, size); a UserError for one below a patch."""

    def __init__(self, source: ImageSource, size: int, patch_size: int) -> None:
        self.source, self.size, self.patch_size = source, size, patch_size

    def __getitem__(self, index: int) -> Tensor:
        image = self.source.load(index)
        if min(image.size) < self.patch_size:
            raise _too_small(self.source.name(index), image, self.patch_size)
        return evaluation_crop(image, self.size)


class WholeImages(Dataset):
    """Item -> a whole image, uint8 (3, height, width), its short side resized to `short_side` (bicubic).

    What both sides have beyond multiples of the patch is cut off, the same on either side. An image that is
    smaller than a patch or too long to look at gives a UserError instead.
    """

    def __init__(self, source: ImageSource, short_side: int, patch_size: int) -> None:
        if short_side < patch_size:
            raise UserError(
                f"short_side is {short_side}, expected at least the {patch_size} pixels of a patch; give more"
            )
        self.source, self.short_side, self.patch_size = source, short_side, patch_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        name = self.source.name(index)
        image = self.source.load(index)
        if min(image.size) < self.patch_size:
            raise _too_small(name, image, self.patch_size)
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise UserError(
                f"{name} has {image.width}x{image.height} pixels, expected at most {MAX_ASPECT} times as "
                f"long as wide; choose other images"
            )
        scale = self.short_side / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        wide, high = (side // self.patch_size * self.patch_size for side in (width, height))
        left, top = (width - wide) // 2, (height - high) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return to_tensor(resized.crop((left, top, left + wide, top + high)))


def _too_small(name: str, image: Image.Image, patch_size: int) -> UserError:
    return UserError(
        f"{name} has {image.width}x{image.height} pixels, expected at least a patch of {patch_size}; choose "
        f"other images"
    )


def _choose_images(options: "SlotMapsOptions", count: int) -> list[int]:
    """The numbers of the images to draw."""
    if options.images is not None:
        check_numbers(options.images, count, "images", f"the images of {options.data.path}")
        return options.images
    spread = np.linspace(0, count - 1, min(options.num_images, count))
    return spread.round().astype(int).tolist()


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
    keys = ["cls", *map(str, slots)]
    maps = [[*cls, *chosen] for cls, chosen in zip(of_cls, of_slots, strict=True)]
    peaks = [*peaks_of(of_cls), *peaks_of(of_slots)]
    titles = ["CLS, last block", *(f"slot {slot}" for slot in slots)]
    titles = [f"{title}\nup to {share(peak)}" for title, peak in zip(titles, peaks, strict=True)]
    overlays: dict[str, dict[str, str]] = {}
    rows = []
    for image, number, of_image in zip(pixels, numbers, maps, strict=True):
        drawn = [overlay(image, one, peak) for one, peak in zip(of_image, peaks, strict=True)]
        files = [f"image{number}_{name}.png" for name in names]
        for picture, file in zip(drawn, files, strict=True):
            save_picture(picture, folder / file)
        overlays[str(number)] = dict(zip(keys, files, strict=True))
        rows.append([as_picture(image), *drawn])
    first = [f"image {numbers[0]}\n", *titles]
    others = [[f"image {number}", *[""] * len(titles)] for number in numbers[1:]]
    heading = (
        "where CLS and slots look: the brightest colour of a column is the share of one patch named above it"
    )
    draw_grid(rows, [first, *others], folder / "grid.png", heading)
    return overlays
