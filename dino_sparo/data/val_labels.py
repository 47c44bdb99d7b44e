"""Classes of a flat folder of images: from Kaggle's solution file, ImageNet's devkit or a list of labels."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino_sparo.errors import UserError, UserFileNotFoundError

DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet, beside its folder of images
SOLUTION, SOLUTION_HEADER = "LOC_val_solution.csv", "ImageId,PredictionString"
LEVELS_TO_LABELS = 4  # from Kaggle's val folder up to where its solution file lies


class Label(NamedTuple):
    """The class of an image, and the line that says so."""

    name: str
    line: int


def labels_near(images: Path, are_imagenet: bool = True) -> Path | None:
    """Labels of validation images beside their folder, or for ImageNet's in it or a little above it; None if
    there are none."""
    if (images.parent / ANNOTATIONS).is_file():
        return images.parent / ANNOTATIONS
    if not are_imagenet:
        return None
    places = [images.absolute(), *images.absolute().parents[:LEVELS_TO_LABELS]]
    # Kaggle's first: they need no scipy
    for name, proof in ((SOLUTION, ""), (DEVKIT, GROUND_TRUTH), (f"{DEVKIT}.tar.gz", "")):
        for place in places:
            if (place / name / proof).is_file():
                return place / name
    return None


def image_classes(images: Collection[str], where: Path, labels: Path) -> dict[str, str]:
    """The class of every image, by file name.

    Args:
        images: file names of the images in a flat folder or tar.
        where: that folder or tar, for messages.
        labels: Kaggle's LOC_val_solution.csv, the devkit (folder or tar.gz), or a text file with a line
            `file_name class` for every image, separated by a comma or white space.

    Raises:
        UserFileNotFoundError: no such file of labels.
        UserError: the file is malformed, or an image has no label or a label no image.
    """
    if not labels.exists():
        raise UserFileNotFoundError(
            f"--labels {str(labels)!r} does not exist; give an existing file of labels"
        )
    is_devkit = labels.is_dir() or labels.name.endswith((".tar.gz", ".tgz"))
    known = _read_devkit(labels) if is_devkit else _read_list(labels)
    keys = {image: image if image in known else image.rpartition(".")[0] for image in images}
    bare = [image for image, key in keys.items() if key not in known]
    if bare:
        raise UserError(
            f"{labels}: no label for {bare[0]} of {where} ({len(bare)} of {len(images)} images have none); "
            f"give by --labels a file with a label for every image"
        )
    spare = sorted(known.keys() - set(keys.values()), key=lambda key: known[key].line)
    if spare:
        raise UserError(
            f"{labels} line {known[spare[0]].line}: {where} has no image {spare[0]!r} ({len(known)} labels, "
            f"{len(images)} images); complete the images, or give the labels of these images by --labels"
        )
    return {image: known[key].name for image, key in keys.items()}


def _read_list(path: Path) -> dict[str, Label]:
    """Labels by file name, of Kaggle's file by file name without extension."""
    known: dict[str, Label] = {}
    lines = path.read_text("utf-8-sig", "surrogateescape").split("\n")
    is_kaggle = lines[0].strip() == SOLUTION_HEADER
    for number, line in enumerate(lines, 1):
        if not line.strip() or (is_kaggle and number == 1):
            continue
        if is_kaggle:  # a class and four numbers for every box; the first box says the class
            image, _, boxes = line.partition(",")
            name = boxes.partition(" ")[0]
        else:
            separator = next((sign for sign in (",", "\t") if sign in line), None)
            columns = line.split("\t")  # of Tiny ImageNet: file name, class, and a box
            image, name = columns[:2] if len(columns) == 6 else (*line.rsplit(separator, 1), "")[:2]
        image, name = image.strip().rpartition("/")[2], name.strip()
        if not image or not _can_be_folder(name):
            expected = "ImageId,class and box" if is_kaggle else "file_name class"
            raise UserError(f"{path} line {number}: {line!r} is no label; expected `{expected}`")
        if image in known:
            raise UserError(
                f"{path} line {number}: {image!r} has a label already (line {known[image].line}); keep one"
            )
        known[image] = Label(name, number)
    return known


def _can_be_folder(name: str) -> bool:
    """Whether a class can be the name of a folder; hidden folders are not read."""
    return bool(name) and name.isprintable() and "/" not in name and not name.startswith(".")


def _read_devkit(path: Path) -> dict[str, Label]:
    """Labels by file name without extension: line i of the devkit's ground truth is the ILSVRC2012_ID of
    validation image i."""
    try:
        if path.is_dir():
            files = {name: (path / name).read_bytes() for name in (GROUND_TRUTH, META)}
        else:
            whole = gzip.decompress(path.read_bytes())  # 2.5 MB, and by this its checksum is compared
            with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
                files = {
                    name: tar.extractfile(member).read()  # type: ignore[union-attr]
                    for member in tar
                    for name in (GROUND_TRUTH, META)
                    if member.isfile() and f"/{member.name}".endswith(f"/{name}")
                }
        classes = _devkit_classes(files[META], path / META)
        truth = files[GROUND_TRUTH].decode("ascii", "replace")
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise UserError(
            f"{path}: no readable devkit ({error}); expected {GROUND_TRUTH} and {META} in it, "
            f"download {DEVKIT}.tar.gz again or give other labels by --labels"
        ) from error
    known = {}
    for number, line in enumerate(truth.splitlines(), 1):
        if not line.strip().isdecimal() or int(line) not in classes:
            raise UserError(
                f"{path / GROUND_TRUTH} line {number}: {line!r} is no class; expected an ILSVRC2012_ID of "
                f"{META}, 1 to {max(classes)}"
            )
        known[f"ILSVRC2012_val_{number:08d}"] = Label(classes[int(line)], number)
    return known


def _devkit_classes(meta: bytes, path: Path) -> dict[int, str]:
    """WNID of every ILSVRC2012_ID that is a class, that is: has no synset below it."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(
            f"{path} can only be read with scipy; `pip install scipy`, or give other labels by --labels "
            f"(Kaggle's {SOLUTION}, or lines of `file_name class`)"
        ) from error
    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        keys = (synsets["ILSVRC2012_ID"], synsets["WNID"], synsets["num_children"])
        rows = zip(*keys, strict=True)
        classes = {int(number): str(wnid) for number, wnid, num_children in rows if num_children == 0}
        if not classes or not all(map(_can_be_folder, classes.values())):
            raise ValueError("it names no classes")
    except Exception as error:  # scipy raises anything on a damaged file
        raise UserError(
            f"{path} is no meta.mat of the devkit ({error}); download {DEVKIT}.tar.gz again"
        ) from error
    return classes
