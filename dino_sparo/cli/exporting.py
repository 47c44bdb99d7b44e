"""The commands that make other files of images or weights: `prepare`, `shard`, `export` and `embed`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dino_sparo.cli.images import EncodingOptions, ImagesOptions, ReadingOptions
from dino_sparo.errors import UserError
from dino_sparo.recipe.typed import Workers


@dataclass
class PrepareOptions:
    """Class folders of ImageNet as people have it."""

    source: str
    """Folder of what was downloaded: Kaggle's layout, the official tar files, or their unpacked folders."""
    out: str
    """Folder for train/<class> and val/<class>: links to images that are already unpacked, else the unpacked
    images."""
    labels: str | None = None
    """Classes of the images of a flat folder: LOC_val_solution.csv, the devkit (folder or tar.gz), or a text
    file with a line `file_name class` for every image; null: found near ImageNet's validation images."""


@dataclass
class ShardOptions(ReadingOptions):
    """Tar shards of a folder of images or parquet files, for network file systems and a random order."""

    source: str
    """Folder of images (train/<class>/... and val/<class>/..., <class>/... or flat) or of parquet files."""
    out: str
    """Folder for the shards, in train/ and val/ if the source has both; give it as `data.path` to read
    them."""
    short_side: int | None = None
    """Images whose short side exceeds this many pixels are resized to it and written as JPEG of quality 95;
    null: all files are copied as they are."""
    hold_out: int | None = None
    """A number N: every N-th image of train, in the order of class and name, becomes val, and val of the
    source is not read; null: train and val are those of the source."""
    num_workers: Workers | None = None
    """Processes that write shards; 0: write in this process; null: one per CPU core."""


@dataclass
class ExportOptions:
    """An encoder for other programs: a folder that timm reads, ONNX, or a file in the official format."""

    run: str
    """Run folder, checkpoint file, exported folder, official DINO weights of a ViT, or `timm:NAME`."""
    out: str
    """Where to write: `timm`: a new folder; `onnx`: a folder for model.onnx; `official`: a new file,
    NAME.pth."""
    format: Literal["timm", "onnx", "official"] = "timm"
    """Format: `timm`: model.safetensors, config.json, and README.md, as on the Hugging Face hub; `onnx`:
    model.onnx for any batch size; `official`: a .pth file as the official DINO code writes it, from a run
    with student, teacher, and their heads."""
    which: Literal["teacher", "student"] = "teacher"
    """Weights to export."""
    arch: Literal["vit_tiny", "vit_small", "vit_base"] | None = None
    """Architecture of official weights, whose files do not state the number of attention heads; null: heads
    of width 64."""
    license: str | None = None
    """License of the weights for the model card and ONNX, by its name on the hub, such as apache-2.0; null:
    not stated."""


@dataclass(kw_only=True)
class EmbedOptions(EncodingOptions):
    """Features of a folder of images, with the names of their files, for search, clustering or labels of your
    own: numpy.load(FILE) gives `features`, float32, and `names`."""

    data: ImagesOptions
    """The images."""
    out: str
    """New file, NAME.npz."""
    what: Literal["encoding", "slots", "cls", "tokens"] = "encoding"
    """Feature to write: `encoding`: all slots concatenated, or the CLS token of an encoder without slots;
    `slots`: (num_images, L, V); `cls`: CLS token; `tokens`: all tokens, CLS first."""


def prepare(options: PrepareOptions) -> None:
    """`dino-sparo prepare`."""
    from dino_sparo.prepare import prepare as make_class_folders

    print(make_class_folders(**vars(options)))


def shard(options: ShardOptions) -> None:
    """`dino-sparo shard`."""
    from dino_sparo.data.splits import Choice
    from dino_sparo.shard import shard as write

    write(
        options.source,
        options.out,
        options.short_side,
        options.num_workers,
        every=options.hold_out,
        choice=Choice.of(options),
    )


def export(options: ExportOptions) -> None:
    """`dino-sparo export`."""
    from dino_sparo.export import export as write

    print(write(**vars(options)))


def embed(options: EmbedOptions) -> None:
    """`dino-sparo embed`."""
    import numpy as np

    from dino_sparo.cli.images import open_chosen
    from dino_sparo.evaluation.features import embed as features_of
    from dino_sparo.files import atomic_write
    from dino_sparo.interop.load import load_encoder
    from dino_sparo.parallel.device import choose_device
    from dino_sparo.parallel.distributed import local_rank

    out = Path(options.out)
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise UserError(f"out is {options.out!r}, expected NAME.npz in a folder that exists")
    if out.exists():
        raise UserError(f"out: {out} already exists; give another path or remove it")
    device = choose_device(options.device, local_rank())
    encoder = load_encoder(options.run, options.which).to(device)
    source = open_chosen(options.data, encoder=encoder)
    features = features_of(
        *(encoder, source, options.what), batch_size=options.batch_size, num_workers=options.num_workers
    )
    names = np.array([source.name(number) for number in range(len(source))])
    with atomic_write(out) as file:
        np.savez(file, features=features, names=names)
    print(f"features {features.shape} and names of their images: {out}")
