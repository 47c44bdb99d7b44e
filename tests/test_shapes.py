"""Generated pictures: pure in (seed, index), true to their factors, objects plain to see."""

import colorsys
import dataclasses
import itertools
import math

import numpy as np
import pytest

from dino_sparo.data import shapes
from dino_sparo.data.shapes import FACTORS, MAX_OBJECTS, Factors, draw_factors, draw_picture

COUNTS = {**{name: len(values) for name, values in FACTORS.items()}, "num_objects": MAX_OBJECTS}
DIAMETERS = (0.40, 0.52, 0.64)
# The colors in other words, so that an edit of their table that breaks their names is seen.
NAMES = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
HUES = dict(zip(NAMES, (0, 26, 53, 130, 182, 225, 275, 326), strict=True))


def scene_of(seed: int, index: int):
    """What a picture shows; the main object is the last."""
    rng = shapes.generator(seed, index)
    return shapes.sample_scene(rng, shapes.sample_factors(rng))


def main_pixels(scene, size: int, threshold: int = 12) -> np.ndarray:
    """Which pixels the main object changes by more than so many levels, (size, size) bool."""
    bare = dataclasses.replace(scene, objects=scene.objects[:-1])
    pictures = [np.asarray(shapes.paint(s, size), dtype=int) for s in (scene, bare)]
    return np.abs(pictures[0] - pictures[1]).max(axis=2) > threshold


def test_pictures_are_their_own_in_any_order_and_touch_no_global_state():
    places = [(seed, index) for seed in (0, 1) for index in range(200)]
    before = np.random.get_state()[1].copy()
    drawn = {place: draw_picture(*place, 32).tobytes() for place in places}
    assert len(set(drawn.values())) == 400
    for place in np.random.default_rng(0).permutation(places)[:50].tolist():
        assert draw_picture(*place, 32).tobytes() == drawn[tuple(place)]
    assert np.array_equal(np.random.get_state()[1], before)
    streams = [shapes.generator(0, index).random(2000) for index in (0, 1, 2)]
    assert len(np.unique(np.concatenate(streams))) == 6000


def test_factors_are_uniform_and_independent_in_pairs():
    """Chi-square against the uniform law; the bound is its mean plus four standard deviations."""
    assert list(COUNTS.values()) == [8, 8, 3, 9, 4, 6, 3]
    drawn = np.array([dataclasses.astuple(draw_factors(11, index)) for index in range(4000)])
    drawn[:, -1] -= 1
    table = dict(zip(COUNTS, drawn.T, strict=True))
    for names in (*((name,) for name in COUNTS), *itertools.combinations(COUNTS, 2)):
        shape = [COUNTS[name] for name in names]
        seen = np.bincount(np.ravel_multi_index([table[name] for name in names], shape))
        expected, free = 4000 / math.prod(shape), math.prod(shape) - 1
        assert ((seen - expected) ** 2 / expected).sum() < free + 4 * math.sqrt(2 * free), names


@pytest.mark.parametrize("index", range(20))
def test_picture_shows_its_factors(index):
    size, factors, scene = 96, draw_factors(2, index), scene_of(2, index)
    picture = draw_picture(2, index, size)
    assert (picture.mode, picture.size) == ("RGB", (size, size))
    assert picture.tobytes() == shapes.paint(scene, size).tobytes()
    assert len(scene.objects) == factors.num_objects
    assert scene.background == factors.background
    main = scene.objects[-1]
    assert (main.shape, main.texture) == (factors.shape, factors.texture)
    assert 2 * main.radius == pytest.approx(DIAMETERS[factors.size], rel=0.041)
    rows, columns = np.nonzero(main_pixels(scene, size))
    row, column = divmod(factors.position, 3)
    for where, cell in ((rows, row), (columns, column)):
        middle = (where.min() + where.max() + 1) / 2 / size
        assert (0.0, 0.4, 0.6)[cell] <= middle <= (0.4, 0.6, 1.0)[cell]
    hues = [colorsys.rgb_to_hsv(*rgb)[0] for rgb in np.asarray(picture)[rows, columns] / 255.0]
    turned = np.exp(2j * math.pi * np.array(hues)).sum()
    nearest = min(HUES, key=lambda name: abs(np.exp(1j * math.radians(HUES[name])) - turned / abs(turned)))
    assert nearest == FACTORS["color"][factors.color]


def test_main_object_is_distinctly_the_largest():
    for index in range(60):
        *others, main = scene_of(4, index).objects
        for other in others:
            assert other.radius < 0.6 * main.radius
            assert math.dist(other.center, main.center) > 0.8 * (main.radius + other.radius)


@pytest.mark.parametrize("shape", range(8))
def test_main_object_is_visible_on_every_background(shape):
    # A centered circle of 40 % of the side covers 12.6 % of the picture; the leanest shape a third of that.
    for background, color, texture in itertools.product(range(6), range(8), (0, 3)):
        factors = Factors(shape, color, 0, 4, texture, background, 1)
        scene = shapes.sample_scene(np.random.default_rng(color), factors)
        assert main_pixels(scene, 48, threshold=30).mean() > 0.04


@pytest.mark.parametrize("size", range(3))
def test_main_object_has_the_stated_size(size):
    scene = shapes.sample_scene(np.random.default_rng(0), Factors(0, 0, size, 4, 0, 0, 1))
    _, columns = np.nonzero(main_pixels(scene, 96))
    assert (columns.max() - columns.min() + 1) / 96 == pytest.approx(DIAMETERS[size], rel=0.09)


def test_shapes_differ_in_outline_and_textures_darken_their_share():
    item = dataclasses.replace(scene_of(0, 0).objects[-1], center=(0.5, 0.5), radius=0.26, angle=0.0)
    masks = [shapes.mask(dataclasses.replace(item, shape=shape), 48) for shape in range(8)]
    for one, two in itertools.combinations(masks, 2):
        assert np.abs(one - two).sum() / np.maximum(one, two).sum() > 0.15
    for texture, share in enumerate((0.0, 0.5, 0.25, 0.5)):
        darker = shapes.texture(dataclasses.replace(item, texture=texture, angle=0.2, phase=(0.1, 0.4)), 96)
        assert float(darker.mean()) == pytest.approx(share, abs=0.06)


def test_picture_is_the_same_scene_at_every_size():
    for index in range(10):
        large, small = draw_picture(0, index, 96).reduce(2), draw_picture(0, index, 48)
        assert np.abs(np.asarray(large, dtype=int) - np.asarray(small, dtype=int)).mean() < 6


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"size is 15, expected at least 16 pixels; draw at 16 or more"):
        draw_picture(0, 0, 15)
    for seed, index, name in ((-1, 0, "seed"), (0, -1, "index"), (0, 2**64, "index")):
        with pytest.raises(ValueError, match=rf"{name} is -?\d+, expected 0 <= {name} < 2\*\*64; pass"):
            draw_factors(seed, index)


def test_light_is_a_strong_nuisance_that_no_factor_tells():
    means = np.array([np.asarray(draw_picture(0, index, size=16)).mean() for index in range(300)])
    dark, bright = np.quantile(means, [0.05, 0.95])
    assert bright > 2 * dark
    colors = np.array([draw_factors(0, index).color for index in range(300)])
    by_color = [means[colors == color].mean() for color in range(len(FACTORS["color"]))]
    assert np.std(by_color) < 0.5 * means.std()
