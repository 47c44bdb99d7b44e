"""Options that name the images of a command."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dino_sparo.errors import UserError
from dino_sparo.recipe.sections import ImagePixels, PixelValue, check_value_range

if TYPE_CHECKING:
    from dino_sparo.data.sources import ImageSource
    from dino_sparo.data.splits import Choice


@dataclass(kw_only=True)
class ReadingOptions:
    """How the images are read."""

    max_pixels: ImagePixels | None = None
    """Pixels of the largest image that is decoded; null is 67,108,864, by which it takes about 0.5 GB."""
    value_range: tuple[PixelValue, PixelValue] | None = None
    """Pixels of more than 8 bits that become black and white, such as [0, 4095]; null takes those of the run,
    or goes by the mode of each image."""

    def __post_init__(self) -> None:
        check_value_range(self.value_range)


@dataclass
class ImagesOptions(ReadingOptions):
    """A folder of images."""

    path: str
    """Folder of images (train/<class>/..., <class>/... or flat), of tar shards, or of parquet files;
    `hub:OWNER/NAME`, `cifar10`, `stl10`, or `shapes` for generated pictures."""
    train: str | None = None
    """What of `path` to take: a folder, or a pattern of names in it such as 'val-*.tar'; null finds train by
    names, `.` takes all."""


@dataclass
class LabeledDataOptions(ReadingOptions):
    """A labeled image folder."""

    path: str
    """Folder with train/<class>/... and val/<class>/..., shards or parquet files of such, `hub:OWNER/NAME`,
    `cifar10`, `stl10`, or `shapes`; without val every fifth image is held out."""
    train: str | None = None
    """What of `path` to learn from: a folder, or a pattern of names in it such as 'train-*.tar'; null finds
    it by names, `.` takes all."""
    val: str | None = None
    """What of `path`, or beside it, to test on; null finds it by names."""
    label_column: str | None = None
    """Column of parquet files that holds the classes; null takes `label`, `labels` or the only ClassLabel."""


def open_chosen(
    data: ImagesOptions, max_images: int | None = None, *, run: str | None = None
) -> "ImageSource":
    """The images, or so many of them, spread evenly, read as by `choice_of`. Raises as `open_images`."""
    from dino_sparo.data.sources import open_images

    return open_images(data.path, max_images, choice=choice_of(data, run))


def choice_of(data: ReadingOptions, run: str | None) -> "Choice":
    """What is chosen of the images for an encoder; without another word pixels are read as its run did."""
    from dino_sparo.data.splits import Choice
    from dino_sparo.recipe.typed import read_yaml
    from dino_sparo.runs.rundir import CONFIG_FILE

    choice, config = Choice.of(data), Path(run or "") / CONFIG_FILE
    if run and choice.value_range is None and config.is_file():
        with suppress(UserError, KeyError, TypeError):  # of another version, or damaged
            low, high = read_yaml(config)["data"]["value_range"]
            choice = choice._replace(value_range=(float(low), float(high)))
    return choice
