"""Tests of the generated pictures: pure in (seed, index), true to their factors, objects plain to see."""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
import math
import random

import numpy as np
import pytest

from dino_sparo.data import shapes
from dino_sparo.data.shapes import FACTORS, MAX_OBJECTS, Factors, draw_factors, draw_picture

COUNTS = {**{name: len(values) for name, values in FACTORS.items()}, "num_objects": MAX_OBJECTS}
# The same table in other words, so that an edit of the colours that breaks their names is seen.
HUES = {
    "red": 0,
    "orange": 26,
    "yellow": 53,
    "green": 130,
    "cyan": 182,
    "blue": 225,
    "purple": 275,
    "pink": 326,
}


def _forced_scene(factors: Factors, seed: int = 0) -> shapes._Scene:
    return shapes.sample_scene(np.random.default_rng(seed), factors)


def _main_pixels(scene: shapes._Scene, size: int, threshold: int = 12) -> np.ndarray:
    """Return which pixels the main object changes by more than ``threshold`` levels, (size, size) bool."""
    bare = dataclasses.replace(scene, objects=scene.objects[:-1])
    pictures = [np.asarray(shapes.paint(s, size), dtype=int) for s in (scene, bare)]
    return np.abs(pictures[0] - pictures[1]).max(axis=2) > threshold


@pytest.fixture(scope="module")
def table() -> dict[str, np.ndarray]:
    """Return 4000 draws of each factor, counted from 0."""
    drawn = [dataclasses.asdict(draw_factors(11, index)) for index in range(4000)]
    return {name: np.array([row[name] - (name == "num_objects") for row in drawn]) for name in COUNTS}


def test_same_seed_and_index_give_the_same_bytes() -> None:
    assert draw_picture(3, 5).tobytes() == draw_picture(3, 5).tobytes()
    assert draw_factors(3, 5) == draw_factors(3, 5)


def test_pictures_differ_between_indices_and_seeds() -> None:
    drawn = {draw_picture(seed, index, 48).tobytes() for seed in (0, 1) for index in range(200)}
    assert len(drawn) == 400


def test_order_of_calls_and_global_state_do_not_matter() -> None:
    expected = {index: draw_picture(7, index, 32).tobytes() for index in range(20)}
    order = list(range(20))
    random.Random(1).shuffle(order)
    np.random.seed(123)
    before = np.random.get_state()[1].copy()
    assert {index: draw_picture(7, index, 32).tobytes() for index in order} == expected
    assert np.array_equal(np.random.get_state()[1], before)


def test_neighbouring_indices_do_not_share_random_numbers() -> None:
    streams = [shapes.generator(0, index).random(2000) for index in (0, 1, 2)]
    assert len(np.unique(np.concatenate(streams))) == 6000


def test_factor_fields_and_value_counts() -> None:
    assert [field.name for field in dataclasses.fields(Factors)] == list(COUNTS)
    assert list(COUNTS.values()) == [8, 8, 3, 9, 4, 6, 3]
    assert all(len(set(values)) == len(values) for values in FACTORS.values())


@pytest.mark.parametrize("name", COUNTS)
def test_each_factor_is_uniform(table: dict[str, np.ndarray], name: str) -> None:
    # Chi-square against the uniform law; the bound is its mean plus four standard deviations.
    count, values = COUNTS[name], table[name]
    assert values.min() == 0
    assert values.max() == count - 1
    seen, expected = np.bincount(values, minlength=count), len(values) / count
    free = count - 1
    assert ((seen - expected) ** 2 / expected).sum() < free + 4 * math.sqrt(2 * free)


@pytest.mark.parametrize(("one", "two"), list(itertools.combinations(COUNTS, 2)))
def test_factors_are_independent_in_pairs(table: dict[str, np.ndarray], one: str, two: str) -> None:
    # Chi-square of the pair's table against the product of two uniform laws, same bound.
    cells = COUNTS[one] * COUNTS[two]
    seen = np.bincount(table[one] * COUNTS[two] + table[two], minlength=cells)
    expected, free = len(table[one]) / cells, cells - 1
    assert ((seen - expected) ** 2 / expected).sum() < free + 4 * math.sqrt(2 * free)


@pytest.mark.parametrize("index", range(40))
def test_picture_shows_its_factors(index: int) -> None:
    size, factors = 96, draw_factors(2, index)
    rng = shapes.generator(2, index)
    scene = shapes.sample_scene(rng, shapes.sample_factors(rng))
    picture = draw_picture(2, index, size)
    assert picture.tobytes() == shapes.paint(scene, size).tobytes()
    assert len(scene.objects) == factors.num_objects
    assert scene.background == factors.background
    main = scene.objects[-1]
    assert (main.shape, main.texture) == (factors.shape, factors.texture)
    assert 2 * main.radius == pytest.approx((0.40, 0.52, 0.64)[factors.size], rel=0.041)
    rows, columns = np.nonzero(_main_pixels(scene, size))
    row, column = divmod(factors.position, 3)
    for where, cell in ((rows, row), (columns, column)):
        middle = (where.min() + where.max() + 1) / 2 / size
        assert (0.0, 0.4, 0.6)[cell] <= middle <= (0.4, 0.6, 1.0)[cell]
    hues = [colorsys.rgb_to_hsv(*rgb)[0] for rgb in np.asarray(picture)[rows, columns] / 255.0]
    turned = np.exp(2j * math.pi * np.array(hues)).sum()
    nearest = min(HUES, key=lambda name: abs(np.exp(1j * math.radians(HUES[name])) - turned / abs(turned)))
    assert nearest == FACTORS["colour"][factors.colour]


@pytest.mark.parametrize("index", range(60))
def test_main_object_is_distinctly_the_largest(index: int) -> None:
    rng = shapes.generator(4, index)
    *others, main = shapes.sample_scene(rng, shapes.sample_factors(rng)).objects
    for other in others:
        assert other.radius < 0.6 * main.radius
        assert math.dist(other.centre, main.centre) > 0.8 * (main.radius + other.radius)


@pytest.mark.parametrize("shape", range(8))
@pytest.mark.parametrize("background", range(6))
def test_main_object_is_visible_on_every_background(shape: int, background: int) -> None:
    # A centred circle of 40 % of the side covers 12.6 % of the picture; the leanest shape a third of that.
    for colour, texture in itertools.product(range(8), (0, 3)):
        factors = Factors(shape, colour, 0, 4, texture, background, 1)
        scene = _forced_scene(factors, seed=colour)
        assert _main_pixels(scene, 48, threshold=30).mean() > 0.04


@pytest.mark.parametrize("size", range(3))
def test_main_object_has_the_stated_size(size: int) -> None:
    scene = _forced_scene(Factors(0, 0, size, 4, 0, 0, 1))
    _, columns = np.nonzero(_main_pixels(scene, 96))
    assert (columns.max() - columns.min() + 1) / 96 == pytest.approx((0.40, 0.52, 0.64)[size], rel=0.09)


def test_shapes_differ_in_outline() -> None:
    # Turned and placed alike, any two masks differ on a sizeable part of what either covers.
    made = [shapes._Object(shape, (1, 0, 0), 0, (0.5, 0.5), 0.26, 0.0, (0, 0)) for shape in range(8)]
    masks = [shapes.mask(item, 48) for item in made]
    for one, two in itertools.combinations(masks, 2):
        assert np.abs(one - two).sum() / np.maximum(one, two).sum() > 0.15


@pytest.mark.parametrize("texture", range(4))
def test_textures_darken_their_share(texture: int) -> None:
    item = shapes._Object(0, (1, 0, 0), texture, (0.5, 0.5), 0.3, 0.2, (0.1, 0.4))
    share = float(shapes.texture(item, 96).mean())
    assert share == pytest.approx((0.0, 0.5, 0.25, 0.5)[texture], abs=0.06)


@pytest.mark.parametrize("size", [16, 48, 96])
def test_mode_and_size(size: int) -> None:
    picture = draw_picture(0, 0, size)
    assert picture.mode == "RGB"
    assert picture.size == (size, size)


def test_picture_is_the_same_scene_at_every_size() -> None:
    for index in range(10):
        large, small = draw_picture(0, index, 96).reduce(2), draw_picture(0, index, 48)
        assert np.abs(np.asarray(large, dtype=int) - np.asarray(small, dtype=int)).mean() < 6


def test_too_small_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size is 15, expected at least 16 pixels; draw at 16 or more"):
        draw_picture(0, 0, 15)


@pytest.mark.parametrize(("seed", "index", "name"), [(-1, 0, "seed"), (0, -1, "index"), (0, 2**64, "index")])
def test_seed_and_index_out_of_range_are_refused(seed: int, index: int, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is -?\d+, expected 0 <= {name} < 2\*\*64; pass"):
        draw_factors(seed, index)


def test_light_is_a_strong_nuisance_that_no_factor_tells() -> None:
    means = np.array([np.asarray(draw_picture(0, index, size=16)).mean() for index in range(300)])
    dark, bright = np.quantile(means, [0.05, 0.95])
    assert bright > 2 * dark
    colours = np.array([draw_factors(0, index).colour for index in range(300)])
    by_colour = [means[colours == colour].mean() for colour in range(len(FACTORS["colour"]))]
    assert np.std(by_colour) < 0.5 * means.std()
