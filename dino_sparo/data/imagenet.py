"""ImageNet as people have it: class folders, the official tars or what was in them, Kaggle's layout."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dino_sparo.data.split_names import splits_of_folders
from dino_sparo.data.val_labels import ANNOTATIONS, labels_near
from dino_sparo.data.walk import PROBED_ENTRIES, holds, is_image, list_folder
from dino_sparo.errors import UserError

WNID, WNID_TAR = re.compile(r"n\d{8}"), re.compile(r"(n\d{8})\.tar")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
TOP_ENTRIES = 4096  # enough for a thousand class folders and their tars; a flat folder shows at once
LAYOUTS = (
    f"class folders (train/<class>, val/<class>), Kaggle's layout (ILSVRC/Data/CLS-LOC), {TRAIN_TAR} and "
    f"{VAL_TAR}, a folder of class tars (n01440764.tar ...), a flat folder of images"
)

Form = Literal["class folders", "a flat folder", "the official tar", "class tars"]


@dataclass(frozen=True)
class Images:
    """Where the images of a split are, a folder or a tar, and how they lie in it."""

    path: Path
    form: Form

    @property
    def is_readable(self) -> bool:
        """Whether the images are files in folders, not in tars."""
        return self.form in ("class folders", "a flat folder")


@dataclass(frozen=True)
class Layout:
    """What was recognized below a folder: its name in words, the two splits, and what says val's classes."""

    root: Path
    name: str
    train: Images | None
    val: Images | None
    labels: Path | None


def recognise(root: Path) -> Layout | None:
    """How the images below a folder are laid out, from a look at a few entries of a few folders.

    None if there is no such folder, or it is none of `LAYOUTS`.

    Raises:
        UserError: classes lie partly in folders, partly in tars, or a folder cannot be read.
    """
    base = next((root / below for below in KAGGLE_FOLDERS if (root / below).is_dir()), root)
    named = splits_of_folders(list_folder(base, TOP_ENTRIES)[0])
    train, val = _split(base, named.get("train", []), TRAIN_TAR), _split(base, named.get("val", []), VAL_TAR)
    if val and (val.path / ANNOTATIONS).is_file() and _form(val.path / "images") == "a flat folder":
        val = Images(val.path / "images", "a flat folder")  # Tiny ImageNet
    form = None if train and val else _form(base)  # some unpack right into the folder
    if form == "a flat folder" and _holds_val(base):
        val = val or Images(base, form)
    elif form == "class tars" or (form and not train and not val):
        train = train or Images(base, form)
    if train is None and val is None:
        return None
    labels = None
    if val and val.form != "class folders":
        labels = labels_near(val.path, val.form == "the official tar" or _holds_val(val.path))
    parts = [f"training images in {train.form}"] if train else []
    parts += [f"validation images in {val.form}"] if val else []
    parts += [f"their labels in {labels.name}"] if labels else []
    kaggle = "Kaggle's ImageNet: " if base.absolute().name == "CLS-LOC" else ""
    return Layout(root, kaggle + ", ".join(parts), train, val, labels)


def explain(layout: Layout) -> str:
    """One sentence: what was recognized and the command that makes it usable; empty if it is as it is."""
    root, train, val = layout.root, layout.train, layout.val
    if (train is None or train.is_readable) and (val is None or val.form == "class folders"):
        return ""
    made = " and ".join(f"OUT/{name}/<class>" for name, images in (("train", train), ("val", val)) if images)
    sentence = f"{root} holds {layout.name}; `dino-sparo prepare {shlex.quote(str(root))} --out OUT"
    if val is None or val.form == "class folders" or layout.labels:
        return f"{sentence}` makes {made} of it"
    return (
        f"{sentence} --labels FILE` makes {made} of it, FILE having a line `file_name class` for every "
        f"validation image"
    )


# --- How images lie in a folder


def _split(base: Path, folders: list[str], tar: str) -> Images | None:
    for folder in folders:
        if form := _form(base / folder):
            return Images(base / folder, form)
        if (base / folder / tar).is_file():
            return Images(base / folder / tar, "the official tar")
    return Images(base / tar, "the official tar") if (base / tar).is_file() else None


def _form(folder: Path) -> Form | None:
    """How images lie in a folder; None if there is no such folder or no image in it."""
    folders, files = list_folder(folder, TOP_ENTRIES)
    tars = {match[1] for file in files if (match := WNID_TAR.fullmatch(file))}
    if closed := sorted(tars - set(folders)):
        if opened := sorted(name for name in folders if WNID.fullmatch(name)):
            raise UserError(
                f"{folder} holds class folders ({opened[0]}) and class tars without a folder "
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
