"""The report on a data set: copies, classes, words and JSON."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from dino_sparo.data import scan
from dino_sparo.data.generated import shapes_source
from dino_sparo.data.scan_report import (
    Copies,
    compare_splits,
    copies_across,
    copies_inside,
    data_report,
    describe,
)
from tests.test_scan import PIXELS, Files, encoded, scanned, write

# --- Copies and classes


@pytest.fixture
def copied(tmp_path) -> tuple[Files, Files]:
    """Train: a three times, b twice, c, and two equal bad files; val: c twice, b, d and the bad file."""
    a, b, c, d = (encoded("PNG", PIXELS[:, 4 * i :]) for i in range(4))
    train = write(
        tmp_path / "train", **{"1": b, "2": a, "3": c, "4": a, "5": b, "6": a, "7": b"bad", "8": b"bad"}
    )
    val = write(tmp_path / "val", **{"1": c, "2": b"bad", "3": d, "4": c, "5": b})
    return train, val


def test_copies_inside_a_split(copied):
    train, val = copied
    copies = copies_inside(scanned(train))
    assert (copies.groups, copies.images) == (2, 5)
    assert [group.count for group in copies.largest] == [3, 2]
    assert [[Path(name).name for name in group.first] for group in copies.largest] == [
        ["2", "4", "6"],
        ["1", "5"],
    ]
    assert copies_inside(scanned(val)).images == 2


def test_copies_across_splits(copied):
    train, val = copied
    copies = copies_across(scanned(train), scanned(val))
    assert (copies.groups, copies.images) == (2, 3)
    assert [group.first for group in copies.largest] == [
        (train.name(0), val.name(4)),
        (train.name(2), val.name(3)),
    ]


def test_no_readable_image_no_copies(tmp_path):
    nothing = scanned(write(tmp_path, a__jpg=b"", b__jpg=b""))
    assert copies_inside(nothing) == copies_across(nothing, nothing) == Copies(0, 0, ())


def test_many_groups_are_bounded(tmp_path):
    files = {f"{n:02d}": encoded("PNG", np.full((8, 8), n // 2, dtype=np.uint8)) for n in range(60)}
    copies = copies_inside(scanned(write(tmp_path, **files)))
    assert (copies.groups, copies.images, len(copies.largest)) == (30, 60, 20)
    assert [Path(group.first[0]).name for group in copies.largest] == [f"{2 * n:02d}" for n in range(20)]


def test_classes_are_compared():
    train = Files([Path()] * 6, np.array([0, 0, 0, 1, 2, 2]), ("cat", "dog", "eel"))
    val = Files([Path()] * 3, np.array([1, 3, 3]), ("cat", "dog", "eel", "fox"))
    comparison = compare_splits(train, val)
    assert comparison.train.images_per_class == scan.Spread(1, 2, 3)
    assert comparison.train.fewest == scan.Listing(1, ("dog",))
    assert (comparison.train.classes, comparison.val.classes) == (3, 2)
    assert comparison.only_in_train == scan.Listing(2, ("cat", "eel"))
    assert comparison.only_in_val == scan.Listing(1, ("fox",))


def test_missing_labels_are_said():
    flat, sorted_ = Files([Path()] * 2), Files([Path()] * 2, np.array([0, 0]), ("cat",))
    comparison = compare_splits(flat, sorted_)
    assert not comparison.train.labelled and comparison.val.labelled
    assert comparison.train.images_per_class is None
    assert comparison.only_in_val.count == 0
    assert compare_splits(sorted_, None).val is None


# --- The report


def test_report_in_words_and_as_json(copied):
    train, val = copied
    train.labels, train.classes = np.array([0, 0, 0, 0, 0, 0, 1, 1]), ("cat", "dog")
    val.labels, val.classes = np.zeros(5, dtype=np.int64), ("cow",)
    report = data_report(scanned(train), scanned(val))
    lines = describe(report)
    kept = [line for line in lines if "images/s" not in line]
    assert lines[0].startswith("train: 8 images, 2 of them bad, ")
    assert kept == [
        "  short side 40, long side 48 to 56 (median 54) pixels",
        "  not_an_image: 2",
        f"    {train.name(6)}: no known kind of image",
        f"    {train.name(7)}: no known kind of image",
        "  short side 40, long side 44 to 52 (median 48) pixels",
        "  not_an_image: 1",
        f"    {val.name(1)}: no known kind of image",
        "copies within train: 5 images in 2 groups of equal content",
        f"    {train.name(1)} = {train.name(3)} = {train.name(5)}",
        f"    {train.name(0)} = {train.name(4)}",
        "copies within val: 2 images in 1 group of equal content",
        f"    {val.name(0)} = {val.name(3)}",
        "val images that are in train too: 3 images in 2 groups of equal content",
        f"    {train.name(0)} = {val.name(4)} and 1 more",
        f"    {train.name(2)} = {val.name(3)} and 1 more",
        "classes in train: 2 with 2 to 6 (median 4) images each, fewest in dog",
        "classes in val: 1 with 5 images each",
        "classes only in train: 2 (cat, dog)",
        "classes only in val: 1 (cow)",
    ]
    plain = json.loads(json.dumps(asdict(report)))
    assert plain["train"]["problems"]["not_an_image"]["count"] == 2
    assert plain["val_in_train"]["images"] == 3


def test_report_without_val(copied):
    report = data_report(scanned(copied[0]), None)
    assert report.val is None and report.val_in_train is None
    assert describe(report)[-1] == "classes in train: unknown, as the images do not lie in class folders"


def test_generated_pictures_are_skipped():
    pictures = shapes_source("val")
    report = data_report(scanned(pictures), None)
    assert report.train.readable == 0 and report.train.images == 1000
    assert describe(report)[0] == "train: 1,000 images, not scanned: generated pictures are no files"
    assert len(describe(report)) == 2
    assert report.copies_in_train is None
