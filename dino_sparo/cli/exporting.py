"""The commands that make other files of images or weights: `prepare` and `export`."""

from dataclasses import dataclass
from typing import Literal


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
class ExportOptions:
    """An encoder for other programs: a folder that timm reads, ONNX, or a file in the official style."""

    run: str
    """Run folder, checkpoint file, exported folder, official DINO weights of a ViT, or `timm:NAME`."""
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
    license: str | None = None
    """Of the weights, by its name on the hub, such as apache-2.0, for the model card and ONNX; null: not
    stated."""


def prepare(options: PrepareOptions) -> None:
    """`dino-sparo prepare`."""
    from dino_sparo.prepare import prepare as make_class_folders

    print(make_class_folders(options.source, options.out, options.labels))


def export(options: ExportOptions) -> None:
    """`dino-sparo export`."""
    from dino_sparo.export import export as write

    print(
        write(
            options.run,
            options.out,
            options.format,
            which=options.which,
            arch=options.arch,
            license=options.license,
        )
    )
