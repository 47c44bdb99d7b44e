"""Every knob, documented. Imported before torch: `--help` and a mistake in a recipe answer at once."""

from dino_sparo.options.evaluating import CompareOptions, KnnOptions, LabelledDataOptions, LinearOptions
from dino_sparo.options.files import ShardOptions
from dino_sparo.options.measuring import BenchOptions
from dino_sparo.options.slots import ImagesOptions

__all__ = [
    "BenchOptions",
    "CompareOptions",
    "ImagesOptions",
    "KnnOptions",
    "LabelledDataOptions",
    "LinearOptions",
    "ShardOptions",
]
