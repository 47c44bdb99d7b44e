"""Miniature ImageNet as people have it: three classes, seven training and five validation images."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from dino_sparo.data.imagenet import DEVKIT, GROUND_TRUTH, META

WNIDS = ("n02123045", "n01440764", "n02084071")  # in the order of their ILSVRC2012_ID, which is not theirs
VAL_IDS = (2, 1, 3, 2, 1)


def jpeg(number: int) -> bytes:
    """A picture of its own for every number; of different sizes in bytes."""
    pixels = np.random.default_rng(number).integers(0, 256, (8 + number, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


TRAIN = {
    wnid: {f"{wnid}_{n}.JPEG": jpeg(10 * i + n) for n in range(count)}
    for i, (wnid, count) in enumerate(zip(WNIDS, (3, 2, 2), strict=True))
}
VAL = {f"ILSVRC2012_val_{n:08d}.JPEG": jpeg(100 + n) for n in range(1, 6)}
VAL_CLASSES = {name: WNIDS[number - 1] for name, number in zip(VAL, VAL_IDS, strict=True)}
SORTED_VAL = {
    wnid: {name: content for name, content in VAL.items() if VAL_CLASSES[name] == wnid} for wnid in WNIDS
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_classes(folder: Path, classes: dict[str, dict[str, bytes]]) -> None:
    for name, files in classes.items():
        write(folder / name, files)


def tar_of(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def class_tars() -> dict[str, bytes]:
    return {f"{wnid}.tar": tar_of(files) for wnid, files in TRAIN.items()}


def official_tars(folder: Path) -> None:
    """The tar of class tars holds what is none of them, too."""
    train = tar_of(class_tars() | {"notes.txt": b"", "n1.tar": b""})
    write(folder, {"ILSVRC2012_img_train.tar": train, "ILSVRC2012_img_val.tar": tar_of(VAL)})


def solution(folder: Path) -> None:
    """Kaggle's file: unordered, some images with two boxes."""
    lines = ["ImageId,PredictionString"]
    for name in sorted(VAL, reverse=True):
        boxes = f"{VAL_CLASSES[name]} 85 1 499 272 " * (1 + len(lines) % 2)
        lines.append(f"{name.removesuffix('.JPEG')},{boxes}")
    write(folder, {"LOC_val_solution.csv": "\n".join([*lines, ""]).encode()})


def devkit_files() -> dict[str, bytes]:
    """The two files of the devkit that matter: three classes, and a synset above them with a later ID."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "wordnet_height", "num_train_images")
    rows = [(i, wnid, f"word {i}", "a gloss", 0, 0, 1300) for i, wnid in enumerate(WNIDS, 1)]
    rows.append((4, "n00001740", "entity", "all", 3, 1, 0))
    synsets = np.empty((len(rows), 1), dtype=[(field, object) for field in fields])
    synsets[:, 0] = rows
    file = io.BytesIO()
    savemat(file, {"synsets": synsets}, do_compression=True)
    return {META: file.getvalue(), GROUND_TRUTH: "".join(f"{number}\n" for number in VAL_IDS).encode()}


def devkit(folder: Path) -> None:
    for name, content in devkit_files().items():
        write((folder / DEVKIT / name).parent, {Path(name).name: content})


def devkit_archive(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{DEVKIT}.tar.gz", "w:gz") as tar:
        for name, content in devkit_files().items():
            member = tarfile.TarInfo(f"{DEVKIT}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def kaggle(folder: Path) -> None:
    write_classes(folder / "ILSVRC/Data/CLS-LOC/train", TRAIN)
    write(folder / "ILSVRC/Data/CLS-LOC/val", VAL)
    write(folder / "ILSVRC/Data/CLS-LOC/test", {"ILSVRC2012_test_00000001.JPEG": jpeg(1)})
    write(folder / "ILSVRC/Annotations/CLS-LOC/val", {"ILSVRC2012_val_00000001.xml": b""})
    solution(folder)


def unpacked(folder: Path) -> None:
    """Training images in class folders beside the validation images as their tar has them."""
    write_classes(folder / "train", TRAIN)
    write(folder / "val", VAL)


def labels_list(separator: str = " ") -> bytes:
    return "".join(f"{name}{separator}{wnid}\n" for name, wnid in VAL_CLASSES.items()).encode()
