"""Images of the training benchmark, and the speed of loading them.

Images are encoded again as JPEG files of ImageNet's usual size, since small files would decode too fast.
"""

import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dino_sparo.data import pil_views
from dino_sparo.data.decode import decode, decode_pixels
from dino_sparo.data.images import to_tensor
from dino_sparo.data.loader import CropsDataset
from dino_sparo.data.sources import ImageSource, open_images
from dino_sparo.data.workers import keep_memory
from dino_sparo.files import named
from dino_sparo.parallel.device import wait_for

WIDTH, HEIGHT, QUALITY = 500, 375, 90
IMAGE_STAGES = ("read", "decode", "decode to tensor", "draw views", "views by PIL")
FINEST_CELLS = 256  # cells of the finest noise across a generated image


def jpeg_files(source: ImageSource | None, num_images: int, folder: Path) -> ImageSource:
    """Write `num_images` JPEG files into the folder, and open it.

    Args:
        source: its images, resized to the area of 500 x 375 pixels with the same aspect ratio, and repeated
            if there are fewer. None: generated pictures.

    Raises:
        UserError: an image cannot be read.
    """
    for number in range(num_images):
        image = generated_photo(number) if source is None else source.load(number % len(source))
        scale = math.sqrt(WIDTH * HEIGHT / (image.width * image.height))
        size = (max(1, round(scale * image.width)), max(1, round(scale * image.height)))
        with named(folder):
            image.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=QUALITY)
    return open_images(str(folder))


def generated_photo(number: int) -> Image.Image:
    """An image (500 x 375 pixels) of noise of all scales, weaker at finer scales, so that its spectrum and
    its size as JPEG are like those of a photograph."""
    generator = np.random.default_rng(number)
    pixels, cells = np.full((HEIGHT, WIDTH, 3), 128, np.float32), 2
    while cells <= FINEST_CELLS:
        shape = (max(1, cells * HEIGHT // WIDTH), cells)
        shared, colored = generator.normal(size=(*shape, 1)), generator.normal(size=(*shape, 3))
        noise = 128 + 128 * cells**-0.5 * (0.8 * shared + 0.4 * colored)
        layer = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
        pixels += np.asarray(layer.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32) - 128
        cells *= 2
    pixels += 6 * generator.standard_normal(pixels.shape, np.float32)  # sensor noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def image_stages(dataset: CropsDataset, num_images: int) -> dict[str, list[float]]:
    """Seconds per image on one core: read, decode for views by PIL, decode for views on the device, draw the
    random numbers of the views, make them by PIL.

    The first image is a warm-up and does not count. Files are read from the page cache.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_memory()  # as in a worker
    try:
        seconds = [_stage_seconds(dataset, number % len(dataset.source)) for number in range(num_images + 1)]
    finally:
        torch.set_num_threads(threads)
    return dict(zip(IMAGE_STAGES, np.transpose(seconds[1:]).tolist(), strict=True))


def _stage_seconds(dataset: CropsDataset, sample: int) -> list[float]:
    marks = [time.perf_counter()]
    data = dataset.source.read(sample)
    marks.append(time.perf_counter())
    image = decode(data) if data else dataset.source.load(sample)
    marks.append(time.perf_counter())
    if data:
        decode_pixels(data)
    marks.append(time.perf_counter())
    views = dataset.views_of(image, 0, sample)
    marks.append(time.perf_counter())
    for view in views:
        to_tensor(pil_views.execute(image, view))
    marks.append(time.perf_counter())
    return np.diff(marks).tolist()


def end_to_end(
    batches: Generator[list[Tensor]],
    step: Callable[[list[Tensor]], object],
    *,
    prefetched: int,
    batch_size: int,
    seconds: float,
    device: torch.device,
) -> dict[str, float]:
    """Train on the batches for about `seconds`, after the `prefetched` ones and two warm-up steps.

    `data_wait_share` is the fraction of the time in which the device waits for data; on a GPU it includes
    copies and everything else between two steps in its stream.
    """
    waits: list[tuple[Any, Any]] = []
    with closing(batches):
        for _ in range(prefetched):  # made while nothing was consumed: no measure of speed
            next(batches)
        for _ in range(2):
            step(next(batches))
        wait_for(device)
        started = time.perf_counter()
        while time.perf_counter() - started < seconds or not waits:
            before = _mark(device)
            crop_groups = next(batches)
            waits.append((before, _mark(device)))
            step(crop_groups)
        wait_for(device)
        elapsed = time.perf_counter() - started
    return {
        "images_per_second": len(waits) * batch_size / elapsed,
        "data_wait_share": sum(_seconds_between(*wait) for wait in waits) / elapsed,
        "seconds": elapsed,
        "steps": len(waits),
    }


def _mark(device: torch.device) -> Any:
    """The current time, on a GPU as an event in its stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(earlier: Any, later: Any) -> float:
    return later - earlier if isinstance(earlier, float) else earlier.elapsed_time(later) / 1000
