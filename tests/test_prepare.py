"""`prepare` makes the same two splits of every layout, whatever happens, and touches nothing else."""

import json
import os
import re
import shutil

import pytest
from torchvision.datasets import ImageFolder

from dino_sparo.__main__ import main
from dino_sparo.data.imagenet import explain, recognise
from dino_sparo.errors import UserError
from dino_sparo.prepare import RECORD, UNFINISHED_FILE, prepare
from tests import imagenet_layouts as mini
from tests.prepare_cases import (
    LAYOUTS,
    all_tars,
    class_folders,
    class_tars_and_flat_val,
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


# --- Every layout


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_layouts_become_the_same_class_folders(source, out, name, caplog):
    LAYOUTS[name](source)
    before = state(source)
    with caplog.at_level("INFO"):
        said = prepare(str(source), str(out))
    usable = "; usable as it is" if name == "class folders" else ""
    assert caplog.messages[0] == f"{source}: {recognise(source).name}{usable}"
    assert images(out / "train") == mini.TRAIN
    assert images(out / "val") == mini.SORTED_VAL
    assert sorted(os.listdir(out)) == ["train", "val"]
    assert state(source) == before
    assert explain(recognise(out)) == ""
    assert (len(ImageFolder(str(out / "train"))), len(ImageFolder(str(out / "val")))) == (7, 5)
    assert said.splitlines() == [
        f"{out}/val: 5 images, 3 classes",
        f"{out}/train: 7 images, 3 classes",
        f"next: dino-sparo pretrain --config imagenet_vits16_sparo --data.path {out} --run_dir runs/sparo",
    ]

    done = state(out)
    prepare(str(source), str(out))
    assert state(out) == done
    assert state(source) == before


def test_links_and_no_copies(source, out):
    unpacked_with_solution(source)
    prepare(str(source), str(out))
    assert os.readlink(out / "train") == "../source/train"
    link = out / "val" / "n01440764" / "ILSVRC2012_val_00000001.JPEG"
    assert os.readlink(link) == "../../../source/val/ILSVRC2012_val_00000001.JPEG"


def test_neighbors_can_move_together(tmp_path, source, out):
    unpacked_with_solution(source)
    prepare(str(source), str(out))
    (tmp_path / "elsewhere").mkdir()
    for folder in (source, out):
        shutil.move(folder, tmp_path / "elsewhere" / folder.name)
    moved = tmp_path / "elsewhere" / "out"
    assert (images(moved / "train"), images(moved / "val")) == (mini.TRAIN, mini.SORTED_VAL)
    prepare(str(tmp_path / "elsewhere" / "source"), str(moved))


def test_links_to_far_away_are_absolute_and_resolved(tmp_path, source):
    unpacked_with_solution(source)
    (tmp_path / "alias").symlink_to("source")
    out = tmp_path / "a" / "b" / "c" / "out"
    prepare(str(tmp_path / "alias"), str(out))
    assert os.readlink(out / "train") == str(source.resolve() / "train")
    assert os.readlink(out / "val/n01440764/ILSVRC2012_val_00000001.JPEG").startswith(str(source.resolve()))
    assert images(out / "val") == mini.SORTED_VAL


def test_class_folders_that_are_their_own_out(source):
    class_folders(source)
    before = state(source)
    prepare(str(source), str(source))
    assert state(source) == before


def test_blanks_in_names_are_quoted(source, tmp_path):
    mini.kaggle(source)
    said = prepare(str(source), str(tmp_path / "my out"))
    assert f"--data.path '{tmp_path}/my out' --run_dir" in said


def test_out_below_a_link(tmp_path, source):
    unpacked_with_solution(source)
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/deep")
    prepare(str(source), str(tmp_path / "link" / "out"))
    assert images(tmp_path / "disk/deep/out/val") == mini.SORTED_VAL


def test_val_first_and_train_later(source, out):
    all_tars(source)
    (source / "ILSVRC2012_img_train.tar").rename(source / "later.tar")
    said = prepare(str(source), str(out))
    assert f"no training images yet; next: dino-sparo prepare DIR --out {out}" in said
    done = state(out / "val")
    (source / "later.tar").rename(source / "ILSVRC2012_img_train.tar")
    (source / "ILSVRC2012_img_val.tar").unlink()
    said = prepare(str(source), str(out))
    assert state(out / "val") == done
    assert (images(out / "train"), images(out / "val")) == (mini.TRAIN, mini.SORTED_VAL)
    assert f"{out}/val: 5 images" in said


def test_tars_with_folders_and_other_files(source, out):
    files = {f"./val/{name}": content for name, content in mini.VAL.items()}
    mini.write(
        source, {"ILSVRC2012_img_val.tar": mini.tar_of(files | {"./val/README": b"x", "._1.JPEG": b"x"})}
    )
    mini.solution(source)
    prepare(str(source), str(out))
    assert images(out / "val") == mini.SORTED_VAL


# --- Labels


@pytest.mark.parametrize("separator", [" ", ",", "\t"])
def test_given_labels_win_over_those_found(source, out, separator):
    unpacked_with_solution(source)
    swapped = mini.labels_list(separator).replace(b"n01440764", b"n02084071")
    mini.write(source, {"labels.txt": swapped})
    prepare(str(source), str(out), labels=str(source / "labels.txt"))
    assert {name: len(files) for name, files in images(out / "val").items()} == {
        "n02123045": 2,
        "n02084071": 3,
    }


@pytest.mark.parametrize("split", ["val", "train"])
def test_other_flat_images_with_a_list(source, out, split):
    """Beside training classes they are the val split; alone they are all there is to learn from."""
    photos = {"my photo.jpg": b"1", "b.png": b"2", "notes.txt": b""}
    mini.write(source / "val" if split == "val" else source, photos)
    if split == "val":
        mini.write_classes(source / "train", {"cat": {"1.jpg": b""}})
    mini.write(source.parent, {"labels.csv": b"my photo.jpg,cat\nb.png,dog\n"})
    prepare(str(source), str(out), labels=str(source.parent / "labels.csv"))
    assert images(out / split) == {"cat": {"my photo.jpg": b"1"}, "dog": {"b.png": b"2"}}


def test_labels_are_not_for_flat_train_beside_val(source, out):
    mini.write(source / "train", {"a.jpg": b"1"})
    mini.write(source / "val", mini.VAL)
    mini.solution(source)
    prepare(str(source), str(out))
    assert os.readlink(out / "train") == "../source/train"
    assert images(out / "val") == mini.SORTED_VAL


def test_flat_images_without_labels_are_only_linked(source, out):
    mini.write(source, {"a.jpg": b"1", "b.jpg": b"2"})
    assert f"{out}/train: 2 images, 0 classes" in prepare(str(source), str(out))
    assert os.readlink(out / "train") == "../source"


def test_how_the_classes_differ_is_said(source, out):
    unpacked_with_solution(source)
    shutil.rmtree(source / "train" / "n01440764")
    mini.write_classes(source / "train", {f"n0000000{i}": {"1.JPEG": b""} for i in range(5)})
    assert prepare(str(source), str(out)).splitlines()[2:4] == [
        "classes of train that val does not have: 5 (n00000000, n00000001, n00000002, ...)",
        "classes of val that train does not have: 1 (n01440764)",
    ]


# --- Interrupted


@pytest.mark.parametrize("name", ["tars", "class tars"])
def test_killed_and_started_again(tmp_path, source, out, name):
    LAYOUTS[name](source)
    prepare(str(source), str(tmp_path / "whole"))
    killed(source, out, 3)  # in val
    assert os.listdir(out) == [".val.partial"]
    killed(source, out, 5)  # in train: three of val are to do
    assert sorted(os.listdir(out)) == [".train.partial", "val"]
    killed(source, out, 3)
    unfinished = out / ".train.partial"
    assert (unfinished / UNFINISHED_FILE).stat().st_size == 100
    whole = list(unfinished.rglob("*.JPEG"))
    assert len(whole) == 3
    for path in whole:
        assert path.read_bytes() == mini.TRAIN[path.parent.name][path.name]
    inodes = {path.name: path.stat().st_ino for path in whole}
    prepare(str(source), str(out))
    assert (images(out / "train"), images(out / "val")) == (mini.TRAIN, mini.SORTED_VAL)
    for path in (out / "train").rglob("*.JPEG"):  # not written again
        assert inodes.get(path.name, path.stat().st_ino) == path.stat().st_ino
    records = [json.loads((tmp_path / folder / "train" / RECORD).read_text()) for folder in ("out", "whole")]
    assert records[0] == records[1]
    assert sorted(os.listdir(out)) == ["train", "val"]


def test_killed_while_the_record_was_written(source, out):
    all_tars(source)
    (out / ".train.partial").mkdir(parents=True)
    (out / ".train.partial" / UNFINISHED_FILE).write_text('{"sour')
    prepare(str(source), str(out))
    assert images(out / "train") == mini.TRAIN


def test_unpacked_images_are_on_the_disk_before_the_split_has_its_name(source, out, monkeypatch):
    there = []
    monkeypatch.setattr(
        os, "sync", lambda: there.append([(out / split).exists() for split in ("val", "train")])
    )
    all_tars(source)
    prepare(str(source), str(out))
    assert there == [[False, False], [True, False]]
    prepare(str(source), str(out))
    assert len(there) == 2


def test_a_file_system_that_refuses(source, out, monkeypatch, capsys):
    unpacked_with_solution(source)

    def full(target, path):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", full)
        assert main(["prepare", str(source), "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert re.search(
        r"out/\.val\.partial/.*\.JPEG cannot be read or written \(No space left on device\); make", told
    )
    prepare(str(source), str(out))
    assert images(out / "val") == mini.SORTED_VAL


def test_an_incomplete_tar_leaves_no_split(source, out):
    all_tars(source)
    tar = source / "ILSVRC2012_img_train.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"img_train\.tar: the tar is damaged or incomplete"):
        prepare(str(source), str(out))
    tar.write_bytes(whole)
    prepare(str(source), str(out))
    assert images(out / "train") == mini.TRAIN


def test_a_damaged_class_tar_is_named(source, out):
    class_tars_and_flat_val(source)
    tar = source / "train" / "n02084071.tar"
    tar.write_bytes(tar.read_bytes()[:600] + bytes(2_000_000))
    with pytest.raises(UserError, match=r"train/n02084071\.tar: the tar is damaged"):
        prepare(str(source), str(out))
    assert sorted(os.listdir(out)) == [".train.partial", "val"]
