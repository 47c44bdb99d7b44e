"""Which images are train and which are val: by names, alike for folders, shards, tables, and the hub."""

import json
import logging
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from dino_sparo.__main__ import main
from dino_sparo.cli.evaluating import CompareOptions
from dino_sparo.cli.pretraining import PretrainOptions
from dino_sparo.data.sources import (
    AS_FOUND,
    absolute_path,
    decide,
    open_images,
    open_labeled,
    open_val,
    say_splits,
)
from dino_sparo.data.split_names import about_images, splits_of_files, splits_of_folders
from dino_sparo.data.splits import Choice, find_splits
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.evaluation.transfer import open_test_sets
from dino_sparo.prepare import prepare
from dino_sparo.shard import shard
from dino_sparo.terminal import Lines
from dino_sparo.training.pretrain import pretrain
from tests.containers import write_parquet
from tests.shard_files import picture, touch, write, write_tar
from tests.tiny import parse_options, prepared, tiny_arguments, tiny_options, write_pictures

CLASSES = ("cat", "dog")


def classes(below: str, count: int = 5, names: tuple[str, ...] = CLASSES) -> list[str]:
    return [f"{below}/{name}/{number}.jpg" for name in names for number in range(count)]


def flat(below: str, count: int = 5, ending: str = ".jpg") -> list[str]:
    return [f"{below}/{number}{ending}" for number in range(count)]


@pytest.fixture
def lines(caplog):
    """What was said about splits."""
    caplog.set_level(logging.INFO, "dino_sparo")
    return lambda: [text for text in caplog.messages if text.startswith("train: ")]


# --- Names


@pytest.mark.parametrize(
    ("names", "train", "val", "test"),
    [
        ("train val test", "train", "val", "test"),
        ("Train Val", "Train", "Val", ""),
        ("TRAIN TEST", "TRAIN", "", "TEST"),
        ("training validation", "training", "validation", ""),
        ("training_set test_set", "training_set", "", "test_set"),
        ("train valid", "train", "valid", ""),
        ("train dev", "train", "dev", ""),
        ("train eval", "train", "eval", ""),
        ("train2017 val2017 annotations", "train2017", "val2017", ""),
        ("train.X1 train.X2 val.X", "train.X1 train.X2", "val.X", ""),
        ("data_256 val_256 test_256", "data_256", "val_256", "test_256"),
        ("ILSVRC2012_img_train ILSVRC2012_img_val", "ILSVRC2012_img_train", "ILSVRC2012_img_val", ""),
        ("seg_train seg_test seg_pred", "seg_train", "", "seg_test"),
        ("TrainImages ValImages", "TrainImages", "ValImages", ""),
        ("train-images val-images train-masks val-masks", "train-images", "val-images", ""),
        ("trainA trainB testA testB", "trainA trainB", "", "testA testB"),
        ("train val validation test", "train", "val", "test"),
        ("trainval train val", "train", "val", ""),
        ("train train_extra val", "train", "val", ""),
        ("bullet_train train_interior test_tube dog", "", "", ""),
        ("training_shoe valley evaluator tested", "", "", ""),
        ("train_val2018 test2018", "train_val2018", "", "test2018"),
        ("TrainVal Test", "TrainVal", "", "Test"),
        ("train_test_2017", "", "", ""),
        ("dev_train dev_val", "dev_train", "dev_val", ""),
        ("eval-train eval-test other", "eval-train", "", "eval-test"),
        ("val_test val_train", "val_train", "", "val_test"),
        ("train dev_train dev_val", "train", "", ""),
        ("trainimages valimages", "trainimages", "valimages", ""),
        ("TRAINIMAGES TESTIMAGES", "TRAINIMAGES", "", "TESTIMAGES"),
        ("traindata validdata testdata", "traindata", "validdata", "testdata"),
        ("traindir valdir", "traindir", "valdir", ""),
        ("trn tst", "trn", "", "tst"),
        ("data_large val_large test_large", "data_large", "val_large", "test_large"),
        ("trains tests trainer tester", "", "", ""),
        ("cat dog", "", "", ""),
    ],
)
def test_names_of_folders(names, train, val, test):
    found = splits_of_folders(names.split())
    expected = {"train": train.split(), "val": val.split(), "test": test.split()}
    assert found == {split: here for split, here in expected.items() if here}


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        ("in1k-train-0000.tar in1k-train-0001.tar in1k-validation-00.tar", 2, 1),
        ("imagenet-train-00000.parquet imagenet-val-00000.parquet", 1, 1),
        ("cifar_train.parquet cifar_test.parquet", 1, 1),
        (
            "train-00000-of-00002-0a1b.parquet train-00001-of-00002-2c.parquet test-0.parquet",
            2,
            1,
        ),
        ("Train_0.tar VAL_0.tar", 1, 1),
        ("dev_train-0.tar dev_train-1.tar dev_val-0.tar", 2, 1),
        ("trainimages-0.tar valimages-0.tar", 1, 1),
        ("train-0.tar train-1.tar", 2, 0),
        ("train-0.tar train-1.tar val-0.tar others.tar", 2, 1),
        ("shards/train-0.tar shards/val-0.tar shards/others.tar", 1, 1),
        ("bullet_train.tar test_tube.tar dog.tar", 0, 0),
        ("train.tar bus.tar", 0, 0),
        ("000.tar 001.tar", 0, 0),
    ],
)
def test_names_of_files(names, train, held_out):
    found = splits_of_files(names.split())
    assert len(found.get("train", [])) == train
    assert len(found.get("val") or found.get("test", [])) == held_out


# --- Folders

BOTH = "train: 10 images in 2 classes (ROOT/{}); val: 4 (ROOT/{})"
ALL = "train: 10 images in 2 classes (ROOT{}); val: every fifth image of train (no val or test found)"
FOLDERS = {
    "capitals": ([*classes("Train"), *classes("Val", 2)], BOTH.format("Train", "Val")),
    "long words": ([*classes("training"), *classes("validation", 2)], BOTH.format("training", "validation")),
    "valid": ([*classes("train"), *classes("valid", 2)], BOTH.format("train", "valid")),
    "test only": ([*classes("train"), *classes("test", 2)], BOTH.format("train", "test")),
    "val goes before test": (
        [*classes("train"), *classes("val", 2), *classes("test", 1)],
        BOTH.format("train", "val") + "; looks like a split, not used: test",
    ),
    "a test without classes": (
        [*classes("train"), *flat("test")],
        "train: 10 images in 2 classes (ROOT/train); val: every fifth image of train (the classes of "
        "ROOT/test are unknown or different)",
    ),
    "a test in a folder of images": (
        [*classes("train"), *flat("test/images")],
        "train: 10 images in 2 classes (ROOT/train); val: every fifth image of train (the classes of "
        "ROOT/test are unknown or different)",
    ),
    "parts": (
        [*classes("train.X1", 5, ("cat",)), *classes("train.X2", 5, ("dog",)), *classes("val.X", 2)],
        "train: 10 images in 2 classes (ROOT: train.X1 … train.X2); val: 4 (ROOT/val.X)",
    ),
    "a class in two parts": (
        [*classes("train.1", 2), *classes("train.2", 3), *classes("val", 2)],
        "train: 10 images in 2 classes (ROOT: train.1 … train.2); val: 4 (ROOT/val)",
    ),
    "something beside": (
        [*classes("train"), *classes("val", 2), *flat("drafts", 3), "cover.jpg"],
        BOTH.format("train", "val") + "; left out: drafts (3 images); left out: 1 image in ROOT itself",
    ),
    "single classes": (
        [*flat("bullet_train", 5), *flat("test_tube", 5)],
        ALL.format("") + "; taken as classes: bullet_train, test_tube",
    ),
    "a class called train": (
        [*flat("train", 5), *flat("bus", 5)], ALL.format("") + "; taken as classes: train"
    ),
    "a class called train beside one of which that is a part": (
        [*flat("train"), *flat("bullet_train")], ALL.format("") + "; taken as classes: bullet_train, train"
    ),
    "a class called train in wrappers": (
        [*flat("train/images", 5), *flat("bus/images", 5)], ALL.format("") + "; taken as classes: train"
    ),
    "a class called test": ([*flat("test", 5), *flat("cat", 5)], ALL.format("") + "; taken as classes: test"),
    "classes called train and test": (
        [*flat("train", 4), *flat("test", 4), *flat("car", 2)],
        ALL.format("").replace("2 classes", "3 classes") + "; taken as classes: test, train",
    ),
    "more images and masks beside train and val without classes of their own": (
        [*classes("train"), *classes("val", 2), *flat("unlabeled2017", 3), *flat("train_masks", 3)],
        BOTH.format("train", "val")
        + "; looks like a split, not used: train_masks; left out: unlabeled2017 (3 images)",
    ),
    "an archive beside splits": (
        [*classes("train"), *classes("val", 2), "archive.tar"],
        BOTH.format("train", "val") + "; left out: 1 tar in ROOT itself",
    ),
    "an archive of val": (
        [*classes("train"), "val.tar", "Test.ZIP", "val.txt"],
        ALL.format("/train") + "; looks like a split, not used: Test.ZIP, val.tar",
    ),
    "parts that no word names": (
        [*classes("fold1", 3), *classes("fold2", 2), *flat("@eaDir", 3)],
        ALL.format("") + "; fold1 and fold2, taken as classes, contain folders of the same names: cat, dog",
    ),
    "names that look like splits and are none": (
        [*flat("dev_train", 5), *flat("valley_test", 5)],
        ALL.format("") + "; taken as classes: dev_train, valley_test",
    ),
    "train with classes beside another folder": (
        [*classes("train"), *flat("bus", 2)],
        ALL.format("/train") + "; left out: bus (2 images)",
    ),
    "wrapped": (classes("images"), ALL.format("/images")),
    "wrapped by any name": (classes("Food-101"), ALL.format("/Food-101")),
    "wrapped twice": (classes("archive/food-101"), ALL.format("/archive/food-101")),
    "wrapped splits": (
        [*classes("images/train"), *classes("images/val", 2), *flat("labels/train", ending=".txt")],
        BOTH.format("images/train", "images/val"),
    ),
    "the name twice": (
        [*classes("seg_train/seg_train"), *classes("seg_test/seg_test", 2)],
        BOTH.format("seg_train/seg_train", "seg_test/seg_test"),
    ),
    "macOS archive": (
        [*classes("pets"), "__MACOSX/pets/cat/._0.jpg", ".DS_Store"], ALL.format("/pets")
    ),
    "masks beside images": (
        [*classes("images"), *classes("segmentations", 2)],
        ALL.format("/images") + "; left out: segmentations (4 images)",
    ),
    "thumbnails and masks beside images": (
        [*classes("img"), *flat("thumbs", 2), *flat("masks", 3)],
        ALL.format("/img") + "; left out: masks (3 images), thumbs (2 images)",
    ),
    "a folder of splits beside one of masks": (
        [*classes("leftImg8bit/train"), *classes("leftImg8bit/val", 2), *classes("gtFine/train", 2)],
        BOTH.format("leftImg8bit/train", "leftImg8bit/val") + "; left out: gtFine (4 images)",
    ),
    "masks beside classes": (
        [*flat("with_mask"), *flat("without_mask")],
        ALL.format("") + "; taken as classes: with_mask, without_mask",
    ),
    "masks among the classes of splits": (
        [*classes("train", names=("cat", "masks")), *classes("val", 2, names=("cat", "masks"))],
        BOTH.format("train", "val") + "; taken as classes: masks",
    ),
    "masks and thumbnails within classes": (
        [*flat("cat/images", 2), *flat("cat/masks", 3), *flat("dog", 4), "dog/a/_thumbs/1.jpg"],
        ALL.format("") + "; taken as images: cat/masks, dog/a/_thumbs",
    ),
    "masks beside the images of a class": (
        [*flat("cat", 4), *flat("dog"), "cat/b (1)_mask.png"],
        ALL.format("") + "; taken as images: cat/b (1)_mask.png",
    ),
    "what file servers and Windows keep of deleted files": (
        [*classes("."), *flat("#recycle"), *flat("cat/@Recycle"), *flat("$RECYCLE.BIN/S-1-5-21")],
        ALL.format(""),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path, lines, name):
    files, line = FOLDERS[name]
    touch(tmp_path, *files)
    train, test = open_labeled(str(tmp_path))
    assert lines() == [line.replace("ROOT", str(tmp_path))]
    assert len(train.classes) == int(line.split(" images in ")[1][0]) == len(set(train.labels))
    assert len(train) == (10 if "; val: 4 " in line else 8)
    assert open_images(str(tmp_path)).fingerprint() == (
        train.fingerprint() if len(train) == 10 else open_images(str(train.root)).fingerprint()
    )
    assert len(test) == (4 if len(train) == 10 else 2)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            [*flat("train2017"), *flat("val2017", 2)],
            "train: 5 images without classes (ROOT/train2017); val: (ROOT/val2017)",
        ),
        (flat("photos"), "train: 5 images in 1 class (ROOT); val: none (no val or test found)"),
        (
            [*flat("trainA", 3), *flat("trainB", 2), *flat("testA"), *flat("testB")],
            "train: 5 images without classes (ROOT: trainA … trainB); val: none (the classes of ROOT: testA "
            "… testB are "
            "unknown or different)",
        ),
        (
            [*flat("bounding_box_train"), *flat("bounding_box_test"), *flat("query")],
            "train: 5 images without classes (ROOT/bounding_box_train); val: none (the classes of "
            "ROOT/bounding_box_test are unknown or different); left out: query (5 images)",
        ),
        (
            [*flat("train"), *flat("test"), *flat("extra")],
            "train: 5 images without classes (ROOT/train); val: none (the classes of ROOT/test are unknown "
            "or different); left out: extra (5 images)",
        ),
    ],
)
def test_images_without_classes_are_learned_from_without_val(tmp_path, lines, files, line):
    touch(tmp_path, *files)
    splits = decide(str(tmp_path), AS_FOUND)
    say_splits(str(tmp_path), open_images(str(tmp_path), splits=splits), None, splits, held_out=False)
    assert lines() == [line.replace("ROOT", str(tmp_path))]
    with pytest.raises(UserError):
        open_labeled(str(tmp_path))


def test_a_test_set_that_is_not_opened_is_named(tmp_path, lines):
    touch(tmp_path, *classes("train"), *classes("test", 2))
    splits = decide(str(tmp_path), AS_FOUND)
    say_splits(str(tmp_path), open_images(str(tmp_path), splits=splits), None, splits, held_out=False)
    assert lines()[0].endswith(f"; val: ({tmp_path}/test)")


@pytest.mark.parametrize("held_out", ["val", "validation", "Test"])
def test_val_without_train_is_named(tmp_path, held_out):
    touch(tmp_path, *classes("."), *classes(held_out))
    with pytest.raises(UserError, match=f"a {held_out} folder, but no train folder.*data.train"):
        open_images(str(tmp_path))


def test_several_folders_of_splits_are_no_classes(tmp_path):
    touch(
        tmp_path,
        *(
            name
            for of in ("rgb", "depth")
            for split in ("train", "test")
            for name in classes(f"{of}/{split}")
        ),
    )
    with pytest.raises(UserError, match=r"depth and rgb both contain folders of train and val.*data\.train"):
        open_images(str(tmp_path))
    assert len(open_images(str(tmp_path), choice=Choice(train="."))) == 40
    assert len(open_images(str(tmp_path / "rgb"))) == 10


def test_without_val_five_images_are_needed(tmp_path):
    touch(tmp_path, *classes(".", 2))
    assert len(open_images(str(tmp_path))) == 4
    with pytest.raises(UserError, match=r"has 4 images, too few to hold out every fifth as val.*data\.val"):
        open_labeled(str(tmp_path))


def test_one_class_is_no_evaluation(tmp_path):
    touch(tmp_path, *flat("cats"))
    assert len(open_images(str(tmp_path))) == 5
    with pytest.raises(UserError, match=r"has only one class \(cats\).*data.train"):
        open_labeled(str(tmp_path))


def test_shards_of_a_split_in_several_folders_are_refused(tmp_path):
    write(tmp_path, "train.1/cat/0.jpg", "train.2/cat/1.jpg", "val.1/cat/0.jpg")
    with pytest.raises(UserError, match=r"train is in several folders, such as train\.1/cat/0\.jpg"):
        shard(str(tmp_path), str(tmp_path / "out"), num_workers=0)


# --- Shards and tables


def tars(root: Path, **names: int) -> Path:
    """Shards of so many images of two classes."""
    for name, count in names.items():
        members = {
            f"{i:03d}__{kind}": data
            for i in range(count)
            for kind, data in (("jpg", picture(i)), ("cls", b"%d" % (i % 2)))
        }
        write_tar(root / f"{name.replace('__', '/')}.tar", **members)
    return root


@pytest.mark.parametrize(
    ("names", "train", "val", "note"),
    [
        ({"in1k-train-0000": 6, "in1k-train-0001": 4, "in1k-validation-00": 4}, 10, 4, ""),
        ({"TRAIN_0": 5, "TEST_0": 4}, 5, 4, ""),
        ({"train__part0__0": 6, "val__0": 4}, 6, 4, ""),
        ({"train-0": 6, "val-0": 4, "extra": 3}, 6, 4, "; left out: extra.tar"),
        ({"train-0": 6, "val-0": 4, "test-0": 3}, 6, 4, "; looks like a split, not used: test-0.tar"),
        ({"part0__000": 6, "part1__000": 4}, 10, None, ""),
        ({"bullet_train": 6, "dog": 4}, 10, None, "; taken as train: bullet_train.tar"),
    ],
)
def test_shards(tmp_path, lines, names, train, val, note):
    tars(tmp_path, **names)
    gallery, test = open_labeled(str(tmp_path))
    assert len(open_images(str(tmp_path))) == train
    assert (len(gallery), len(test)) == ((train, val) if val else (train - train // 5, train // 5))
    assert (line := lines()[0]).startswith(f"train: {train} images in 2 classes") and line.endswith(
        note or ")"
    )
    assert (open_val(str(tmp_path)) is None) == (val is None)


def test_a_mask_beside_images_without_a_folder_is_named_by_itself():
    assert about_images("", b"0.png\x000_mask.png") == "0_mask.png"


def test_masks_in_shards_are_named(tmp_path, lines):
    names = [f"{folder}/{number}__jpg" for folder in ("cat/a", "cat/masks", "gt") for number in range(2)]
    write_tar(tmp_path / "0.tar", **{name: picture(number) for number, name in enumerate(names)})
    open_labeled(str(tmp_path))
    assert lines()[0].endswith("; taken as classes: gt; taken as images: cat/masks")


def test_shards_beside_other_things(tmp_path):
    touch(tars(tmp_path / "logs", **{"000": 6}), "_logs/x.txt")
    assert len(open_images(str(tmp_path / "logs"))) == 6
    touch(tars(tmp_path / "backup", **{"backup": 6}), *flat("."))
    assert len(open_images(str(tmp_path / "backup"))) == 5
    (tars(tmp_path / "tables", **{"000": 6}) / "000.parquet").touch()  # as img2dataset writes it
    assert len(open_images(str(tmp_path / "tables"))) == 6


def test_splits_within_a_tar_are_no_classes(tmp_path):
    images = {f"{split}/{kind}/1__jpg": picture(1) for split in ("train", "val") for kind in CLASSES}
    write_tar(tmp_path / "all.tar", **images)
    with pytest.raises(
        UserError, match=r"contain folders of splits \(train, val\), which .*unpack the shards"
    ):
        open_images(str(tmp_path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_pictures(folder / "data", 4)
    run = folder / "run"
    pretrain(tiny_options(folder / "data", run, optim__epochs=1, optim__warmup_epochs=0), run)
    return run


@pytest.mark.parametrize("ending", ["tar", "parquet"])
@pytest.mark.parametrize(
    ("packed", "images"),
    [
        (("000",), ("cover.jpg",)),
        (("000",), ("samples/1.jpg",)),
        (("000",), ("train/1.jpg",)),
        (("part0__000",), ("part0/1.jpg",)),
        (("part0__000", "part1__000"), ("1.jpg",)),
        (("000", "001"), classes("samples", 10)),
    ],
)
def test_files_of_images_beside_few_images_are_asked_for(tmp_path, trained, capsys, ending, packed, images):
    root = tmp_path / "data"
    touch(root, *images, *(f"{name.replace('__', '/')}.{ending}" for name in packed))
    for arguments in (
        ["pretrain", *tiny_arguments(root, tmp_path / "new")],
        ["check", *tiny_arguments(root, tmp_path / "new")],
        ["knn", str(trained), f"--data.path={root}", "--device=cpu"],
    ):
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert told.count("error: ") == 1
        asked = f".{ending})" in told and ".jpg); choose one of the two kinds with data.train" in told
        assert asked or f"part0 and part1 both contain {ending} files" in told
    assert len(open_images(str(root), choice=Choice(train="."))) == len(images)


def test_what_lies_beside_tables_of_splits_is_named(tmp_path, lines):
    parquets(tmp_path, **{"train-0": 6, "validation-0": 4})
    touch(tmp_path, "cover.jpg", *flat("samples", 3), *flat("test", 2), "0.tar")
    assert tuple(map(len, open_labeled(str(tmp_path)))) == (6, 4)
    beside = f"left out: samples (3 images); left out: 1 image, 1 tar in {tmp_path} itself"
    assert lines()[0].endswith(f"; looks like a split, not used: test; {beside}")


def parquets(root: Path, **names: int) -> Path:
    for name, count in names.items():
        rows = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(count)]
        write_parquet(
            root / f"{name.replace('__', '/')}.parquet", rows, [i % 2 for i in range(count)], CLASSES
        )
    return root


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        ({"imagenet-train-00000": 6, "imagenet-val-00000": 4}, 6, 4),
        ({"plain_text__train-0": 6, "plain_text__test-0": 4}, 6, 4),
        ({"default__train__0000": 3, "default__train__0001": 3, "default__test__0000": 4}, 6, 4),
        ({"Training__0": 6, "Validation__0": 4}, 6, 4),
        ({"data__set_train": 6, "data__set_dev": 4}, 6, 4),
    ],
)
def test_parquet_files(tmp_path, names, train, val):
    gallery, test = open_labeled(str(parquets(tmp_path, **names)))
    assert (len(gallery), len(test)) == (train, val)


def test_configurations_of_a_set_are_named(tmp_path):
    parquets(tmp_path, **{"plain_text__train-0": 6, "plain_text__test-0": 4, "cropped__train-0": 6})
    for opened in (open_images, open_labeled):
        with pytest.raises(
            UserError, match=r"cropped and plain_text both contain parquet files.*as data\.path"
        ):
            opened(str(tmp_path))
    assert len(open_images(str(tmp_path / "cropped"))) == 6


@pytest.mark.parametrize("names", [("train", "test"), ("training", "dev")])
def test_what_save_to_disk_has_written(tmp_path, names):
    files = {
        name: str(parquets(tmp_path, **{name: 5 - i}) / f"{name}.parquet") for i, name in enumerate(names)
    }
    datasets.load_dataset("parquet", data_files=files, cache_dir=tmp_path / "hf").save_to_disk(
        tmp_path / "saved"
    )
    assert tuple(map(len, open_labeled(str(tmp_path / "saved")))) == (5, 4)


# --- What the user says


@pytest.mark.parametrize(
    ("choice", "train", "val"),
    [
        (Choice(train="."), 20, None),
        (Choice(train="drawings"), 10, None),
        (Choice(train="drawings", val="photos"), 10, 10),
        (Choice(val="photos"), 10, 10),
        (Choice(train="t*"), 10, None),
    ],
)
def test_train_and_val_can_be_named(tmp_path, choice, train, val):
    touch(tmp_path, *classes("drawings"), *classes("photos"))
    touch(tmp_path / "train", *(name.partition("/")[2] for name in classes("train")))
    root = tmp_path if choice.train != "." else tmp_path / "drawings"
    if choice.train == ".":
        touch(root, *classes("train"))
    assert len(open_images(str(root), choice=choice)) == train
    found = open_val(str(root), choice)
    assert (found and len(found)) == val


def test_named_shards(tmp_path):
    tars(tmp_path, a_0=6, b_0=4)
    train, val = open_labeled(str(tmp_path), choice=Choice(train="a_*.tar", val="b_*.tar"))
    assert (len(train), len(val)) == (6, 4)


def test_val_that_is_named_must_have_classes_where_it_lies_in_tables(tmp_path):
    parquets(tmp_path, train=6)
    rows = pa.Table.from_pylist([{"image": {"bytes": picture(i), "path": f"{i}.png"}} for i in range(4)])
    parquet.write_table(rows, tmp_path / "validation.parquet")
    assert len(open_labeled(str(tmp_path))[1]) == 1  # every fifth of train
    for opened in (open_labeled, open_val):
        with pytest.raises(UserError, match=r"data\.val 'validation\.parquet': .* do not contain the class"):
            opened(str(tmp_path), choice=Choice(val="validation.parquet"))


def test_what_is_named_must_be_there(tmp_path):
    touch(tmp_path, *classes("train"))
    with pytest.raises(UserFileNotFoundError, match=r"data.val 'none\*' is not a folder, and no folder"):
        open_val(str(tmp_path), Choice(val="none*"))
    touch(tmp_path, *flat("drafts"), "1.jpg", "0.tar")
    with pytest.raises(UserFileNotFoundError, match=r"data.train '\*.jpg' is not a folder, and no"):
        open_images(str(tmp_path), choice=Choice(train="*.jpg"))
    with pytest.raises(
        UserError, match=r"data.train '\*' matches drafts and 0.tar in .*; expected only folders"
    ):
        open_images(str(tmp_path), choice=Choice(train="*"))
    with pytest.raises(UserError, match="'shapes' has splits and labels of its own; leave out data"):
        open_images("shapes", choice=Choice(train="x"))


def test_splits_are_looked_for_again_when_a_part_is_added(tmp_path):
    touch(tmp_path, *classes("train.1"), *classes("val", 2))
    assert len(open_images(str(tmp_path))) == 10
    touch(tmp_path, *classes("train.2", 1))
    assert len(open_images(str(tmp_path))) == 12
    assert find_splits(tmp_path).train.names == ("train.1", "train.2")


def test_class_folders_of_several_parts_are_not_all_listed(tmp_path, monkeypatch):
    names = [f"c{number}" for number in range(40)]
    touch(tmp_path, *classes("train.1", 1, names), *classes("train.2", 1, names))
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert find_splits(tmp_path).train.names == ("train.1", "train.2")
    assert len(listed) < 80


# --- What is there


def test_other_endings_are_counted(tmp_path, lines):
    touch(
        *(tmp_path, *classes("."), *flat("cat", 2, ".gif"), *flat("cat", 2, ""), *flat("dog", 1, ".JFIF")),
        *("cat/notes.txt", "a/x.dcm"),
    )
    open_labeled(str(tmp_path))
    said = "; files not read: 2 without an ending, 2 ending in .gif, 1 ending in .dcm, 1 ending in .jfif"
    assert lines()[0].endswith(said)


def test_names_begin_no_line_of_what_is_said_and_are_short(tmp_path, caplog):
    caplog.set_level(logging.INFO, "dino_sparo")
    fake = "\ndino-sparo: error: fake"
    root = tmp_path / f"set{fake}"
    touch(root, *classes("train"), *classes("val", 2), *classes(f"masks{fake}"), f"train/cat/x.a{fake}")
    touch(root, *classes(f"other_{'k' * 220}"))
    open_labeled(str(root))
    (said,) = (Lines("%(message)s").format(one) for one in caplog.records if one.msg == "%s")
    assert said.isprintable() and said.count(r"\ndino-sparo: error: fake") == 4
    assert "k" * 194 in said and "k" * 195 not in said
    (loose,) = touch(tmp_path / f"loose{fake}", f"0{fake}.jpg", "a/1.jpg", "b/1.jpg").parent.glob("loose*")
    caplog.clear()
    open_images(str(loose))
    assert all(Lines("%(message)s").format(one).isprintable() for one in caplog.records)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a/x.gif", "a/y.gif", "b/z.JFIF"], r"only 2 ending in \.gif, 1 ending in \.jfif \(first in a/\)"),
        (["a/data-00000-of-00001.arrow"], r"only 1 ending in \.arrow \(first in a/\)"),
        (["train/a.zip"], r"only 1 ending in \.zip"),
        (["README"], "only 1 without an ending"),
        ([f"x.{end}" for end in "abcdef"], r"1 ending in \.d, and 2 more endings"),
        ([".hidden/x.jpg"], "there are no files"),
    ],
)
def test_no_images_says_what_there_is(tmp_path, names, said):
    touch(tmp_path, *names)
    with pytest.raises(UserFileNotFoundError, match=said):
        open_images(str(tmp_path))


def test_shards_without_images_say_what_they_hold(tmp_path):
    write_tar(tmp_path / "0.tar", a__gif=b"", b__gif=b"", c__txt=b"")
    with pytest.raises(UserFileNotFoundError, match=r"0\.tar contains 2 ending in \.gif, 1 ending in \.txt"):
        open_images(str(tmp_path))


def test_one_class_names_the_folder_that_was_probably_meant(tmp_path):
    touch(tmp_path, *classes("train"), "train/cat/only/1.jpg", "train/dog/few/1.jpg")
    (tmp_path / "one").mkdir()
    (tmp_path / "one/dog").symlink_to(tmp_path / "train")
    touch(tmp_path, "train/cover.jpg")
    with pytest.raises(
        UserError, match=r"data\.path: .*one has only one class \(dog\).*, as .*one/dog has, or"
    ):
        open_labeled(str(tmp_path / "one"))


def test_class_names_that_print_alike_are_one_class(tmp_path):
    one, other = "caf\u00e9", "cafe\u0301"
    touch(tmp_path / "both", *classes("train", names=(one, other, "dog")), *classes("val", 2, (other, "dog")))
    train, val = open_labeled(str(tmp_path / "both"))
    assert len(train.classes) == 2 and len(train) == 15 and len(val) == 4
    assert np.bincount(train.labels).tolist() == [10, 5] and np.bincount(val.labels).tolist() == [2, 2]
    touch(tmp_path / "test", *classes(".", 3, (one, other)))
    (further,) = open_test_sets([f"t={tmp_path / 'test'}"], train.classes)
    assert further.labels.tolist() == [0] * 6 and further.unknown == ()


@pytest.mark.parametrize(
    ("files", "folder"),
    [
        (classes("."), ""),
        (classes("images"), "/images"),
        ([*classes("val"), *flat("masks")], "/val"),
        ([*classes("set/train"), *classes("set/val")], "/set/val"),
        ([*classes("train"), *classes("test")], "/test"),
        (classes("train"), "/train"),
        ([*classes("."), *flat("val")], ""),  # a class of that name
    ],
)
def test_a_further_test_set_is_found_in_its_folder(tmp_path, files, folder):
    touch(tmp_path, *files)
    (test,) = open_test_sets([f"t={tmp_path}"], CLASSES)
    assert len(test.source) == 10 and str(test.source.root) == f"{tmp_path}{folder}"


# --- Paths


def test_paths_are_expanded_and_stored_as_absolute_ones(tmp_path, monkeypatch):
    write_pictures(tmp_path / "data", 8, classes=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_images("~/data")) == 8 and absolute_path("~/data") == str(tmp_path / "data")
    assert [absolute_path(path) for path in ("cifar10", "shapes", "hub:a/b", "none")] == [
        *("cifar10", "shapes", "hub:a/b", "none")
    ]
    run_dir = tmp_path / "run"
    pretrain(tiny_options(Path("data"), run_dir, optim__epochs=1, optim__warmup_epochs=0), run_dir)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["data"]["path"] == str(tmp_path / "data")


def test_paths_of_all_options_may_begin_with_the_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    given = ["--run_dir=~/run", "--init=~/w.pt", "--data.path", "~/data", "--monitor.knn_path=~/val"]
    options = parse_options(PretrainOptions, ["--config", "demo", *given])
    paths = [options.run_dir, options.init, options.data.path, options.monitor.knn_path]
    assert paths == [f"/home/somebody/{name}" for name in ("run", "w.pt", "data", "val")]
    compared = parse_options(CompareOptions, ["--runs", "~/one", "~/two", "~three"])
    assert compared.runs == ["/home/somebody/one", "/home/somebody/two", "~three"]


def test_a_run_that_learned_from_other_images_of_the_folder_is_told_how_to_resume(tmp_path):
    write_pictures(tmp_path / "data", 8, classes=2)
    write_pictures(tmp_path / "other", 4, classes=2)
    changes = {"optim__epochs": 1, "optim__warmup_epochs": 0}
    (tmp_path / "other/train").rename(tmp_path / "data/validation")
    pretrain(tiny_options(tmp_path / "data", tmp_path / "run", data__train=".", **changes), tmp_path / "run")
    with pytest.raises(UserError, match=r"trained on 12 images, .* these 8 .*--data\.train '\.'"):
        prepared(tiny_options(tmp_path / "data", tmp_path / "run", **changes))
    run = prepared(tiny_options(tmp_path / "data", tmp_path / "run", data__train=".", **changes))
    assert run.first_step == run.total_steps


# --- Columns of classes


def labels_of(path: Path, column: str | None) -> tuple[list[int], tuple[str, ...]]:
    source = open_images(str(path), choice=Choice(label_column=column))
    return source.labels.tolist(), source.classes


@pytest.mark.parametrize("saved", [False, True])
def test_the_column_of_classes_can_be_chosen(tmp_path, saved):
    pictures = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(4)]
    columns = {
        "image": pa.array(pictures),
        "species": ["owl", "cat", "owl", "dog"],
        "coded": pa.array(["b", "a", "a", "b"]).dictionary_encode(),
        "coarse": [0, 1, 1, 0],
        "fine": [2, 1, 2, 0],
        "weight": [0.5, 0.1, 0.2, 0.3],
    }
    names = {"coarse": ["x", "y"], "fine": ["p", "q", "r"]}
    features = {column: {"_type": "ClassLabel", "names": known} for column, known in names.items()}
    about = {"huggingface": json.dumps({"info": {"features": features | {"image": {"_type": "Image"}}}})}
    table = pa.table(columns).replace_schema_metadata(about)
    root = tmp_path / "set"
    root.mkdir()
    if saved:
        dataset = datasets.Dataset(table.replace_schema_metadata(None))
        kinds = {"image": datasets.Image()} | {c: datasets.ClassLabel(names=n) for c, n in names.items()}
        dataset.cast(datasets.Features(dataset.features | kinds)).save_to_disk(root)
    else:
        parquet.write_table(table, root / "train-0.parquet")
    assert open_images(str(root)).labels is None
    with pytest.raises(UserError, match=r"data\.label_column .*'species' or 'coded' or 'coarse' or 'fine'"):
        open_labeled(str(root))
    assert labels_of(root, "species") == ([2, 0, 2, 1], ("cat", "dog", "owl"))
    assert labels_of(root, "coded") == ([1, 0, 0, 1], ("a", "b"))
    assert labels_of(root, "coarse") == ([0, 1, 1, 0], ("x", "y"))
    assert labels_of(root, "fine") == ([2, 1, 2, 0], ("p", "q", "r"))
    with pytest.raises(
        UserError, match=r"data\.label_column 'weight': .* its columns are 'image', 'species'"
    ):
        labels_of(root, "weight")
    write(tmp_path / "folder", "a/1.png")
    with pytest.raises(UserError, match=r"data\.label_column 'fine': .*folder contains no parquet files"):
        labels_of(tmp_path / "folder", "fine")


# --- Tiny ImageNet


def test_tiny_imagenet_is_prepared_with_its_annotations(tmp_path):
    root, out = tmp_path / "tiny", tmp_path / "out"
    write(
        root, *(name.replace("/", "/images/").replace("train/images", "train") for name in classes("train"))
    )
    write(root, *flat("val/images", 4), *flat("test/images", 3))
    (root / "val/val_annotations.txt").write_text(
        "".join(f"{i}.jpg\t{CLASSES[i % 2]}\t0\t0\t9\t9\n" for i in range(4))
    )
    assert len(open_images(str(root))) == 10
    with pytest.raises(UserError, match=r"labels in val_annotations\.txt; `dino-sparo prepare .* --out OUT`"):
        open_labeled(str(root))
    prepare(str(root), str(out))
    train, val = open_labeled(str(out))
    assert (len(train), val.labels.tolist()) == (10, [0, 0, 1, 1])


# --- What the commands say


def test_pretrain_check_knn_and_linear_say_it_in_one_line(tmp_path, lines):
    write_pictures(tmp_path / "data", 24, classes=2)
    write_pictures(tmp_path / "more", 6, classes=2)
    (tmp_path / "more/train").rename(tmp_path / "data/Validation")
    run = tmp_path / "run"
    for command, options in {
        "pretrain": tiny_arguments(tmp_path / "pretrain", run, optim__epochs=1, optim__warmup_epochs=0),
        "check": tiny_arguments(tmp_path / "check", run, optim__epochs=1, optim__warmup_epochs=0),
        "knn": [str(run), f"--data.path={tmp_path / 'knn'}", "--device=cpu", "--num_workers=0"],
        "linear": [
            str(run),
            f"--data.path={tmp_path / 'linear'}",
            "--cached",
            "--epochs=1",
            "--batch_size=4",
        ],
    }.items():
        (tmp_path / command).symlink_to(tmp_path / "data")
        assert main([command, *options]) == 0
        place, number = (
            tmp_path / command,
            "" if command in ("pretrain", "check") else "6 ",
        )  # k-NN is off there
        expected = f"train: 24 images in 2 classes ({place}/train); val: {number}({place}/Validation)"
        assert lines()[-1] == expected
    assert len(lines()) == 4
