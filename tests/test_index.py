"""The index of a folder: what is in it, and when it is built anew."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dino_sparo.data import index as index_module
from dino_sparo.data import walk as walk_module
from dino_sparo.data.index import open_index
from dino_sparo.data.sources import open_images, open_labelled
from dino_sparo.errors import UserError
from tests.index_folders import count_walks, names, settle, touch


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DINO_SPARO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def walks(cache, monkeypatch) -> list[Path]:
    return count_walks(monkeypatch)


# --- What is in it


def test_order_names_and_fingerprint_are_those_of_sorted_strings(tmp_path):
    """As plain strings sort: bytes of UTF-8 would put what is no UTF-8 behind all else."""
    files = [
        "a/1.jpg",
        "a/10.jpg",
        "a/2.jpg",
        "a/\udcff.jpg",
        "a/\uff21.jpg",
        "a/\U0001f600.jpg",
        "a/x/0.jpg",
    ]
    files += ["a-b/1.jpg", "a/x-y/1.jpg", "a/x/y/1.jpg", "B/1.png", "é/1.jpg", "\udce9/1.jpg"]
    index = open_index(touch(tmp_path, *files))

    def class_folder_name(file: str) -> tuple[str, str, str]:
        folder, _, name = file.rpartition("/")
        return folder.split("/")[0], folder, name

    expected = sorted(files, key=class_folder_name)
    assert names(index) == expected
    assert index.classes == tuple(sorted({file.split("/")[0] for file in files}))
    assert [index.classes[label] for label in index.labels()] == [file.split("/")[0] for file in expected]
    packed = "\0".join(expected).encode("utf-8", "surrogateescape")
    assert index.fingerprint == hashlib.sha256(packed).hexdigest()


def test_fingerprint_of_some_images_whatever_the_pieces(tmp_path, monkeypatch):
    index = open_index(touch(tmp_path, *(f"a/{i}.jpg" for i in range(10))))
    assert index.fingerprint_of(np.arange(10)) == index.fingerprint
    some = [7, 0, 3, 3, 9]
    expected = hashlib.sha256("\0".join(index.name(i) for i in some).encode()).hexdigest()
    for size in (1, 2, 5, 100):
        monkeypatch.setattr(index_module, "NAMES_AT_ONCE", size)
        assert index.fingerprint_of(np.array(some)) == expected
    assert index.fingerprint_of(np.array([], dtype=np.int64)) == hashlib.sha256().hexdigest()


def test_positions_outside_have_no_name(tmp_path):
    index = open_index(touch(tmp_path, "a/1.jpg", "b/2.jpg"))
    assert index.name(np.int64(1)) == index.name(-1) == "b/2.jpg"
    for position in (2, -3):
        with pytest.raises(IndexError):
            index.name(position)


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(walk_module.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"/b: the folder cannot be read \(Permission denied\); repair"):
        open_index(tmp_path)


# --- When it is built anew


def images(root: Path) -> list[str]:
    """All images below a folder, found in another way."""
    found = []
    for folder, _, files in os.walk(root, followlinks=True):
        found += [os.path.relpath(f"{folder}/{file}", root) for file in files if file.endswith(".jpg")]
    return sorted(found)


def test_an_untouched_folder_is_walked_once(tmp_path, walks):
    root = touch(tmp_path / "root", "a/1.jpg", "b/c/2.jpg", "empty/notes.txt")
    (root / "d").symlink_to("b")
    (root / "nowhere").symlink_to("missing")
    (root / "text").symlink_to("empty/notes.txt")
    (root / "a" / "up").symlink_to(root)
    settle()
    first = open_index(root)
    for _ in range(3):
        assert names(open_index(root)) == names(first) == ["a/1.jpg", "b/c/2.jpg", "d/c/2.jpg"]
    link = tmp_path / "link"
    link.symlink_to(root)
    assert names(open_index(link)) == names(first)  # another name of the same folder
    (root / "a" / "1.jpg").write_bytes(b"another picture")
    assert names(open_index(root)) == names(first)
    assert len(walks) == 1


def move(source: Path, target: Path) -> None:
    source.rename(target)


def retarget(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)


def test_training_and_evaluation_share_a_walk(tmp_path, walks):
    root = touch(tmp_path / "root", "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg")
    settle()
    source = open_images(str(root))
    train, val = open_labelled(str(root))
    assert (len(source), len(train), len(val)) == (2, 2, 1)
    assert walks == [root / "train", root / "val"]


CHANGES = {
    "add": lambda root: touch(root, "a/3.jpg"),
    "add below": lambda root: touch(root, "b/c/3.jpg"),
    "add in a linked folder": lambda root: touch(root.parent, "store/one/3.jpg"),
    "add in an empty folder": lambda root: touch(root, "empty/3.jpg"),
    "remove": lambda root: (root / "a/1.jpg").unlink(),
    "rename": lambda root: move(root / "a/1.jpg", root / "a/3.jpg"),
    "rename a class": lambda root: move(root / "b", root / "z"),
    "new class": lambda root: touch(root, "n/1.jpg"),
    "remove a class": lambda root: shutil.rmtree(root / "b"),
    "retarget": lambda root: retarget(root / "linked", root.parent / "store/two"),
    "retarget a link of a link": lambda root: retarget(root.parent / "store/now", root.parent / "store/two"),
    "a link to nowhere comes alive": lambda root: touch(root.parent, "store/late/9.jpg"),
    "another folder of that name": lambda root: (
        move(root, root.parent / "old"),
        touch(root, "a/9.jpg", "b/c/2.jpg"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(tmp_path, walks, change):
    touch(tmp_path / "store", "one/5.jpg", "two/6.jpg", "two/7.jpg")
    root = touch(tmp_path / "root", "a/1.jpg", "a/2.jpg", "b/c/2.jpg")
    (root / "empty").mkdir()
    (tmp_path / "store" / "now").symlink_to("one")
    (root / "linked").symlink_to(tmp_path / "store" / "one")
    (root / "twice").symlink_to(tmp_path / "store" / "now")
    (root / "late").symlink_to(tmp_path / "store" / "late")
    settle()
    open_index(root)
    before = open_index(root)
    old_names = names(before)
    assert sorted(old_names) == images(root) and len(walks) == 1
    CHANGES[change](root)
    settle()
    for _ in range(2):
        assert sorted(names(open_index(root))) == images(root) != sorted(old_names)
    assert len(walks) == 2
    assert names(before) == old_names  # who has the old one keeps it


def test_a_folder_that_has_just_changed_is_not_trusted(tmp_path, walks, monkeypatch):
    """Within one tick of the clock another change would leave the same time."""
    monkeypatch.setattr(walk_module, "CLOCK_TICK_NS", 3600 * 10**9)
    root = touch(tmp_path / "root", "a/1.jpg")
    for folder in (root, root / "a"):
        os.utime(folder, (10**9, 10**9))  # as tar does; the time of the change itself cannot be set
    open_index(root)
    open_index(root)
    assert len(walks) == 2


def test_folders_without_times_are_walked_every_time(tmp_path, walks, monkeypatch):
    root = touch(tmp_path / "root", "a/1.jpg")
    settle()
    stat = os.stat

    class Timeless:
        def __init__(self, path, **options):
            self.here = stat(path, **options)
            self.st_mtime_ns = self.st_ctime_ns = 0

        def __getattr__(self, name):
            return getattr(self.here, name)

    with monkeypatch.context() as patch:
        patch.setattr(walk_module.os, "stat", Timeless)
        open_index(root)
        open_index(root)
    assert len(walks) == 2


def flip(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data.replace(b"index 1", b"index 2"),
        lambda data: flip(data, data.index(b"\n") + 1),
        lambda data: flip(data, data.index(b"\n") + 6),
        lambda data: flip(data, data.index(b"fingerprint")),
        lambda data: flip(data, data.index(b"a/1.jpg")),
        lambda data: flip(data, len(data) - 1),
    ],
)
def test_a_damaged_or_foreign_file_is_replaced(tmp_path, walks, caplog, damage):
    root = touch(tmp_path / "root", "a/1.jpg", "b/2.jpg")
    settle()
    path = open_index(root).path
    intact = path.read_bytes()
    path.write_bytes(damage(intact))
    assert names(open_index(root)) == ["a/1.jpg", "b/2.jpg"] and len(walks) == 2
    assert path.read_bytes() == intact
    open_index(root)
    assert len(walks) == 2 and not caplog.records
