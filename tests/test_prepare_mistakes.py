"""What `prepare` refuses, in one sentence and without touching anything."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.prepare import RECORD, prepare
from tests import imagenet_layouts as mini
from tests.prepare_cases import (
    LAYOUTS,
    all_tars,
    class_folders,
    images,
    killed,
    state,
    unpacked_with_solution,
)


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def refused(message: str, source: Path, out: Path, labels: Path | None = None) -> None:
    """A mistake is named and changes nothing in `out`."""
    before = state(out) if out.exists() else None
    with pytest.raises(UserError, match=message):
        prepare(str(source), str(out), labels and str(labels))
    assert (state(out) if out.exists() else None) == before


def test_nothing_recognized(source, out):
    source.mkdir()
    refused("no images recognized; expected one of: class folders", source, out)
    with pytest.raises(UserFileNotFoundError):
        prepare(str(source / "missing"), str(out))


def test_no_labels(source, out):
    mini.unpacked(source)
    refused(r"val: nothing says the classes .*--labels .*LOC_val_solution\.csv", source, out)


def test_labels_that_do_not_fit(source, out):
    unpacked_with_solution(source)
    (source / "val" / "ILSVRC2012_val_00000003.JPEG").unlink()
    refused(r"LOC_val_solution\.csv line 4: .* has no image 'ILSVRC2012_val_00000003'", source, out)


@pytest.mark.parametrize("make", [class_folders, lambda folder: mini.write(folder, mini.class_tars())])
def test_labels_of_no_use(source, out, make):
    make(source)
    mini.solution(source)
    refused(
        r"--labels '.*' is of no use: .*source has training images",
        source,
        out,
        source / "LOC_val_solution.csv",
    )


@pytest.mark.parametrize("name", ["unpacked", "tars", "class tars"])
def test_labels_of_other_names_than_the_classes(source, out, name):
    LAYOUTS[name](source)
    labels = "".join(f"{image} {number}\n" for number, image in enumerate(mini.VAL))
    mini.write(source, {"numbers.txt": labels.encode()})
    message = r"numbers\.txt: its classes \(0, \.\.\.\) are none of .*'s \(n01440764, \.\.\.\); give labels"
    refused(message, source, out, source / "numbers.txt")


@pytest.mark.parametrize("name", ["notes.txt", "n01440764", "test"])
def test_out_that_holds_other_things(source, out, name):
    mini.kaggle(source)
    (out / name).mkdir(parents=True)
    refused(rf"--out '.*out' holds other things \({name}\); choose", source, out)


def test_out_that_is_a_file(source, out):
    mini.kaggle(source)
    out.write_text("mine")
    refused("--out '.*out' is a file; give a folder", source, out)
    with pytest.raises(NotADirectoryError, match="out/deep"):
        prepare(str(source), str(out / "deep"), None)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("below", ["train", "val/sorted", "train/n01440764"])
def test_out_among_the_images(source, below):
    unpacked_with_solution(source)
    before = state(source)
    with pytest.raises(UserError, match="lies among the images"):
        prepare(str(source), str(source / below))
    assert state(source) == before


def test_out_that_links_to_among_the_images(source, out):
    unpacked_with_solution(source)
    (source / "val" / "sorted").mkdir()
    out.symlink_to("source/val/sorted")
    refused("lies among the images", source, out)


def test_out_beside_the_images_in_the_source(source):
    unpacked_with_solution(source)
    prepare(str(source), str(source / "sorted"))
    prepare(str(source), str(source / "sorted"))
    assert images(source / "sorted" / "val") == mini.SORTED_VAL


@pytest.mark.parametrize("name", ["unpacked", "tars", "class folders"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_splits_that_are_the_users(tmp_path, source, out, name, split, kind):
    LAYOUTS[name](source)
    mini.write_classes(tmp_path / "mine", {"a": {"1.jpg": b""}})
    out.mkdir()
    if kind == "folder":
        shutil.move(tmp_path / "mine", out / split)
    elif kind == "file":
        (out / split).write_text("mine")
    else:
        (out / split).symlink_to("../mine")
    mine = state(out / split)
    with pytest.raises(UserError, match=rf"{split} exists and (was not made by|is not )"):
        prepare(str(source), str(out))
    assert state(out / split) == mine


def test_a_link_to_another_preparation_is_not_taken_for_its_own(tmp_path, source, out):
    all_tars(source)
    prepare(str(source), str(tmp_path / "other"))
    out.mkdir()
    (out / "val").symlink_to("../other/val")
    refused(r"val exists and was not made by", source, out)


@pytest.mark.parametrize("name", ["unpacked", "tars"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_split_of_other_labels(source, out, name, finished):
    LAYOUTS[name](source)
    if finished:
        prepare(str(source), str(out))
    else:
        killed(source, out, 2)
    swapped = mini.labels_list().replace(b"n01440764", b"n02084071")
    mini.write(source, {"labels.txt": swapped})
    message = rf"out/\.?val.* was made of other images or labels, or {source}/"
    refused(message, source, out, source / "labels.txt")


def test_links_to_other_files_of_the_same_names(tmp_path, source, out):
    unpacked_with_solution(source)
    prepare(str(source), str(out))
    shutil.copytree(source, tmp_path / "copy")
    refused("val was made of other images", tmp_path / "copy", out)


@pytest.mark.parametrize("name", ["unpacked", "tars"])
def test_a_split_that_lost_images(source, out, name):
    LAYOUTS[name](source)
    prepare(str(source), str(out))
    (out / "val" / "n01440764" / "ILSVRC2012_val_00000001.JPEG").unlink()
    refused(r"val holds 4 images, not the 5 of .*; remove it and prepare again", source, out)


def test_an_unfinished_split_with_other_images_in_it(source, out):
    all_tars(source)
    killed(source, out, 2)
    mini.write(out / ".val.partial" / "n01440764", {"mine.jpg": b""})
    with pytest.raises(UserError, match=r"\.val\.partial holds 6 images, not the 5 of .*; remove it"):
        prepare(str(source), str(out))
    assert (out / ".val.partial" / "n01440764" / "mine.jpg").exists()


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"source": ""}'])
def test_a_damaged_record(source, out, record):
    all_tars(source)
    prepare(str(source), str(out))
    (out / "train" / RECORD).write_text(record)
    refused(r"train exists and was not made by `prepare`", source, out)


def test_two_at_once(source, out):
    mini.kaggle(source)
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    refused("is being written by another process; wait", source, out)
    os.close(descriptor)
    prepare(str(source), str(out))


def test_no_class_tars_in_the_train_tar(source, out):
    mini.write(source, {"ILSVRC2012_img_train.tar": mini.tar_of(mini.VAL)})
    refused("img_train.tar holds no class tars", source, out)


def test_no_images_in_the_val_tar(source, out):
    mini.write(source, {"ILSVRC2012_img_val.tar": mini.tar_of({"notes.txt": b""}), "none.txt": b""})
    refused("img_val.tar holds no images", source, out, source / "none.txt")


@pytest.mark.parametrize(
    ("name", "tar", "split"),
    [
        ("tars", "ILSVRC2012_img_train.tar", "train"),
        ("tars", "ILSVRC2012_img_val.tar", "val"),
        ("class tars", "train/n01440764.tar", "train"),
    ],
)
def test_a_tar_that_was_replaced(source, out, name, tar, split):
    """Images of a damaged tar may have the right size, so they are not kept."""
    LAYOUTS[name](source)
    prepare(str(source), str(out))
    os.utime(source / tar, (1, 1))
    refused(rf"{split} was made of other images or labels, or {source}/.* has changed since", source, out)
