"""The image files that the training benchmark reads: JPEG of ImageNet's usual size.

Small files decode too cheaply and hide what real ones cost, so that others are encoded anew once.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from dino_sparo.data.sources import ImageSource, open_images

WIDTH, HEIGHT, QUALITY = 500, 375, 90
FINEST_CELLS = 256  # across a generated picture


def jpeg_files(data: str | None, num_images: int, folder: Path) -> ImageSource:
    """So many JPEG files in the folder, of the images of `data` or generated ones (None).

    An image keeps its shape and gets the area of 500 x 375 pixels; images are repeated if there are fewer.

    Raises:
        UserError: no such images, or one that cannot be read.
    """
    source = None if data is None else open_images(data, num_images)
    for number in range(num_images):
        image = generated_photo(number) if source is None else source.load(number % len(source))
        scale = math.sqrt(WIDTH * HEIGHT / (image.width * image.height))
        size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
        image.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=QUALITY)
    return open_images(str(folder))


def generated_photo(number: int) -> Image.Image:
    """A picture whose spectrum, and so whose size as JPEG, is like a photograph's: coloured noise of all
    scales, weaker the finer it is; 500 x 375 pixels."""
    generator = np.random.default_rng(number)
    pixels, cells = np.full((HEIGHT, WIDTH, 3), 128, np.float32), 2
    while cells <= FINEST_CELLS:
        shape = (max(1, cells * HEIGHT // WIDTH), cells)
        shared, coloured = generator.normal(size=(*shape, 1)), generator.normal(size=(*shape, 3))
        noise = 128 + 128 * cells**-0.5 * (0.8 * shared + 0.4 * coloured)
        layer = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
        pixels += np.asarray(layer.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32) - 128
        cells *= 2
    pixels += 6 * generator.standard_normal(pixels.shape, np.float32)  # of the sensor
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
