"""Layouts of ImageNet: class folders, the official tars or their contents, Kaggle's; and the classes of a
flat folder of images, from Kaggle's solution file, ImageNet's devkit, or a list of labels."""

import gzip
import io
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dino_sparo.data.split_names import splits_of_folders
from dino_sparo.data.tars import tar_members
from dino_sparo.data.walk import PROBED_ENTRIES, holds, is_image, list_folder
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.files import open_regular, read_as, read_small

WNID, WNID_TAR = re.compile(r"n\d{8}"), re.compile(r"(n\d{8})\.tar")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
TOP_ENTRIES = 4096  # enough for a thousand class folders and their tars
LAYOUTS = (
    f"class folders (train/<class>, val/<class>), Kaggle's layout (ILSVRC/Data/CLS-LOC), {TRAIN_TAR} and "
    f"{VAL_TAR}, a folder of class tars (n01440764.tar ...), a flat folder of images"
)

DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH, META = "data/ILSVRC2012_validation_ground_truth.txt", "data/meta.mat"
ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet, beside its folder of images
MOST_LABELS = 2**26  # bytes of a file of labels, or of an unpacked devkit
SOLUTION, SOLUTION_HEADER = "LOC_val_solution.csv", "ImageId,PredictionString"
LEVELS_TO_LABELS = 4  # from Kaggle's val folder up to its solution file

Form = Literal["class folders", "a flat folder", "the official tar", "class tars"]


@dataclass(frozen=True)
class Images:
    """The folder or tar with the images of a split, and its layout."""

    path: Path
    form: Form

    @property
    def is_readable(self) -> bool:
        """Whether the images are files in folders, not in tars."""
        return self.form in ("class folders", "a flat folder")


@dataclass(frozen=True)
class Layout:
    """A recognized layout: its description, the two splits, and the file with val's labels."""

    root: Path
    name: str
    train: Images | None
    val: Images | None
    labels: Path | None


def recognize(root: Path) -> Layout | None:
    """The layout of the images below a folder, from a few entries of a few folders.

    None if there is no such folder, or its layout is not one of `LAYOUTS`.

    Raises:
        UserError: classes are partly in folders, partly in tars, or a folder cannot be read.
    """
    base = next((root / below for below in KAGGLE_FOLDERS if (root / below).is_dir()), root)
    named = splits_of_folders(list_folder(base, TOP_ENTRIES)[0])
    train, val = _split(base, named.get("train", []), TRAIN_TAR), _split(base, named.get("val", []), VAL_TAR)
    if val and (val.path / ANNOTATIONS).is_file() and _form(val.path / "images") == "a flat folder":
        val = Images(val.path / "images", "a flat folder")  # Tiny ImageNet
    judged = "" if val else ", judged by their names"
    form = None if train and val else _form(base)  # unpacked without folders of splits
    if form == "a flat folder" and _holds_val(base):
        val = val or Images(base, form)
    elif form == "class tars" or (form and not train and not val):
        train = train or Images(base, form)
    if train is None and val is None:
        return None
    labels = None
    if val and val.form != "class folders":
        labels = _labels_near(val.path, val.form == "the official tar" or _holds_val(val.path))
    parts = [f"training images in {train.form}"] if train else []
    parts += [f"validation images in {val.form}{judged}"] if val else []
    parts += [f"their labels in {labels.name}"] if labels else []
    kaggle = "Kaggle's ImageNet: " if base.absolute().name == "CLS-LOC" else ""
    return Layout(root, kaggle + ", ".join(parts), train, val, labels)


def explain(layout: Layout) -> str:
    """One sentence with the layout and the command that converts it; empty if it can be used as it is."""
    root, train, val = layout.root, layout.train, layout.val
    if (train is None or train.is_readable) and (val is None or val.form == "class folders"):
        return ""
    made = " and ".join(f"OUT/{name}/<class>" for name, images in (("train", train), ("val", val)) if images)
    sentence = f"{root} contains {layout.name}; `dino-sparo prepare {shlex.quote(str(root))} --out OUT"
    if val is None or val.form == "class folders" or layout.labels:
        return f"{sentence}` makes {made}"
    return (
        f"{sentence} --labels FILE` makes {made}; FILE needs a line `file_name class` for every validation "
        f"image"
    )


# --- Layout of a folder


def _split(base: Path, folders: list[str], tar: str) -> Images | None:
    for folder in folders:
        if form := _form(base / folder):
            return Images(base / folder, form)
        if (base / folder / tar).is_file():
            return Images(base / folder / tar, "the official tar")
    return Images(base / tar, "the official tar") if (base / tar).is_file() else None


def _form(folder: Path) -> Form | None:
    """The layout of a folder; None if there is no such folder or no image in it."""
    folders, files = list_folder(folder, TOP_ENTRIES)
    tars = {match[1] for file in files if (match := WNID_TAR.fullmatch(file))}
    if closed := sorted(tars - set(folders)):
        if opened := sorted(name for name in folders if WNID.fullmatch(name)):
            raise UserError(
                f"{folder} contains class folders ({opened[0]}) and class tars without a folder "
                f"({closed[0]}.tar); finish unpacking, or remove the class folders whose tars are still there"
            )
        return "class tars"
    if any(is_image(file) for file in files):
        return "a flat folder"
    held = any(holds(folder / name) for name in sorted(folders)[:PROBED_ENTRIES])
    return "class folders" if held else None


def _holds_val(folder: Path) -> bool:
    """Whether the folder's images have the names of ImageNet's validation images."""
    return any(VAL_IMAGE.fullmatch(file) for file in list_folder(folder, PROBED_ENTRIES)[1])


def _labels_near(images: Path, are_imagenet: bool) -> Path | None:
    """File with labels of validation images: beside their folder, for ImageNet's also in it or above it, or
    None."""
    if (images.parent / ANNOTATIONS).is_file():
        return images.parent / ANNOTATIONS
    if not are_imagenet:
        return None
    places = [images.absolute(), *images.absolute().parents[:LEVELS_TO_LABELS]]
    # Kaggle's first, which need no scipy
    for name, proof in ((SOLUTION, ""), (DEVKIT, GROUND_TRUTH), (f"{DEVKIT}.tar.gz", "")):
        for place in places:
            if (place / name / proof).is_file():
                return place / name
    return None


# --- Classes of a flat folder of images


class Label(NamedTuple):
    """The class of an image, and its line in the file of labels."""

    name: str
    line: int


def image_classes(images: Collection[str], where: Path, labels: Path) -> dict[str, str]:
    """The class of every image, by file name.

    Args:
        images: file names of the images in a flat folder or tar.
        where: that folder or tar, for messages.
        labels: Kaggle's LOC_val_solution.csv, the devkit (folder or tar.gz), or a text file with a line
            `file_name class` for every image, separated by a comma or white space.

    Raises:
        UserFileNotFoundError: the file of labels does not exist.
        UserError: the file is malformed, an image has no label, or a label has no image.
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
            f"give --labels a file with a label for every image"
        )
    spare = sorted(known.keys() - set(keys.values()), key=lambda key: known[key].line)
    if spare:
        raise UserError(
            f"{labels} line {known[spare[0]].line}: {where} has no image {spare[0]!r} ({len(known)} labels, "
            f"{len(images)} images); add the missing images, or give --labels a file for these images"
        )
    return {image: known[key].name for image, key in keys.items()}


def _read_list(path: Path) -> dict[str, Label]:
    """Labels by file name; from Kaggle's file, by file name without extension."""
    known: dict[str, Label] = {}
    text = read_small(path, MOST_LABELS).decode("utf-8-sig", "surrogateescape")
    lines = re.split(r"\r\n?|\n", text)
    is_kaggle = lines[0].strip() == SOLUTION_HEADER
    for number, line in enumerate(lines, 1):
        if not line.strip() or (is_kaggle and number == 1):
            continue
        if is_kaggle:  # each box is a class and four numbers; the first one gives the class
            image, _, boxes = line.partition(",")
            name = boxes.partition(" ")[0]
        else:
            separator = next((sign for sign in (",", "\t") if sign in line), None)
            columns = line.split("\t")  # Tiny ImageNet: file name, class, and a box
            image, name = columns[:2] if len(columns) == 6 else (*line.rsplit(separator, 1), "")[:2]
        image, name = image.strip().rpartition("/")[2], name.strip()
        if not image or not _can_be_folder(name):
            expected = "ImageId,class and box" if is_kaggle else "file_name class"
            raise UserError(f"{path} line {number}: {line!r} is not a label; expected `{expected}`")
        if image in known:
            raise UserError(
                f"{path} line {number}: {image!r} already has a label (line {known[image].line}); keep one"
            )
        known[image] = Label(name, number)
    return known


def _can_be_folder(name: str) -> bool:
    """Whether a class can be the name of a folder; hidden folders are not read."""
    return bool(name) and name.isprintable() and "/" not in name and not name.startswith(".")


def _read_devkit(path: Path) -> dict[str, Label]:
    """Labels by file name without extension: line i of the devkit's ground truth is the ILSVRC2012_ID of
    validation image i."""
    with read_as(
        f"{path} cannot be read as a devkit with {GROUND_TRUTH} and {META}",
        f"download {DEVKIT}.tar.gz again, or give other labels with --labels",
    ):
        if path.is_dir():
            files = {name: read_small(path / name, MOST_LABELS) for name in (GROUND_TRUTH, META)}
        else:
            with open_regular(path) as packed, gzip.open(packed) as file:
                whole = file.read(MOST_LABELS)  # 2.5 MB; reading all of it verifies its checksum
            files = {
                name: whole[member.offset : member.offset + member.size]
                for member in tar_members(io.BytesIO(whole))
                for name in (GROUND_TRUTH, META)
                if f"/{member.name}".endswith(f"/{name}")
            }
        classes = _devkit_classes(files[META], path / META)
        truth = files[GROUND_TRUTH].decode("ascii", "replace")
    known = {}
    for number, line in enumerate(truth.splitlines(), 1):
        if not line.strip().isdecimal() or len(line) > 9 or int(line) not in classes:
            raise UserError(
                f"{path / GROUND_TRUTH} line {number}: {line!r} is not a class; expected an ILSVRC2012_ID of "
                f"{META}, 1 to {max(classes)}"
            )
        known[f"ILSVRC2012_val_{number:08d}"] = Label(classes[int(line)], number)
    return known


def _devkit_classes(meta: bytes, path: Path) -> dict[int, str]:
    """WNID of every ILSVRC2012_ID that is a class, which means that it has no synset below it."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise UserError(
            f"{path} can only be read with scipy; run `pip install scipy`, or give --labels another file "
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
            f"{path} is not the devkit's meta.mat ({error}); download {DEVKIT}.tar.gz again"
        ) from error
    return classes
