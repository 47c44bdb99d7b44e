"""PIL's color operations and Gaussian blur on batches of tensors, bit for bit as far as float32 allows.

Images are uint8 (n, 3, height, width); factors, shifts, and weights are float32, one row per image, so that
nothing depends on the values of a single image. Functions are compiled on a GPU, and also run uncompiled;
a GPU divides less exactly, which may change a hue by one step of 256.
Source: Pillow's Blend.c, Convert.c, and BoxBlur.c, and torchvision's functions for PIL images.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PASSES = 3  # of PIL's box blur per direction
SOLARIZE_THRESHOLD = 128
NO_SHIFT = -1.0
# Columns of the steps of `jitter`, and of the steps before and after the contrast.
BEFORE, CONTRAST_FACTOR, AFTER, GRAYSCALE = slice(0, 9), 9, slice(10, 19), 19
BLENDS_BEFORE, SHIFT, BLENDS_AFTER = ((0, 1), (2, 3)), 4, ((5, 6), (7, 8))
NOTHING = [0.0, 1.0, 0.0, 1.0, NO_SHIFT, 0.0, 1.0, 0.0, 1.0]


def jitter(images: Tensor, steps: Tensor) -> Tensor:
    """Color jitter in the order of each image, then grayscale of some images: `steps` (n, 20), returns uint8.

    The columns of `steps` are the adjustments before the contrast (`BEFORE`), the factor of the contrast, the
    adjustments after it (`AFTER`), and 1 for grayscale, else 0. Before and after are two blends, a hue shift,
    and two blends. The columns of a blend are its target (0: black, 1: the luma of each pixel) and its factor
    (1: no change). A hue shift of -1 means no change.
    """
    columns = steps[:, :, None, None].unbind(1)
    rgb = [x.float() for x in images.unbind(1)]  # separate tensors, so that the compiler makes one kernel
    rgb = _adjusted(rgb, columns[BEFORE])
    total = _luma(*rgb).to(torch.int32).sum(dim=(1, 2), keepdim=True)  # too large to be exact in float32
    mean = (total.double() / rgb[0][0].numel() + 0.5).floor().float()
    rgb = _adjusted([_blend(x, mean, columns[CONTRAST_FACTOR]) for x in rgb], columns[AFTER])
    luma = _luma(*rgb)
    rgb = [torch.where(columns[GRAYSCALE] == 1, luma, x) for x in rgb]
    return torch.stack([x.to(torch.uint8) for x in rgb], dim=1)


def solarize(images: Tensor, chosen: Tensor) -> Tensor:
    """Invert all pixels from 128 on in the chosen images (n,) bool."""
    x = images.float()  # vectorized, unlike uint8
    inverted = chosen[:, None, None, None] & (x >= SOLARIZE_THRESHOLD)
    return torch.where(inverted, 255 - x, x).to(torch.uint8)


def blur(images: Tensor, weights: Tensor) -> Tensor:
    """PIL's Gaussian blur with the weights (n, taps) of `blur_weights`: three passes per direction."""
    rows = weights[:, :, None, None, None].unbind(1)
    for dim in (3, 2):
        for _ in range(PASSES):
            images = _box_blur(images, rows, dim)
    return images


def blur_weights(radius: float, taps: int) -> list[float]:
    """Weights by distance, 0 to taps - 1, of one pass of PIL's Gaussian blur; 1, 0, ... for radius 0."""
    box = _box_radius(radius)
    whole = int(box)
    inside = int(2**24 / (2 * box + 1))
    edge = (2**24 - (2 * whole + 1) * inside) // 2
    inner = [inside / 2**24] * (whole + 1)
    return [*inner, edge / 2**24, *[0.0] * taps][:taps]


def blur_taps(radius: float) -> int:
    """Number of weights for this radius, rounded up to 1, 2, 3, 5, 9, ..., so that few kernels are needed."""
    return 1 + 2 ** int(_box_radius(radius)).bit_length() if radius > 0 else 1


def _box_radius(radius: float) -> float:
    """Radius of the box whose passes approximate a Gaussian of this radius. Source: PIL's BoxBlur.c."""
    variance = radius**2 / PASSES
    length = math.sqrt(12 * variance + 1)
    whole = math.floor((length - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + part / (6 * (variance - (whole + 1) ** 2))


def _box_blur(images: Tensor, rows: Sequence[Tensor], dim: int) -> Tensor:
    """One pass along a dimension, uint8 to uint8; the pixel at the edge continues beyond it."""
    at = torch.arange(images.shape[dim], device=images.device)
    blurred = rows[0] * images
    for distance, weight in enumerate(rows[1:], start=1):
        before, after = (
            images.index_select(dim, (at + way).clamp(0, images.shape[dim] - 1)).float()
            for way in (-distance, distance)
        )
        blurred = blurred + weight * (before + after)
    return (blurred + 0.5).floor().to(torch.uint8)


def _adjusted(rgb: list[Tensor], columns: Sequence[Tensor]) -> list[Tensor]:
    """Two blends, a hue shift, two blends."""
    rgb = _blends(rgb, columns, BLENDS_BEFORE)
    red, green, blue = rgb
    shift = columns[SHIFT]
    shifted = _shift_hue(red, green, blue, shift)
    rgb = [torch.where(shift == NO_SHIFT, x, y) for x, y in zip(rgb, shifted, strict=True)]
    return _blends(rgb, columns, BLENDS_AFTER)


def _luma(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    """PIL's mode L: all sums stay below 2^24, so float32 holds them exactly."""
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) * 2**-16).floor()


def _blends(
    rgb: Sequence[Tensor], columns: Sequence[Tensor], pairs: Sequence[tuple[int, int]]
) -> list[Tensor]:
    rgb = list(rgb)
    for kind, factor in pairs:
        towards = columns[kind] * _luma(*rgb)
        rgb = [_blend(x, towards, columns[factor]) for x in rgb]
    return rgb


def _blend(x: Tensor, towards: Tensor, factor: Tensor) -> Tensor:
    """PIL's blend: interpolate between `towards` and `x` or extrapolate, clip, and round down."""
    return (towards + factor * (x - towards)).clamp(0, 255).floor()


def _shift_hue(red: Tensor, green: Tensor, blue: Tensor, shift: Tensor) -> list[Tensor]:
    """Shift the hue in PIL's 8-bit HSV by a whole number, modulo 256."""
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp(min=1)
    r, g, b = ((value - x) / divisor for x in (red, green, blue))
    sextant = torch.where(red == value, b - g, torch.where(green == value, 2 + (r - b), 4 + (g - r)))
    turn = sextant / 6
    hue = _times_255(torch.where(turn < 0, turn + 1, turn))
    saturation = _times_255(chroma / value.clamp(min=1)) * (1 / 255)
    hue = torch.where(chroma == 0, 0, hue) + shift
    sextant = torch.where(hue >= 256, hue - 256, hue) * (6 / 255)

    def channel(offset: int) -> Tensor:
        """value * (1 - saturation * share); the share depends on the distance of the hue."""
        k = sextant + offset
        k = torch.where(k >= 6, k - 6, k)
        share = torch.minimum(k, 4 - k).clamp(0, 1)
        return (value * (1 - saturation * share) + 0.5).floor()

    return [channel(5), channel(3), channel(1)]


def _times_255(x: Tensor) -> Tensor:
    """x * 255 rounded down as in double precision, where float32 may round up to the next whole number."""
    product = (x * 255).floor()
    return torch.where(x * 256 - product < x, product - 1, product)
