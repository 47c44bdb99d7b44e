"""Options of commands that are not in cli/ yet."""

from dino_sparo.options.evaluating import LabelledDataOptions
from dino_sparo.options.files import ShardOptions
from dino_sparo.options.measuring import BenchOptions
from dino_sparo.options.slots import ImagesOptions

__all__ = ["BenchOptions", "ImagesOptions", "LabelledDataOptions", "ShardOptions"]
