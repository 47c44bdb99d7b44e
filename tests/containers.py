"""The same images in other containers: parquet files as the Hugging Face hub ships them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from dino_sparo.data.sources import open_images, open_val

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write_parquet(
    path: Path,
    images: Sequence[dict[str, Any] | None],
    labels: Sequence[int | None] | None = None,
    classes: Sequence[str] | None = None,
    image: str = "image",
    label: str = "label",
    group: int = 2,
) -> Path:
    """One file of images {bytes, path}, in row groups of so many; its folder."""
    columns: dict[str, Any] = {image: pa.array(images, IMAGE)}
    features: dict[str, Any] = {image: {"_type": "Image"}}
    if labels is not None:
        columns[label] = pa.array(labels, pa.int64())
        features[label] = {"_type": "Value", "dtype": "int64"}
    if classes is not None:
        features[label] = {"_type": "ClassLabel", "names": list(classes)}
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns).replace_schema_metadata(about), path, row_group_size=group)
    return path.parent


def parquet_of(folder: Path, out: Path, images_per_file: int = 4) -> Path:
    """The images of a folder in its order, several files a split, as the hub's library writes them."""
    for split, source in (("train", open_images(str(folder))), ("validation", open_val(str(folder)))):
        if source is None:
            continue
        files = -(-len(source) // images_per_file)
        for number in range(files):
            rows = range(number * images_per_file, min(len(source), (number + 1) * images_per_file))
            write_parquet(
                out / f"data/{split}-{number:05d}-of-{files:05d}.parquet",
                [{"bytes": source.read(row), "path": Path(source.name(row)).name} for row in rows],
                None if source.labels is None else source.labels[rows].tolist(),
                None if source.labels is None else source.classes,
            )
    return out
