"""The random numbers of every crop, a pure function of (seed, epoch, sample, crop).

A counter-based generator (Philox) is keyed by (seed, epoch) and counts by (sample, crop), so neither the
number of workers or processes nor a resume changes what is drawn. An executor (`pil_views`, `device_views`)
turns the numbers into pixels. Source: official `DataAugmentationDINO`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

NUM_GLOBAL_CROPS = 2
ASPECT_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10
JITTER_ORDERS = tuple(permutations(range(4)))  # 0 brightness, 1 contrast, 2 saturation, 3 hue
_ORDER_OF_SAMPLES, _CROPS, _SUBSTITUTES = 1, 2, 3  # kinds of draws, separate in the counter


@dataclass(frozen=True, kw_only=True)
class CropKind:
    """How one kind of crop (first global, second global or local) is drawn."""

    size: int
    scale: tuple[float, float]
    flip_probability: float
    jitter_probability: float = 0.0
    jitter_strength: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    grayscale_probability: float = 0.0
    blur_probability: float = 0.0
    blur_radius: tuple[float, float] = (0.0, 0.0)
    solarize_probability: float = 0.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


@dataclass(frozen=True, kw_only=True)
class View:
    """The numbers of one crop: what is cut out and what is done to it, in the order of the fields."""

    top: int
    left: int
    height: int
    width: int
    size: int
    flip: bool
    jitter_order: tuple[int, ...]
    """Order of brightness 0, contrast 1, saturation 2, hue 3; empty without jitter."""
    jitter_factors: tuple[float, ...]
    grayscale: bool
    blur_radius: float
    """Radius of PIL's Gaussian blur in pixels, 0 without blur."""
    solarize: bool
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"


def crop_kinds(
    *,
    global_size: int,
    global_scale: tuple[float, float],
    local_size: int,
    local_scale: tuple[float, float],
    num_local_crops: int,
    blur_probability: tuple[float, float, float],
    solarize_probability: tuple[float, float, float],
    **common: Any,
) -> list[CropKind]:
    """The kind of each crop: first global, second global, then the local ones.

    Tuples of three probabilities are for these three kinds; `common` are the fields that all kinds share.
    """

    def one_of(kind: int) -> CropKind:
        return CropKind(
            size=local_size if kind == 2 else global_size,
            scale=local_scale if kind == 2 else global_scale,
            blur_probability=blur_probability[kind],
            solarize_probability=solarize_probability[kind],
            **common,
        )

    return [one_of(0), one_of(1), *(one_of(2) for _ in range(num_local_crops))]


def crop_sizes(kinds: Sequence[CropKind]) -> list[tuple[int, int]]:
    """Number and side in pixels of the global and of the local crops."""
    return [(NUM_GLOBAL_CROPS, kinds[0].size), (len(kinds) - NUM_GLOBAL_CROPS, kinds[-1].size)]


def sample_order(*, seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """The epoch's permutation of all samples: (num_samples,)."""
    return np.random.Generator(_philox(seed, epoch, _ORDER_OF_SAMPLES, 0, 0)).permutation(num_samples)


def substitute_sample(*, seed: int, epoch: int, sample: int, attempt: int, num_samples: int) -> int:
    """The sample that replaces one that cannot be read, at the given attempt (from 1)."""
    philox = _philox(seed, epoch, _SUBSTITUTES, sample, attempt)
    return int(np.random.Generator(philox).integers(num_samples))


def draw_view(
    kind: CropKind, *, seed: int, epoch: int, sample: int, crop: int, image_width: int, image_height: int
) -> View:
    """The numbers of one crop of an image of this size."""
    uniform = np.random.Generator(_philox(seed, epoch, _CROPS, sample, crop)).random(2 * CROP_TRIES + 13)
    top, left, height, width = _crop_box(kind.scale, uniform[13:], uniform[:2], image_width, image_height)
    brightness, contrast, saturation, hue = kind.jitter_strength
    low = np.array([max(0, 1 - brightness), max(0, 1 - contrast), max(0, 1 - saturation), -hue])
    high = np.array([1 + brightness, 1 + contrast, 1 + saturation, hue])
    factors = low + (high - low) * uniform[2:6]
    jitter = uniform[6] < kind.jitter_probability
    radius_low, radius_high = kind.blur_radius
    blur = uniform[10] < kind.blur_probability
    return View(
        top=top,
        left=left,
        height=height,
        width=width,
        size=kind.size,
        flip=bool(uniform[8] < kind.flip_probability),
        jitter_order=JITTER_ORDERS[int(uniform[7] * len(JITTER_ORDERS))] if jitter else (),
        jitter_factors=tuple(factors.tolist()),
        grayscale=bool(uniform[9] < kind.grayscale_probability),
        blur_radius=radius_low + (radius_high - radius_low) * float(uniform[11]) if blur else 0.0,
        solarize=bool(uniform[12] < kind.solarize_probability),
        interpolation=kind.interpolation,
    )


def _crop_box(
    scale: tuple[float, float],
    tries: NDArray[np.float64],
    place: NDArray[np.float64],
    image_width: int,
    image_height: int,
) -> tuple[int, int, int, int]:
    """Top, left, height, width by torchvision's `RandomResizedCrop.get_params`, from given numbers."""
    area = image_width * image_height
    log_low, log_high = math.log(ASPECT_RATIO[0]), math.log(ASPECT_RATIO[1])
    for u_area, u_aspect in tries.reshape(CROP_TRIES, 2):
        target_area = area * (scale[0] + (scale[1] - scale[0]) * u_area)
        aspect = math.exp(log_low + (log_high - log_low) * u_aspect)
        width = round(math.sqrt(target_area * aspect))
        height = round(math.sqrt(target_area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            top = int(place[0] * (image_height - height + 1))
            left = int(place[1] * (image_width - width + 1))
            return top, left, height, width
    # torchvision's fallback: the largest central crop within the aspect ratios.
    width, height = image_width, image_height
    if image_width / image_height < ASPECT_RATIO[0]:
        height = min(image_height, round(width / ASPECT_RATIO[0]))
    elif image_width / image_height > ASPECT_RATIO[1]:
        width = min(image_width, round(height * ASPECT_RATIO[1]))
    return (image_height - height) // 2, (image_width - width) // 2, max(1, height), max(1, width)


def _philox(seed: int, epoch: int, kind: int, sample: int, crop: int) -> np.random.Philox:
    return np.random.Philox(key=[seed, epoch], counter=[0, crop, sample, kind])
