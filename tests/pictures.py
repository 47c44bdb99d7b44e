"""Pictures like photographs for tests of views: soft shapes, hard edges, noise, flat and grey parts."""

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from dino_sparo.data.views import CropKind, View, crop_kinds, draw_view


def photo(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels += rng.integers(-9, 10, pixels.shape)
    pixels[: height // 5, : width // 3] = rng.integers(0, 256, 3)
    pixels[-height // 6 :] = pixels[-height // 6 :, :, :1]  # grey
    pixels[height // 2 :, -width // 7 :] = (255, 0, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    """The content of an image file."""
    file = BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def recipes(
    global_size: int = 48, local_size: int = 24, blur_radius: tuple[float, float] = (0.1, 2.0), **changes: str
) -> list[CropKind]:
    """Those of the ImageNet recipe at another size, with two local crops."""
    return crop_kinds(
        global_size=global_size,
        global_scale=(0.4, 1.0),
        local_size=local_size,
        local_scale=(0.05, 0.4),
        num_local_crops=2,
        flip_probability=0.5,
        jitter_probability=0.8,
        jitter_strength=(0.4, 0.4, 0.2, 0.1),
        grayscale_probability=0.2,
        blur_probability=(1.0, 0.1, 0.5),
        blur_radius=blur_radius,
        solarize_probability=(0.0, 0.2, 0.0),
        **changes,
    )


def views_of(image: Image.Image, crops: list[CropKind], sample: int) -> list[View]:
    size = {"image_width": image.width, "image_height": image.height}
    return [
        draw_view(recipe, seed=0, epoch=0, sample=sample, crop=crop, **size)
        for crop, recipe in enumerate(crops)
    ]
