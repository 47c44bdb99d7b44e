"""`prepare` makes the same two splits from every layout, also when resumed, and changes nothing else."""

import fcntl
import json
import os
import shutil
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from dino_sparo.data.imagenet import explain, recognize
from dino_sparo.errors import UserError
from dino_sparo.files import LOCK_OF_FILES
from dino_sparo.prepare import RECORD, UNFINISHED_FILE, prepare
from tests import imagenet_layouts as mini

SOLUTION, TRAIN_TAR, VAL_TAR = "LOC_val_solution.csv", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def class_folders(folder: Path) -> None:
    mini.write_classes(folder / "train", mini.TRAIN)
    mini.write_classes(folder / "val", mini.SORTED_VAL)


def all_tars(folder: Path) -> None:
    mini.official_tars(folder)
    mini.devkit_archive(folder)


def class_tars_and_flat_val(folder: Path) -> None:
    mini.write(folder / "train", mini.class_tars() | {"notes.txt": b"", "n1.tar": b""})
    mini.write(folder / "val", mini.VAL)
    mini.devkit(folder)


def unpacked(folder: Path) -> None:
    mini.unpacked(folder)
    mini.solution(folder)


LAYOUTS = {
    "class folders": class_folders,
    "Kaggle": mini.kaggle,
    "tars": all_tars,
    "class tars": class_tars_and_flat_val,
    "unpacked": unpacked,
}


@pytest.fixture
def source(tmp_path):
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def images(split: Path) -> dict[str, dict[str, bytes]]:
    """File contents by class and file name; the only hidden file must be the record."""
    hidden = [path.name for path in split.rglob(".*")]
    assert hidden in ([], [RECORD])
    return {
        folder.name: {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in split.iterdir()
        if not folder.name.startswith(".")
    }


def listed(out: Path) -> list[str]:
    return sorted({*os.listdir(out)} - {LOCK_OF_FILES})


def is_made(out: Path) -> bool:
    """Whether `out` holds exactly the two expected splits."""
    splits = images(out / "train"), images(out / "val")
    return splits == (mini.TRAIN, mini.SORTED_VAL) and listed(out) == ["train", "val"]


def state(folder: Path) -> dict[str, tuple]:
    """The state of all files and links in a folder, to detect changes."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]) if os.path.lexists(folder) else ():
        status = path.lstat()
        link = os.readlink(path) if path.is_symlink() else None
        found[str(path)] = (status.st_mode, status.st_ino, status.st_mtime_ns, status.st_size, link)
    return found


def prepare_until(source: Path, out: Path, image: int) -> None:
    copy, link, left = shutil.copyfileobj, os.symlink, [None] * image

    def die_in_time(target=None):
        left.pop()
        if not left:
            if target:
                target.write(bytes(100))
                target.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    shutil.copyfileobj = lambda source, target: die_in_time(target) or copy(source, target)
    os.symlink = lambda target, path: die_in_time() or link(target, path)
    prepare(str(source), str(out))


def killed(source: Path, out: Path, image: int) -> None:
    """Run `prepare` in a process that is killed when it has written a part of an image."""
    process = get_context("fork").Process(target=prepare_until, args=(source, out, image))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


# --- Every layout


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_layouts_become_the_same_class_folders(source, out, name, caplog):
    LAYOUTS[name](source)
    before = state(source)
    with caplog.at_level("INFO"):
        said = prepare(str(source), str(out))
    usable = "; usable without `prepare`" if name == "class folders" else ""
    assert caplog.messages[0] == f"{source}: {recognize(source).name}{usable}"
    assert is_made(out) and state(source) == before
    assert explain(recognize(out)) == ""
    assert (len(ImageFolder(str(out / "train"))), len(ImageFolder(str(out / "val")))) == (7, 5)
    assert said.splitlines() == [
        f"{out}/val: 5 images, 3 classes",
        f"{out}/train: 7 images, 3 classes",
        f"next: dino-sparo pretrain --config imagenet_vits16_sparo --data.path {out} --run_dir runs/sparo",
    ]
    done = state(out)
    prepare(str(source), str(out))
    assert state(out) == done and state(source) == before


def test_neighbors_are_linked_relatively_and_can_move_together(tmp_path, source, out):
    unpacked(source)
    prepare(str(source), str(out))
    assert os.readlink(out / "train") == "../source/train"
    link = out / "val" / "n01440764" / "ILSVRC2012_val_00000001.JPEG"
    assert os.readlink(link) == "../../../source/val/ILSVRC2012_val_00000001.JPEG"
    (tmp_path / "elsewhere").mkdir()
    for folder in (source, out):
        shutil.move(folder, tmp_path / "elsewhere" / folder.name)
    assert is_made(tmp_path / "elsewhere" / "out")
    prepare(str(tmp_path / "elsewhere" / "source"), str(tmp_path / "elsewhere" / "out"))


def test_links_to_far_away_are_absolute_and_resolved(tmp_path, source):
    unpacked(source)
    (tmp_path / "alias").symlink_to("source")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/b")
    out = tmp_path / "link" / "c" / "out"
    prepare(str(tmp_path / "alias"), str(out))
    assert os.readlink(out / "train") == str(source.resolve() / "train")
    assert os.readlink(out / "val/n01440764/ILSVRC2012_val_00000001.JPEG").startswith(str(source.resolve()))
    assert is_made(out)


def test_class_folders_that_are_their_own_out(source):
    class_folders(source)
    before = state(source)
    prepare(str(source), str(source))
    assert state(source) == before


def test_val_first_and_train_later(source, tmp_path):
    all_tars(source)
    out = tmp_path / "my out"
    (source / TRAIN_TAR).rename(source / "later.tar")
    said = prepare(str(source), str(out))
    assert f"next: dino-sparo prepare DIR --out '{out}', where DIR holds the train images" in said
    done = state(out / "val")
    (source / "later.tar").rename(source / TRAIN_TAR)
    (source / VAL_TAR).unlink()
    said = prepare(str(source), str(out))
    assert state(out / "val") == done and is_made(out)
    assert f"{out}/val: 5 images" in said and f"--data.path '{out}' --run_dir" in said


# --- Labels


def test_given_labels_win_over_those_found(source, out):
    unpacked(source)
    mini.write(source, {"labels.txt": mini.labels_list().replace(b"n01440764", b"n02084071")})
    prepare(str(source), str(out), labels=str(source / "labels.txt"))
    found = {name: len(files) for name, files in images(out / "val").items()}
    assert found == {"n02123045": 2, "n02084071": 3}


@pytest.mark.parametrize("split", ["val", "train"])
def test_other_flat_images_with_a_list(source, out, split):
    """Flat images are val if there are train classes, else train."""
    photos = {"my photo.jpg": b"1", "b.png": b"2", "notes.txt": b""}
    mini.write(source / "val" if split == "val" else source, photos)
    if split == "val":
        mini.write_classes(source / "train", {"cat": {"1.jpg": b""}})
    mini.write(source.parent, {"labels.csv": b"my photo.jpg,cat\nb.png,dog\n"})
    prepare(str(source), str(out), labels=str(source.parent / "labels.csv"))
    assert images(out / split) == {"cat": {"my photo.jpg": b"1"}, "dog": {"b.png": b"2"}}


def test_flat_training_images_are_only_linked(source, out, tmp_path):
    """A labels file in the folder belongs to the validation images."""
    mini.write(source / "train", {"a.jpg": b"1"})
    mini.write(source / "val", mini.VAL)
    mini.solution(source)
    prepare(str(source), str(out))
    assert os.readlink(out / "train") == "../source/train"
    assert images(out / "val") == mini.SORTED_VAL
    mini.write(tmp_path / "flat", {"a.jpg": b"1", "b.jpg": b"2"})
    assert "/train: 2 images, 0 classes" in prepare(str(tmp_path / "flat"), str(tmp_path / "other"))
    assert os.readlink(tmp_path / "other" / "train") == "../flat"


def test_how_the_classes_differ_is_said(source, out):
    unpacked(source)
    shutil.rmtree(source / "train" / "n01440764")
    mini.write_classes(source / "train", {f"n0000000{i}": {"1.JPEG": b""} for i in range(5)})
    assert prepare(str(source), str(out)).splitlines()[2:4] == [
        "classes of train that are not in val: 5 (n00000000, n00000001, n00000002, ...)",
        "classes of val that are not in train: 1 (n01440764)",
    ]


# --- Interrupted


@pytest.mark.parametrize("name", ["tars", "class tars"])
def test_killed_and_started_again(tmp_path, source, out, name):
    LAYOUTS[name](source)
    prepare(str(source), str(tmp_path / "whole"))
    killed(source, out, 3)  # in val
    assert listed(out) == [".val.partial"]
    killed(source, out, 6)  # in train: three of val are to do
    assert listed(out) == [".train.partial", "val"]
    unfinished = out / ".train.partial"
    assert (unfinished / UNFINISHED_FILE).stat().st_size == 100
    whole = list(unfinished.rglob("*.JPEG"))
    assert len(whole) == 2
    for path in whole:
        assert path.read_bytes() == mini.TRAIN[path.parent.name][path.name]
    inodes = {path.name: path.stat().st_ino for path in whole}
    prepare(str(source), str(out))
    assert is_made(out)
    for path in (out / "train").rglob("*.JPEG"):  # not written again
        assert inodes.get(path.name, path.stat().st_ino) == path.stat().st_ino
    records = [json.loads((tmp_path / folder / "train" / RECORD).read_text()) for folder in ("out", "whole")]
    assert records[0] == records[1]


def test_killed_while_the_record_was_written(source, out):
    all_tars(source)
    (out / ".train.partial").mkdir(parents=True)
    (out / ".train.partial" / UNFINISHED_FILE).write_text('{"sour')
    prepare(str(source), str(out))
    assert is_made(out)


def test_unpacked_images_are_on_the_disk_before_the_split_has_its_name(source, out, monkeypatch):
    there = []
    splits = [out / "val", out / "train"]
    monkeypatch.setattr(os, "sync", lambda: there.append([split.exists() for split in splits]))
    all_tars(source)
    prepare(str(source), str(out))
    prepare(str(source), str(out))
    assert there == [[False, False], [True, False]]


@pytest.mark.parametrize(("name", "tar"), [("tars", TRAIN_TAR), ("class tars", "train/n02084071.tar")])
def test_a_damaged_tar_is_named_and_leaves_no_split(source, out, name, tar):
    LAYOUTS[name](source)
    (source / tar).write_bytes((source / tar).read_bytes()[:600] + bytes(2_000_000))
    with pytest.raises(UserError, match=rf"{tar}: the tar is damaged or incomplete"):
        prepare(str(source), str(out))
    assert not (out / "train").exists() and (out / "val").exists() == (name == "class tars")


# --- Mistakes


def refused(message: str, source: Path, out: Path, labels: Path | None = None) -> None:
    """Assert that an error is raised and that `out` is not changed."""
    before = state(out)
    with pytest.raises(UserError, match=message):
        prepare(str(source), str(out), labels and str(labels))
    assert state(out) == before


def other_labels(folder: Path) -> None:
    unpacked(folder)
    mini.write(folder, {"labels": "".join(f"{name} {i}\n" for i, name in enumerate(mini.VAL)).encode()})


def lacks_an_image(folder: Path) -> None:
    unpacked(folder)
    (folder / "val" / "ILSVRC2012_val_00000003.JPEG").unlink()


@pytest.mark.parametrize(
    ("make", "labels", "said"),
    [
        (Path.mkdir, None, "no images recognized; expected a folder with one of: class folders"),
        (mini.unpacked, None, rf"val: the classes of these .*--labels .*{SOLUTION}"),
        (lacks_an_image, None, rf"{SOLUTION} line 4: .* has no image 'ILSVRC2012_val_00000003'"),
        (class_folders, "none.txt", r"--labels '.*' is not used: .*source has training images"),
        (
            lambda folder: mini.write(folder, mini.class_tars()),
            *("none.txt", r"--labels '.*' is not used: .*source has training images"),
        ),
        (
            other_labels,
            "labels",
            r"labels: its classes \(0, \.\.\.\) are not those of .* \(n01440764, \.\.\.\)",
        ),
        (
            lambda folder: mini.write(folder, {TRAIN_TAR: mini.tar_of(mini.VAL)}),
            *(None, "img_train.tar holds no class tars"),
        ),
        (
            lambda folder: mini.write(folder, {VAL_TAR: mini.tar_of({"notes.txt": b""}), "none.txt": b""}),
            *("none.txt", "img_val.tar holds no images"),
        ),
    ],
)
def test_sources_and_labels_that_are_refused(source, out, make, labels, said):
    make(source)
    refused(said, source, out, source / labels if labels else None)
    assert not out.exists()


@pytest.mark.parametrize("name", ["notes.txt", "n01440764", "test"])
def test_out_that_holds_other_things(source, out, name):
    mini.kaggle(source)
    (out / name).mkdir(parents=True)
    refused(rf"--out '.*out' holds other files \({name}\); choose", source, out)


def test_out_that_is_a_file(source, out):
    mini.kaggle(source)
    out.write_text("mine")
    refused("--out '.*out' is a file; give a folder", source, out)
    with pytest.raises(NotADirectoryError, match="out/deep"):
        prepare(str(source), str(out / "deep"), None)
    assert out.read_text() == "mine"


def test_out_among_the_images(source, out):
    unpacked(source)
    (source / "val" / "sorted").mkdir()
    out.symlink_to("source/val/sorted")
    before = state(source)
    for among in (source / "train", source / "val/sorted", source / "train/n01440764", out):
        refused("is in the folder of images", source, among)
    assert state(source) == before
    for _ in range(2):
        prepare(str(source), str(source / "beside"))
    assert is_made(source / "beside")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("unpacked", "link"), ("unpacked", "file"), ("tars", "folder"), ("class folders", "link")],
)
def test_splits_that_are_the_users(tmp_path, source, out, name, kind):
    LAYOUTS[name](source)
    out.mkdir()
    if kind == "file":
        (out / "train").write_text("mine")
    else:
        mine = out / "train" if kind == "folder" else tmp_path / "mine"
        mini.write_classes(mine, {"a": {"1.jpg": b""}})
    if kind == "link":
        (out / "train").symlink_to("../mine")
    before = state(out / "train")
    with pytest.raises(UserError, match=r"train exists and (was not made by|is not )"):
        prepare(str(source), str(out))
    assert state(out / "train") == before


def test_a_link_to_another_preparation_is_not_taken_for_its_own(tmp_path, source, out):
    all_tars(source)
    prepare(str(source), str(tmp_path / "other"))
    out.mkdir()
    (out / LOCK_OF_FILES).touch()
    (out / "val").symlink_to("../other/val")
    refused(r"val exists and was not made by", source, out)


def test_links_to_other_files_of_the_same_names(tmp_path, source, out):
    unpacked(source)
    prepare(str(source), str(out))
    shutil.copytree(source, tmp_path / "copy")
    refused("val was made from other images", tmp_path / "copy", out)


def test_an_unfinished_split_with_other_images_in_it(source, out):
    all_tars(source)
    killed(source, out, 2)
    mini.write(out / ".val.partial" / "n01440764", {"mine.jpg": b""})
    with pytest.raises(UserError, match=r"\.val\.partial holds 6 images, expected the 5 of .*; remove it"):
        prepare(str(source), str(out))
    assert (out / ".val.partial" / "n01440764" / "mine.jpg").exists()


def test_two_at_once(source, out):
    mini.kaggle(source)
    out.mkdir()
    with open(out / LOCK_OF_FILES, "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        refused("another process writes to it; wait", source, out)
    prepare(str(source), str(out))


def age(path: Path) -> None:
    """Images from a tar that was replaced are not kept: they may be wrong despite their size."""
    os.utime(path, (1, 1))


LOST = "out/val/n01440764/ILSVRC2012_val_00000001.JPEG"


@pytest.mark.parametrize(
    ("name", "change", "path", "said"),
    [
        (
            "unpacked",
            os.remove,
            LOST,
            "val holds 4 images, expected the 5 of .*; remove it and prepare again",
        ),
        (
            "tars",
            lambda path: path.write_text("{}"),
            f"out/train/{RECORD}",
            "train exists and was not made by `prepare`",
        ),
        (
            "tars",
            age,
            f"source/{VAL_TAR}",
            "val was made from other images or labels, or .* has changed since",
        ),
        ("class tars", age, "source/train/n01440764.tar", "train was made from other images or labels"),
    ],
)
def test_what_has_changed_since(tmp_path, source, out, name, change, path, said):
    LAYOUTS[name](source)
    prepare(str(source), str(out))
    change(tmp_path / path)
    refused(said, source, out)


@pytest.mark.parametrize("name", ["unpacked", "tars"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_split_of_other_labels(source, out, name, finished):
    LAYOUTS[name](source)
    if finished:
        prepare(str(source), str(out))
    else:
        killed(source, out, 2)
    mini.write(source, {"labels.txt": mini.labels_list().replace(b"n01440764", b"n02084071")})
    message = rf"out/\.?val.* was made from other images or labels, or {source}/"
    refused(message, source, out, source / "labels.txt")
