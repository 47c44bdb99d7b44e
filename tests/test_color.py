"""PIL's colors and blur on tensors, against PIL's own."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional as TF

from dino_sparo.data import color
from dino_sparo.data.device_views import jitter_steps
from dino_sparo.data.images import to_tensor
from tests.pictures import photo, recipes, views_of

IMAGES = [photo(seed=seed) for seed in range(4)]
BATCH = torch.stack([to_tensor(image) for image in IMAGES])
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
ANY_VIEW = views_of(IMAGES[0], recipes(), 0)[0]


def steps(count=1, *, order=(), factors=(1.0, 1.0, 1.0, 0.0), grayscale=False) -> torch.Tensor:
    """Those of a view with these colors, for so many images."""
    view = replace(ANY_VIEW, jitter_order=order, jitter_factors=factors, grayscale=grayscale)
    return torch.tensor([jitter_steps(view)]).expand(count, -1)


def difference(ours: torch.Tensor, images: list[Image.Image]) -> np.ndarray:
    """By which ours, uint8 (n, 3, h, w), are away from PIL's."""
    theirs = torch.stack([to_tensor(image) for image in images])
    return (ours.int() - theirs.int()).abs().numpy()


@pytest.mark.parametrize("adjustment", [BRIGHTNESS, CONTRAST, SATURATION])
@pytest.mark.parametrize("factor", [0.0, 0.37, 0.6, 0.999, 1.0, 1.21, 1.4, 3.0])
def test_blends_are_pils(adjustment, factor):
    factors = [1.0, 1.0, 1.0, 0.0]
    factors[adjustment] = factor
    ours = color.jitter(BATCH, steps(4, order=(adjustment,), factors=tuple(factors)))
    assert difference(ours, [ADJUST[adjustment](image, factor) for image in IMAGES]).max() == 0


@pytest.mark.parametrize("factor", [-0.5, -0.1, -0.03, 0.0, 0.004, 0.07, 0.1, 0.5])
def test_hue_is_pils_but_for_rounding(factor):
    ours = color.jitter(BATCH, steps(4, order=(HUE,), factors=(1.0, 1.0, 1.0, factor)))
    apart = difference(ours, [TF.adjust_hue(image, factor) for image in IMAGES])
    assert apart.max() <= 8 and (apart > 0).mean() < 0.01 and apart.mean() < 0.02


def test_grayscale_and_solarize_are_pils():
    gray = color.jitter(BATCH, steps(4, grayscale=True))
    assert difference(gray, [TF.rgb_to_grayscale(image, 3) for image in IMAGES]).max() == 0
    inverted = color.solarize(BATCH, torch.tensor([True] * 4))
    assert difference(inverted, [TF.solarize(image, 128) for image in IMAGES]).max() == 0


def blur_difference(radius: float, taps: int) -> np.ndarray:
    blurred = color.blur(BATCH, torch.tensor([color.blur_weights(radius, taps)] * 4))
    return difference(blurred, [image.filter(ImageFilter.GaussianBlur(radius)) for image in IMAGES])


@pytest.mark.parametrize("radius", [0.1, 0.51, 0.9, 1.3, 1.71, 1.99, 2.6, 4.9])
def test_blur_is_pils(radius):
    apart = blur_difference(radius, color.blur_taps(6.0))
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-3


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0])  # whose weights make sums of exactly one half
def test_blur_is_near_pils_where_sums_lie_between_two_numbers(radius):
    apart = blur_difference(radius, 3)
    assert apart.max() <= 6 and apart.mean() < 1  # one a pass


def test_a_blur_needs_no_more_weights_than_it_says():
    for radius in (0.1, 0.7, 1.22, 1.23, 2.0, 4.0):
        taps = color.blur_taps(radius)
        weights = color.blur_weights(radius, taps + 2)
        assert weights[taps:] == [0.0, 0.0]
        assert weights[0] + 2 * sum(weights[1:]) == pytest.approx(1, abs=1e-6)
    assert color.blur_weights(0.0, 3) == [1.0, 0.0, 0.0] and color.blur_taps(0.0) == 1


@pytest.mark.parametrize("order", list(permutations(range(4))))
def test_every_order_of_the_jitter(order):
    factors = (0.7, 1.3, 0.85, 0.08)
    expected = IMAGES[:2]
    for adjustment in order:
        expected = [ADJUST[adjustment](image, factors[adjustment]) for image in expected]
    apart = difference(color.jitter(BATCH[:2], steps(2, order=order, factors=factors)), expected)
    assert apart.max() <= 8 and (apart > 0).mean() < 0.02


def test_each_image_has_its_own_steps():
    rows = [
        steps(order=(0, 1, 2, 3), factors=(0.7, 1.3, 0.85, 0.08)),
        steps(),
        steps(grayscale=True),
        steps(order=(3, 1, 0, 2), factors=(1.2, 0.8, 1.1, -0.05)),
    ]
    together = color.jitter(BATCH, torch.cat(rows))
    alone = torch.cat([color.jitter(x[None], row) for x, row in zip(BATCH, rows, strict=True)])
    assert torch.equal(together, alone) and torch.equal(together[1], BATCH[1])
    solarized = color.solarize(BATCH, torch.tensor([True, False, True, False]))
    assert torch.equal(solarized[1], BATCH[1]) and not torch.equal(solarized[0], BATCH[0])
    weights = torch.tensor([color.blur_weights(radius, 3) for radius in (0.0, 1.0, 2.0, 0.3)])
    blurred = color.blur(BATCH, weights)
    assert torch.equal(blurred[0], BATCH[0])
    assert torch.equal(blurred[2:3], color.blur(BATCH[2:3], weights[2:3]))


def test_a_large_image_has_an_exact_mean():
    bright = Image.fromarray(np.full((600, 600, 3), 254, dtype=np.uint8))  # its sum is beyond float32
    bright.paste((255, 255, 255), (0, 0, 600, 299))
    ours = color.jitter(to_tensor(bright)[None], steps(order=(CONTRAST,), factors=(1.0, 0.5, 1.0, 0.0)))
    assert difference(ours, [TF.adjust_contrast(bright, 0.5)]).max() == 0
