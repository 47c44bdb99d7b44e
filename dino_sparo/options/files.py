"""Options of the commands that make files of files."""

from dataclasses import dataclass
from typing import Literal

from dino_sparo.recipe.typed import Count


@dataclass
class PrepareOptions:
    """Class folders of ImageNet as people have it."""

    source: str
    """Folder of the images or tars: Kaggle's layout, the official tars, or what was in them."""
    out: str
    """Folder that gets train/<class> and val/<class>, by links where images lie in folders, else unpacked."""
    labels: str | None = None
    """Classes of a flat folder: LOC_val_solution.csv, the devkit (folder or tar.gz), or a text file with a
    line `file_name class` for every image; null takes those that lie near ImageNet's validation images."""


@dataclass
class ShardOptions:
    """Tar shards of a folder of images or parquet files, for network file systems and a random order."""

    source: str
    """Folder of images (train/<class>/... and val/<class>/..., <class>/... or flat) or of parquet files."""
    out: str
    """Folder that gets the shards, in train/ and val/ if the source has both; `data.path` can be it."""
    short_side: int | None = None
    """Reduce images to this short side in pixels if theirs is longer, as JPEG files of quality 95; null
    copies all files as they are."""
    num_workers: Count | None = None
    """Processes that read and write, each one shard at a time; null takes one a core."""


@dataclass
class ExportOptions:
    """An encoder for other programs: a folder that timm reads, ONNX, or a file in the official style."""

    run: str
    """Run folder, checkpoint file, exported folder, or official DINO weights of a ViT."""
    out: str
    """`timm`: new folder; `onnx`: folder that gets model.onnx; `official`: new file, NAME.pth."""
    format: Literal["timm", "onnx", "official"] = "timm"
    """`timm`: model.safetensors, config.json and README.md as on the Hugging Face hub; `onnx`: model.onnx for
    any batch size; `official`: .pth by the official names, of a run student and teacher with heads."""
    which: Literal["teacher", "student"] = "teacher"
    """Whose weights to export."""
    arch: Literal["vit_tiny", "vit_small", "vit_base"] | None = None
    """Architecture of official weights, which do not tell their number of heads; null takes one for 64
    numbers of width."""
