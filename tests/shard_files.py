"""Folders of small pictures, and tars of them as other people make them."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from dino_sparo.shard import shard

LONG = "b b/" + "long" * 40 + ".bmp"
NAMES = ("a/1.jpg", "a/10.PNG", "a/2.Jpeg", "b b/ü.png", LONG, "b b/in/12.30.jpg", "c/x.webp")


def picture(number: int, size: tuple[int, int] = (26, 22), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(root: Path, *names: str, **how) -> Path:
    """A picture of its own in each file."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number, **how))
    return root


def write_tar(path: Path, **members: bytes) -> Path:
    """A tar as other people make them; `a__jpg` for a.jpg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path.parent


def write_folder(root: Path) -> Path:
    """Train and val in class folders."""
    write(root / "train", *NAMES)
    write(root / "val", "c/y.png", "a/z.jpg")
    return root


def shards_of(folder: Path, out: Path) -> Path:
    """Its shards, several of them."""
    shard(str(folder), str(out), num_workers=0, images_per_shard=3)
    return out
