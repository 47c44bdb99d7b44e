"""Every layout is recognized from a few entries, and explained."""

import gzip
import os
import re
import tarfile
from pathlib import Path

import pytest

from dino_sparo.data import imagenet, splits, walk
from dino_sparo.data.imagenet import GROUND_TRUTH, Images, explain, image_classes, recognize
from dino_sparo.data.splits import Part, Splits, find_splits
from dino_sparo.data.walk import list_folder
from dino_sparo.errors import UserError
from tests import imagenet_layouts as mini

CLS = "ILSVRC/Data/CLS-LOC"
CSV, DEVKIT, ARCHIVE = "LOC_val_solution.csv", "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12.tar.gz"
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
FOLDERS, FLAT, TAR, TARS = "class folders", "a flat folder", "the official tar", "class tars"


def at(below: str, make, *content):
    return lambda folder: make(folder / below, *content)


def classes(below: str):
    return at(below, mini.write_classes, mini.TRAIN)


def files(below: str, *names: str):
    return at(below, mini.write, dict.fromkeys(names, b""))


def class_tars(below: str):
    return at(below, mini.write, mini.class_tars())


def val_images(below: str):
    return at(below, mini.write, mini.VAL)


sorted_val = at("val", mini.write_classes, mini.SORTED_VAL)

# What makes the layout; then the folder given, and below it: train, val (each with its form) and labels.
LAYOUTS = {
    "class folders": ([classes("train"), sorted_val], ".", ("train", FOLDERS), ("val", FOLDERS), None),
    "classes directly": ([classes(".")], ".", (".", FOLDERS), None, None),
    "flat photographs": ([files(".", "a.jpg")], ".", (".", FLAT), None, None),
    "Kaggle": ([mini.kaggle], ".", (f"{CLS}/train", FOLDERS), (f"{CLS}/val", FLAT), CSV),
    "Kaggle, one down": (
        [mini.kaggle], "ILSVRC", ("Data/CLS-LOC/train", FOLDERS), ("Data/CLS-LOC/val", FLAT), f"../{CSV}"
    ),
    "Kaggle, two down": (
        [mini.kaggle], "ILSVRC/Data", ("CLS-LOC/train", FOLDERS), ("CLS-LOC/val", FLAT), f"../../{CSV}"
    ),
    "Kaggle, three down": ([mini.kaggle], CLS, ("train", FOLDERS), ("val", FLAT), f"../../../{CSV}"),
    "only val of Kaggle": ([mini.kaggle], f"{CLS}/val", None, (".", FLAT), f"../../../../{CSV}"),
    "only train of Kaggle": ([mini.kaggle], f"{CLS}/train", (".", FOLDERS), None, None),
    "three tars": (
        [mini.official_tars, mini.devkit_archive], ".", (TRAIN_TAR, TAR), (VAL_TAR, TAR), ARCHIVE
    ),
    "val tar": ([files(".", VAL_TAR)], ".", None, (VAL_TAR, TAR), None),
    "tars in their folders": (
        [files("train", TRAIN_TAR), files("val", VAL_TAR)], ".",
        (f"train/{TRAIN_TAR}", TAR), (f"val/{VAL_TAR}", TAR), None,
    ),
    "tar kept beside train": (
        [mini.official_tars, classes("train")], ".", ("train", FOLDERS), (VAL_TAR, TAR), None
    ),
    "empty train beside the tars": (
        [mini.official_tars, files("train")], ".", (TRAIN_TAR, TAR), (VAL_TAR, TAR), None
    ),
    "class tars": ([class_tars(".")], ".", (".", TARS), None, None),
    "both unpacked once": (
        [class_tars("."), val_images("val"), mini.devkit], ".", (".", TARS), ("val", FLAT), DEVKIT
    ),
    "class tars in train": ([class_tars("train")], ".", ("train", TARS), None, None),
    "class tars kept beside folders": ([class_tars("."), classes(".")], ".", (".", FOLDERS), None, None),
    "with devkit": ([mini.unpacked, mini.devkit], ".", ("train", FOLDERS), ("val", FLAT), DEVKIT),
    "with solution": ([mini.unpacked, mini.solution], ".", ("train", FOLDERS), ("val", FLAT), CSV),
    "folders named as the tars": (
        [classes("ILSVRC2012_img_train"), val_images("ILSVRC2012_img_val")], ".",
        ("ILSVRC2012_img_train", FOLDERS), ("ILSVRC2012_img_val", FLAT), None,
    ),
    "val unpacked beside train": (
        [val_images("."), classes("train"), mini.devkit], ".", ("train", FOLDERS), (".", FLAT), DEVKIT
    ),
    "val folder alone": ([val_images("val"), mini.solution], ".", None, ("val", FLAT), CSV),
    "val images alone": ([val_images(".")], ".", None, (".", FLAT), None),
    "other flat val": (
        [classes("train"), files("val", "a.jpg"), mini.solution], ".", ("train", FOLDERS), ("val", FLAT), None
    ),
}  # fmt: skip
USABLE = {
    "class folders", "train only", "classes directly", "flat photographs", "only train of Kaggle",
    "class tars kept beside folders",
}  # fmt: skip
LEARNABLE = {name for name, row in LAYOUTS.items() if row[2] and row[2][1] in (FOLDERS, FLAT)}


def images_of(root: Path, expected: tuple[str, str] | None) -> Images | None:
    return expected and Images(Path(os.path.normpath(root / expected[0])), expected[1])


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_recognized_and_explained(name, tmp_path):
    makers, given, *splits, labels = LAYOUTS[name]
    for make in makers:
        make(tmp_path)
    root = Path(os.path.normpath(tmp_path / given))
    train, val = (images_of(root, split) for split in splits)
    labels = labels and Path(os.path.normpath(root / labels))
    found = recognize(root)
    assert (found.root, found.train, found.val, found.labels) == (root, train, val, labels)
    assert ("Kaggle" in found.name) == name.startswith("Kaggle")

    if name in LEARNABLE:
        assert find_splits(root).train == Part(train.path)
    if name in ("val images alone", "only val of Kaggle"):  # a flat folder like any other
        assert find_splits(root).train == Part(root)

    sentence = explain(found)
    if name in USABLE:
        assert sentence == ""
        return
    assert sentence.startswith(f"{root} contains {'Kaggle' if name.startswith('Kaggle') else ''}")
    assert f"`dino-sparo prepare {root} --out OUT" in sentence
    assert ("OUT/train/<class>" in sentence, "OUT/val/<class>" in sentence) == (bool(train), bool(val))
    needs_labels = val is not None and val.form != FOLDERS and labels is None
    assert ("--labels FILE" in sentence) == needs_labels


def test_names_in_words_and_quoted(tmp_path):
    mini.kaggle(tmp_path / "my images")
    layout = recognize(tmp_path / "my images")
    assert layout.name == (
        "Kaggle's ImageNet: training images in class folders, validation images in a flat folder, "
        "their labels in LOC_val_solution.csv"
    )
    assert f"prepare '{tmp_path / 'my images'}' --out" in explain(layout)
    by_names = recognize(tmp_path / "my images" / CLS / "val").name
    assert by_names.startswith("validation images in a flat folder, judged by their names, their labels in ")


def test_relative_folders(tmp_path, monkeypatch):
    mini.kaggle(tmp_path)
    monkeypatch.chdir(tmp_path / CLS)
    assert recognize(Path()).labels == tmp_path / "LOC_val_solution.csv"
    assert recognize(Path()).name.startswith("Kaggle")
    monkeypatch.chdir(tmp_path / CLS / "val")
    assert find_splits(Path()).train == Part(Path())


def test_empty_class_folders_hidden_files_and_links_to_nowhere_are_passed_over(tmp_path):
    for number in range(60):
        (tmp_path / "train" / f"a{number:02d}").mkdir(parents=True)
    mini.write(tmp_path / "train", {"._1.jpg": b"", ".DS_Store": b""})
    mini.write(tmp_path / "train" / "b", {"1.jpg": b""})
    for name, target in (("loop", "loop"), ("nowhere", "nothing"), ("up", "..")):
        (tmp_path / "train" / name).symlink_to(target)
    assert recognize(tmp_path).train == Images(tmp_path / "train", FOLDERS)


def test_half_unpacked_class_tars(tmp_path):
    mini.write(tmp_path / "train", mini.class_tars())
    (tmp_path / "train" / "n01440764").mkdir()
    with pytest.raises(
        UserError, match=r"class folders \(n01440764\) and class tars .*\(n02084071\.tar\); finish"
    ):
        recognize(tmp_path)


@pytest.mark.parametrize("files", [{}, {"notes.txt": b""}, {"train.zip": b""}, {"n01440764": b""}])
def test_nothing_recognized(tmp_path, files):
    mini.write(tmp_path / "train", {})
    mini.write(tmp_path, files)
    mini.write_classes(tmp_path, {".hidden": {"1.jpg": b""}})
    for root in (tmp_path, tmp_path / "missing"):
        assert recognize(root) is None


def test_a_look_at_many_folders_ends_soon(tmp_path, monkeypatch):
    """Of many folders some are looked into, of many files some are read."""
    looked, original = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked.append(path) or original(path))
    monkeypatch.setattr(splits, "PROBED_ENTRIES", 6)
    monkeypatch.setattr(imagenet, "PROBED_ENTRIES", 6)
    monkeypatch.setattr(walk, "PROBED_BELOW", 2)
    for number in range(8):
        for below in range(3):
            (tmp_path / "many" / f"{number}" / f"{below}" / "deeper" / "deepest").mkdir(parents=True)
    assert find_splits(tmp_path / "many") == Splits(Part(tmp_path / "many"))
    assert recognize(tmp_path / "many") is None
    assert len(looked) < 150
    mini.write(tmp_path / "flat", {f"ILSVRC2012_val_{number:08d}.JPEG": b"" for number in range(400)})
    assert len(list_folder(tmp_path / "flat", 100)[1]) == 100
    looked.clear()
    assert recognize(tmp_path / "flat").val.form == FLAT and len(looked) <= 7


# --- Labels of strangers


def digits(folder: Path) -> Path:
    mini.devkit(folder)
    (folder / DEVKIT / GROUND_TRUTH).write_text("9" * 5000)
    return folder / DEVKIT


def bomb(folder: Path) -> Path:
    (folder / ARCHIVE).write_bytes(gzip.compress(bytes(2**27)))
    return folder / ARCHIVE


def huge_member(folder: Path) -> Path:
    member = tarfile.TarInfo(f"{DEVKIT}/{GROUND_TRUTH}")
    member.size = 10**12
    (folder / ARCHIVE).write_bytes(gzip.compress(member.tobuf(tarfile.GNU_FORMAT)))
    return folder / ARCHIVE


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "labels.txt")
    return folder / "labels.txt"


def device(folder: Path) -> Path:
    (folder / "labels.txt").symlink_to("/dev/zero")
    return folder / "labels.txt"


@pytest.mark.parametrize("make", [digits, bomb, huge_member, pipe, device])
def test_labels_of_strangers_are_refused_by_their_file(tmp_path, make):
    labels = make(tmp_path)
    with pytest.raises(UserError, match=re.escape(str(labels))) as caught:
        image_classes(["a.jpg"], tmp_path, labels)
    assert len(str(caught.value)) < 6000
