"""Folders of small pictures, and tars of them as made by other programs."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from dino_sparo.shard import shard
from tests.imagenet_layouts import tar_of

LONG = "b b/" + "long" * 40 + ".bmp"
NAMES = ("a/1.jpg", "a/10.PNG", "a/2.Jpeg", "b b/ü.png", LONG, "b b/in/12.30.jpg", "c/x.webp")


def picture(number: int, size: tuple[int, int] = (26, 22), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, *names: str, **how) -> Path:
    """Write a different picture to each file."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number, **how))
    return root


def touch(root: Path, *names: str) -> Path:
    """Create empty files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write_tar(path: Path, **members: bytes) -> Path:
    """Write a tar; the keyword `a__jpg` is the file a.jpg. Returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of({name.replace("__", "."): data for name, data in members.items()}))
    return path.parent


def write_folder(root: Path) -> Path:
    """Class folders with train and val."""
    write(root / "train", *NAMES)
    write(root / "val", "c/y.png", "a/z.jpg")
    return root


def shards_of(folder: Path, out: Path) -> Path:
    """The same images in several shards."""
    shard(str(folder), str(out), num_workers=0, images_per_shard=3)
    return out
