"""Options that several commands share: the encoder to use, and the images of a command."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dino_sparo.recipe.sections import ImagePixels, ValueRange, check_value_range
from dino_sparo.recipe.typed import Batch, Workers

if TYPE_CHECKING:
    from dino_sparo.data.sources import ImageSource
    from dino_sparo.data.splits import Choice
    from dino_sparo.models import Encoder


@dataclass(kw_only=True)
class EncodingOptions:
    """The encoder to use, and how images are encoded."""

    run: str
    """Run folder, weights file, or `timm:NAME`."""
    which: Literal["teacher", "student"] = "teacher"
    """Weights to use."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device; auto: CUDA if there is a GPU, else the CPU."""
    num_workers: Workers | None = None
    """Data loading workers per process; 0: load in the process itself; null: one per CPU core, shared by all
    processes, at most 16 each."""
    batch_size: Batch = 64
    """Images per forward pass."""


@dataclass(kw_only=True)
class ReadingOptions:
    """How the images are read."""

    max_pixels: ImagePixels | None = None
    """Largest image that is decoded, in pixels; larger ones count as unreadable. null: 67,108,864 (about 0.5
    GB of memory per image)."""
    value_range: ValueRange | None = None
    """For images with more than 8 bits per channel: the pixel values that become black and white, such as
    [0, 4095]; null: those of the run, if any, else a range that depends on the image mode."""

    def __post_init__(self) -> None:
        check_value_range(self.value_range)


@dataclass
class ImagesOptions(ReadingOptions):
    """The images."""

    path: str
    """Folder of images (train/<class>/..., <class>/... or flat), of tar shards, or of parquet files;
    `hub:OWNER/NAME` for a dataset on the hub; `cifar10` or `stl10`; `shapes` for generated pictures."""
    train: str | None = None
    """Images to use: a folder below `path`, or a pattern of file names such as 'val-*.tar'; `.`: all of
    `path`; null: the training split, found by its usual names."""


@dataclass
class LabeledDataOptions(ImagesOptions):
    """The labeled images, train/<class>/... and val/<class>/..."""

    val: str | None = None
    """Validation split below or beside `path`; null: found by its usual names, else every fifth image of
    train is held out."""
    label_column: str | None = None
    """Label column of parquet files; null: `label`, `labels`, or the only column of type ClassLabel."""


def open_chosen(data: ImagesOptions, *, encoder: "Encoder | None" = None) -> "ImageSource":
    """The images, read as by `choice_of`. Raises as `open_images`."""
    from dino_sparo.data.sources import decide, open_images, say_splits

    choice = choice_of(data, encoder)
    splits = decide(data.path, choice)
    source = open_images(data.path, choice=choice, splits=splits)
    say_splits(data.path, source, None, splits, with_val=False)
    return source


def choice_of(data: ReadingOptions, encoder: "Encoder | None") -> "Choice":
    """What is chosen of the images for an encoder; unless chosen, pixels are read as in its training."""
    from dino_sparo.data.splits import Choice

    choice = Choice.of(data)
    trained = encoder.value_range if encoder else None
    return choice._replace(value_range=choice.value_range or trained)
