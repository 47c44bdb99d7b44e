"""Generated pictures of simple objects whose factors of variation are known exactly: `--data.path shapes`.

Everything is a pure function of ``(seed, index)``, so pictures can be drawn in any order and any process.
"""

from __future__ import annotations

import colorsys
import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Array = npt.NDArray[np.floating[Any]]
Rgb = tuple[float, float, float]

FACTORS: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "star", "cross", "ring", "heart", "crescent"),
    "color": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
    "size": ("small", "medium", "large"),
    "position": (
        *("top-left", "top", "top-right", "left", "center"),
        *("right", "bottom-left", "bottom", "bottom-right"),
    ),
    "texture": ("plain", "stripes", "dots", "checks"),
    "background": ("plain", "gradient", "noise", "stripes", "blobs", "grid"),
}
SHAPES = "shapes"
SHAPES_SIZES = {"train": 4000, "val": 1000}
MAX_OBJECTS = 3
MIN_PICTURE_SIZE = 16

# The second key word separates these streams from any other use of Philox with the same seed.
_DOMAIN = 0x5348_4150_4553
_SUPERSAMPLE = 3
_COUNTS = {name: len(values) for name, values in FACTORS.items()}
# (hue, saturation, value) of each color, in the order of FACTORS["color"].
_HSV = (
    *((0.0, 0.88, 0.86), (0.072, 0.92, 0.98), (0.147, 0.90, 0.97), (0.36, 0.80, 0.66)),
    *((0.505, 0.80, 0.88), (0.625, 0.85, 0.86), (0.765, 0.75, 0.66), (0.905, 0.58, 0.98)),
)
# Diameters of the main object, as fractions of the picture's side.
_DIAMETERS = (0.40, 0.52, 0.64)
# Brightness of the light, a nuisance variable that hides the colors from an untrained encoder.
_LIGHT = (0.35, 1.1)
_TEXTURE_PERIOD = 0.125
_NOISE_CELLS = 24


@dataclass(frozen=True)
class Factors:
    """Hold one picture's factors: value numbers of ``FACTORS`` for the main object, and a count of 1..3."""

    shape: int
    color: int
    size: int
    position: int
    texture: int
    background: int
    num_objects: int


@dataclass(frozen=True)
class _Object:
    """Hold one object to paint; lengths are fractions of the picture's side, the angle is in radians."""

    shape: int
    rgb: Rgb
    texture: int
    center: tuple[float, float]
    radius: float
    angle: float
    phase: tuple[float, float]


@dataclass(frozen=True, eq=False)
class _Scene:
    """Hold the content of a picture, independent of its size; the main object is the last one."""

    objects: tuple[_Object, ...]
    background: int
    tint: Rgb
    light: float
    draws: Array


def draw_factors(seed: int, index: int) -> Factors:
    """Return the factors of picture ``index`` of the set ``seed``, uniform and independent of each other.

    Raises ValueError if ``seed`` or ``index`` is outside [0, 2**64).
    """
    return sample_factors(generator(seed, index))


def draw_picture(seed: int, index: int, size: int = 96) -> Image.Image:
    """Return picture ``index`` of the set ``seed`` as an RGB image of ``size`` x ``size`` pixels.

    The picture shows what ``draw_factors(seed, index)`` says, whatever its size.
    Raises ValueError if ``size`` is below 16, or ``seed`` or ``index`` is outside [0, 2**64).
    """
    if size < MIN_PICTURE_SIZE:
        raise ValueError(
            f"picture size is {size}, expected at least {MIN_PICTURE_SIZE} pixels; "
            "draw at 16 or more and scale the picture down afterwards"
        )
    rng = generator(seed, index)
    return paint(sample_scene(rng, sample_factors(rng)), size)


def generator(seed: int, index: int) -> np.random.Generator:
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value}, expected 0 <= {name} < 2**64; pass a non-negative integer")
    # Philox increments the first counter word, so the streams of indices in the third word never overlap.
    key = np.array([seed, _DOMAIN], dtype=np.uint64)
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def sample_factors(rng: np.random.Generator) -> Factors:
    return Factors(*rng.integers([0] * len(FACTORS) + [1], [*_COUNTS.values(), MAX_OBJECTS + 1]).tolist())


def sample_scene(rng: np.random.Generator, factors: Factors) -> _Scene:
    """Return a scene with these ``factors``, and everything else drawn from ``rng``."""
    radius = 0.5 * _DIAMETERS[factors.size] * rng.uniform(0.96, 1.04)
    # Large objects may cross the border slightly, else their nine positions would nearly coincide.
    reach = min(0.26, 0.5 - 0.88 * radius)
    row, column = divmod(factors.position, 3)
    dx, dy = rng.uniform(-0.03, 0.03, 2)
    center = (0.5 + reach * (column - 1) + dx, 0.5 + reach * (row - 1) + dy)
    main = _sample_object(rng, [factors.shape, factors.color, factors.texture], center, radius)
    placed = [main]
    for _ in range(factors.num_objects - 1):
        small = rng.uniform(0.085, 0.11)
        kind = rng.integers(0, (_COUNTS["shape"], _COUNTS["color"], _COUNTS["texture"])).tolist()
        spot = _free_spot(rng, placed, small)
        placed.append(_sample_object(rng, kind, spot, small))
    tint = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.03, 0.16), rng.uniform(0.66, 0.86))
    draws = rng.random((_NOISE_CELLS, _NOISE_CELLS), dtype=np.float32)
    light = math.exp(rng.uniform(math.log(_LIGHT[0]), math.log(_LIGHT[1])))
    return _Scene(tuple(reversed(placed)), factors.background, tint, light, draws)


def _sample_object(
    rng: np.random.Generator, kind: list[int], center: tuple[float, float], radius: float
) -> _Object:
    """Return an object of ``kind`` (shape, color, texture) with jittered hue, brightness, angle, phase."""
    shape, color, texture = kind
    hue, saturation, value = _HSV[color]
    hue_shift, scale, turn, u, v = rng.uniform((-0.012, 0.92, -20.0, 0.0, 0.0), (0.012, 1.02, 20.0, 1.0, 1.0))
    rgb = colorsys.hsv_to_rgb((hue + hue_shift) % 1.0, saturation, value * scale)
    return _Object(shape, rgb, texture, center, radius, math.radians(turn), (u, v))


def _free_spot(rng: np.random.Generator, placed: list[_Object], radius: float) -> tuple[float, float]:
    """Return the first random place that touches no placed object, else the one with most clearance."""
    spots = rng.uniform(radius, 1.0 - radius, (24, 2)).tolist()
    # Square corners reach beyond the nominal radius, hence a margin.
    clearances = [min(math.dist(s, o.center) - 1.12 * (o.radius + radius) for o in placed) for s in spots]
    best = next((i for i, c in enumerate(clearances) if c > 0.0), int(np.argmax(clearances)))
    return spots[best][0], spots[best][1]


def paint(scene: _Scene, size: int) -> Image.Image:
    """Return the scene as an RGB image of ``size`` x ``size`` pixels."""
    lightness = 1.0 + 0.16 * _background(scene, size)
    picture = lightness[..., None] * np.array(scene.tint, dtype=np.float32)
    for item in scene.objects:
        shade = 1.0 - 0.55 * texture(item, size)
        fill = shade[..., None] * np.array(item.rgb, dtype=np.float32)
        picture += mask(item, size)[..., None] * (fill - picture)
    picture *= np.float32(scene.light)
    return Image.fromarray((picture.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8))


@lru_cache(maxsize=8)
def _axes(size: int) -> tuple[Array, Array]:
    """Return the pixel centers' x, shape (1, size), and y, shape (size, 1), as fractions of the side."""
    axis = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    return axis[None, :], axis[:, None]


def _soft(wave: Array, period: float, size: int) -> Array:
    """Return a mask, in 0..1, of where ``wave`` is positive, with edges about one pixel wide."""
    return (0.5 + wave * np.float32(period * size / math.tau)).clip(0.0, 1.0)


def _background(scene: _Scene, size: int) -> Array:
    """Return the relative lightness of the background, shape (size, size), in about -1..1."""
    name = FACTORS["background"][scene.background]
    x, y = _axes(size)
    a, b, c = scene.draws[0, :3].tolist()
    if name == "plain":
        return np.zeros((size, size), dtype=np.float32)
    if name == "gradient":
        return 2.0 * (math.cos(math.tau * a) * (x - 0.5) + math.sin(math.tau * a) * (y - 0.5))
    if name == "noise":
        cells = Image.fromarray(2.0 * scene.draws - 1.0)
        return np.asarray(cells.resize((size, size), Image.Resampling.BICUBIC))
    if name == "blobs":
        # A Gaussian is a product over the two axes, so five of them cost one small matrix product.
        spots = scene.draws[1, :15].reshape(5, 3, 1)
        width = 0.07 + 0.07 * spots[:, 2]
        across, down = (np.exp(-(((x - spots[:, i]) / width) ** 2)) for i in (0, 1))
        return (1.7 * (down.T @ across) - 0.6).clip(-1.0, 1.0)
    period = 0.16 + 0.06 * c
    if name == "stripes":
        wave = np.sin(math.tau * ((math.cos(math.pi * a) * x + math.sin(math.pi * a) * y) / period + b))
        return 1.4 * _soft(wave, period, size) - 0.7
    # A grid of thin lines: dark wherever either axis is near a multiple of the period.
    lines_x = _soft(np.cos(math.tau * (x / period + a)) - 0.8, period, size)
    lines_y = _soft(np.cos(math.tau * (y / period + b)) - 0.8, period, size)
    return 0.3 - 1.3 * np.maximum(lines_x, lines_y)


def texture(item: _Object, size: int) -> Array:
    """Return the weight of the object's darker tone in its own turned frame, 0..1, shape (size, size)."""
    name = FACTORS["texture"][item.texture]
    if name == "plain":
        return np.zeros((size, size), dtype=np.float32)
    cos, sin = (f(item.angle) * math.tau / _TEXTURE_PERIOD for f in (math.cos, math.sin))
    x, y = _axes(size)
    u = cos * x + sin * y + math.tau * item.phase[0]
    if name == "stripes":
        return _soft(np.sin(u), _TEXTURE_PERIOD, size)
    v = cos * y - sin * x + math.tau * item.phase[1]
    if name == "dots":
        return _soft(np.cos(u) + np.cos(v) - 0.7, _TEXTURE_PERIOD, size)
    return _soft(np.sin(0.6 * u) * np.sin(0.6 * v), _TEXTURE_PERIOD, size)


@lru_cache(maxsize=1)
def _outlines() -> tuple[tuple[npt.NDArray[Any], ...], ...]:
    """Return each shape's outline, and hole if any, as points x + iy of about unit radius."""
    t = np.linspace(0.0, math.tau, 48, endpoint=False)
    circle = np.exp(1j * t)
    star = -1j * np.exp(0.2j * math.pi * np.arange(10)) * np.tile([1.1, 0.5], 5) + 0.08j
    cross = np.outer([1, 1j, -1, -1j], [-0.3 - 1j, 0.3 - 1j, 0.3 - 0.3j]).ravel()
    heart_y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    heart = (16 * np.sin(t) ** 3 - 1j * (heart_y + 2.5)) / 15.5
    square = 0.86 * np.array([-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j])
    triangle = np.array([-1j, 1.05 + 0.8j, -1.05 + 0.8j])
    ring, crescent = (circle, 0.54 * circle), (circle + 0.1, 0.8 * circle + 0.56)
    return (circle,), (square,), (triangle,), (star,), (cross,), ring, (heart,), crescent


def mask(item: _Object, size: int) -> Array:
    """Return how much of each pixel the object covers, in 0..1, shape (size, size)."""
    side = size * _SUPERSAMPLE
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    turn = item.radius * np.exp(1j * item.angle)
    for part, ink in zip(_outlines()[item.shape], (255, 0), strict=False):
        points = side * (part * turn + complex(*item.center)) - (0.5 + 0.5j)
        pen.polygon(points.view(np.float64).tolist(), fill=ink)
    return np.asarray(canvas.reduce(_SUPERSAMPLE), dtype=np.float32) / np.float32(255.0)


# --- Sources of images


@dataclass(frozen=True, eq=False)
class NumberedImages:
    """Images of a set by number, without files of their own: an `ImageSource` without `load`.

    Attributes:
        kind: of an image, before its number in messages.
        key: of the set, in the fingerprint.
        no_files: why files are not scanned.
    """

    kind: str
    key: str
    no_files: str
    indices: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64] | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return f"{self.kind} {self.indices[index]}"

    def read(self, index: int) -> bytes:
        return b""

    def subset(self, indices: npt.NDArray[np.int64]) -> Self:
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, indices=self.indices[indices], labels=labels)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.key.encode() + self.indices.tobytes()).hexdigest()

    def stats(self) -> npt.NDArray[np.int64]:
        return np.zeros((len(self), 3), np.int64)


@dataclass(frozen=True, eq=False)
class ShapesSource(NumberedImages):
    """Pictures of the set `seed`, drawn on demand."""

    seed: int

    @classmethod
    def of(cls, seed: int, indices: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> ShapesSource:
        """The pictures with these numbers, labeled by the color of the main object."""
        about = ("generated picture", f"shapes {seed}", "generated pictures are not files")
        return cls(*about, indices, labels, FACTORS["color"], seed)

    def load(self, index: int, max_side: int | None = None) -> Image.Image:
        return draw_picture(self.seed, int(self.indices[index]))


def shapes_source(split: str) -> ShapesSource:
    """The generated pictures of a split."""
    first = 0 if split == "train" else SHAPES_SIZES["train"]
    indices = np.arange(first, first + SHAPES_SIZES[split])
    labels = np.array([draw_factors(0, int(i)).color for i in indices], dtype=np.int64)
    return ShapesSource.of(0, indices, labels)
