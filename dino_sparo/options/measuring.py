"""Options of the benchmark."""

from dataclasses import dataclass
from typing import Literal

from dino_sparo.options.slots import ImagesOptions
from dino_sparo.recipe.typed import Count


@dataclass
class BenchOptions:
    """Where the time of training by a recipe goes, and against plain code; or time and memory of the SPARO
    read-out against its direct form and the block it replaces, or of the search of nearest neighbors."""

    what: Literal["training", "readout", "knn"] = "training"
    """What to measure. training takes the fields from config to device; readout takes batch_size, rounds,
    device and num_tokens; knn those with `knn_`, rounds and device."""
    config: str = "photos_sparo"
    """Recipe, by name or path, whose training is measured."""
    data: ImagesOptions | None = None
    """Images to train on; null takes generated pictures."""
    keep_files: bool = False
    """Read the files of data as they are; else its images are first written as JPEG of ImageNet's usual
    size, 500 x 375 pixels, in the folder for temporary files: small files decode too cheaply."""
    num_images: int = 256
    """Images to read, at least a batch."""
    batch_size: int = 16
    """Images a step, or a pass."""
    rounds: int = 15
    """Interleaved rounds; the medians are reported."""
    seconds: float | None = 10.0
    """Of training end to end, from files; null leaves it out."""
    compare: bool = False
    """Measure a plain implementation beside ours, round by round, and print the ratios."""
    json: bool = False
    """Print one JSON object; the table goes to standard error."""
    profile: str | None = None
    """File for a trace of some steps and of the loading of their images, for chrome://tracing; tells too how
    often the host waits."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """As machine.precision; auto takes the recipe's."""
    num_workers: Count | None = None
    """As machine.num_workers; null takes the recipe's."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA where there is a GPU, else the CPU."""
    num_tokens: int = 197
    """Tokens an image."""
    knn_train: int = 200_000
    """Generated features to search, in a folder for temporary files."""
    knn_test: int = 10_000
    """Features to search for."""
    knn_width: int = 4096
    """Numbers of a feature."""
