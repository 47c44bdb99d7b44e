"""Random numbers of the crops, and their PIL executor against torchvision's own transforms."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dino_sparo.data.pil_views import center_crop, execute
from dino_sparo.data.views import draw_view
from tests.pictures import photo, recipes

RECIPE = replace(recipes()[2], solarize_probability=0.2)


def draw(recipe=RECIPE, *, seed=0, epoch=0, sample=0, crop=0, width=80, height=60):
    return draw_view(
        recipe, seed=seed, epoch=epoch, sample=sample, crop=crop, image_width=width, image_height=height
    )


def test_numbers_are_a_pure_function_of_seed_epoch_sample_crop():
    given = {"seed": 3, "epoch": 2, "sample": 11, "crop": 4}
    first = draw(**given)
    np.random.seed(99)
    random.seed(99)
    draw(sample=5)
    assert draw(**given) == first
    assert all(draw(**given | {name: value + 1}) != first for name, value in given.items())
    assert draw(seed=2, epoch=3, sample=4, crop=11) != first  # none of them may be summed or swapped


def test_drawn_frequencies_and_ranges():
    views = [draw(sample=sample) for sample in range(4000)]
    share = {
        "flip": np.mean([v.flip for v in views]),
        "jitter": np.mean([bool(v.jitter_order) for v in views]),
        "grayscale": np.mean([v.grayscale for v in views]),
        "blur": np.mean([v.blur_radius > 0 for v in views]),
        "solarize": np.mean([v.solarize for v in views]),
    }
    expected = {"flip": 0.5, "jitter": 0.8, "grayscale": 0.2, "blur": 0.5, "solarize": 0.2}
    assert share == pytest.approx(expected, abs=0.032)  # 4 standard deviations of 4000 draws at most
    factors = np.array([v.jitter_factors for v in views])
    np.testing.assert_allclose(factors.min(0), [0.6, 0.6, 0.8, -0.1], atol=2e-3)
    np.testing.assert_allclose(factors.max(0), [1.4, 1.4, 1.2, 0.1], atol=2e-3)
    assert len({v.jitter_order for v in views if v.jitter_order}) == 24
    areas = np.array([v.width * v.height for v in views]) / (80 * 60)
    aspects = np.array([v.width / v.height for v in views])
    assert 0.045 < areas.min() < 0.06 and 0.38 < areas.max() < 0.41
    assert areas.mean() == pytest.approx(0.225, abs=0.01)
    assert 0.7 < aspects.min() < 0.8 and 1.25 < aspects.max() < 1.45
    assert np.log(aspects).mean() == pytest.approx(0, abs=0.02)
    radii = [v.blur_radius for v in views if v.blur_radius]
    assert 0.1 <= min(radii) < 0.12 and 1.98 < max(radii) <= 2.0
    assert all(0 <= v.left <= 80 - v.width and 0 <= v.top <= 60 - v.height for v in views)
    assert min(v.left for v in views) == 0 and max(v.left + v.width for v in views) == 80


@pytest.mark.parametrize(("width", "height"), [(2000, 10), (10, 2000), (1, 1), (3, 500)])
def test_fallback_is_torchvisions_central_crop(width, height):
    view = draw(replace(RECIPE, scale=(0.95, 1.0)), width=width, height=height)
    # A scale above the image's own leaves torchvision nothing but its fallback.
    top, left, crop_height, crop_width = transforms.RandomResizedCrop.get_params(
        Image.new("RGB", (width, height)), scale=[4.0, 4.0], ratio=[3 / 4, 4 / 3]
    )
    expected = (top, left, max(1, crop_height), max(1, crop_width))
    assert (view.top, view.left, view.height, view.width) == expected


@pytest.mark.usefixtures("horizontal_first")
@pytest.mark.parametrize("sample", range(20))
def test_pil_executor_equals_torchvisions_transforms(sample, monkeypatch):
    view = draw(sample=sample)
    box, jitter = (
        (view.top, view.left, view.height, view.width),
        (torch.tensor(view.jitter_order), *view.jitter_factors),
    )
    monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", staticmethod(lambda *_: box))
    monkeypatch.setattr(transforms.ColorJitter, "get_params", staticmethod(lambda *_: jitter))
    blur = transforms.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(view.blur_radius)))
    official = transforms.Compose(
        [
            transforms.RandomResizedCrop(view.size, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(p=float(view.flip)),
            *([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)] if view.jitter_order else []),
            transforms.RandomGrayscale(p=float(view.grayscale)),
            *([blur] if view.blur_radius else []),
            *([transforms.Lambda(lambda x: ImageOps.solarize(x, 128))] if view.solarize else []),
        ]
    )
    image = photo(80, 60)
    np.testing.assert_array_equal(np.array(execute(image, view)), np.array(official(image)))


def test_the_three_kinds_of_crops_have_their_own_probabilities():
    first, second, *local = recipes()
    assert [first.size, second.size, *(r.size for r in local)] == [48, 48, 24, 24]
    assert [r.blur_probability for r in (first, second, *local)] == [1.0, 0.1, 0.5, 0.5]
    assert [r.solarize_probability for r in (first, second, *local)] == [0.0, 0.2, 0.0, 0.0]
    assert second.scale == (0.4, 1.0) and local[0].scale == (0.05, 0.4)


@pytest.mark.usefixtures("horizontal_first")
@pytest.mark.parametrize(("width", "height"), [(500, 375), (200, 640), (333, 511), (224, 224), (7, 40)])
def test_center_crop_is_the_official_evaluation_transform(width, height):
    official = transforms.Compose(
        [transforms.Resize(256, interpolation=InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )
    image = photo(width, height)
    np.testing.assert_array_equal(np.array(center_crop(image, 224)), np.array(official(image)))
