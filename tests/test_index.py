"""The index of a folder: what is in it, when it is built anew, where it lies, and what it costs."""

import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dino_sparo.data import index as index_module
from dino_sparo.data import walk as walk_module
from dino_sparo.data.index import Index, open_index
from dino_sparo.data.sources import open_images, open_labeled
from dino_sparo.errors import UserError
from tests.shard_files import touch

TICK_SECONDS = 0.01


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DINO_SPARO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def walks(monkeypatch) -> list[Path]:
    """The walks that there are; the file system's clock is taken to be a fine one."""
    done = []
    monkeypatch.setattr(
        index_module, "walk", lambda root, *names: done.append(root) or walk_module.walk(root)
    )
    monkeypatch.setattr(walk_module, "CLOCK_TICK_NS", int(TICK_SECONDS * 1e9))
    return done


def settle() -> None:
    """Let what has changed be older than a tick."""
    time.sleep(3 * TICK_SECONDS)


def names(index: Index) -> list[str]:
    return [index.name(position) for position in range(len(index))]


# --- What is in it


def test_order_names_and_fingerprint_are_those_of_sorted_strings(tmp_path):
    """As plain strings sort: bytes of UTF-8 would put what is no UTF-8 behind all else."""
    files = ["1.jpg", "10.jpg", "2.jpg", "\udcff.jpg", "\uff21.jpg", "\U0001f600.jpg", "x/0.jpg"]
    files = [f"a/{name}" for name in files]
    files += ["a-b/1.jpg", "a/x-y/1.jpg", "a/x/y/1.jpg", "B/1.png", "é/1.jpg", "\udce9/1.jpg"]
    index = open_index(touch(tmp_path / "root", *files))

    def class_folder_name(file: str) -> tuple[str, str, str]:
        folder, _, name = file.rpartition("/")
        return folder.split("/")[0], folder, name

    expected = sorted(files, key=class_folder_name)
    assert names(index) == expected and index.name(-1) == expected[-1]
    assert index.classes == tuple(sorted({file.split("/")[0] for file in files}))
    assert [index.classes[label] for label in index.labels()] == [file.split("/")[0] for file in expected]
    packed = "\0".join(expected).encode("utf-8", "surrogateescape")
    assert index.fingerprint == hashlib.sha256(packed).hexdigest() == index.fingerprint_of(np.arange(13))
    some = "\0".join(expected[i] for i in (7, 0, 7)).encode("utf-8", "surrogateescape")
    assert index.fingerprint_of(np.array([7, 0, 7])) == hashlib.sha256(some).hexdigest()
    with pytest.raises(IndexError):
        index.name(13)


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a/1.jpg", "b/2.jpg")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(walk_module.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"/b: the folder cannot be read \(Permission denied\); change"):
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
    for link, target in {"d": "b", "nowhere": "missing", "text": "empty/notes.txt", "a/up": root}.items():
        (root / link).symlink_to(target)
    settle()
    first = open_index(root)
    for _ in range(2):
        assert names(open_index(root)) == names(first) == ["a/1.jpg", "b/c/2.jpg", "d/c/2.jpg"]
    (tmp_path / "link").symlink_to(root)
    assert names(open_index(tmp_path / "link")) == names(first)  # another name of the same folder
    (root / "a" / "1.jpg").write_bytes(b"another picture")
    assert names(open_index(root)) == names(first)
    assert len(walks) == 1


def test_training_and_evaluation_share_a_walk(tmp_path, walks):
    root = touch(tmp_path / "root", "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg")
    settle()
    open_images(str(root))
    open_labeled(str(root))
    assert walks == [root / "train", root / "val"]


def retarget(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)


CHANGES = {
    "add": lambda root: touch(root, "a/3.jpg"),
    "add below": lambda root: touch(root, "b/c/3.jpg"),
    "add in a linked folder": lambda root: touch(root.parent, "store/one/3.jpg"),
    "add in an empty folder": lambda root: touch(root, "empty/3.jpg"),
    "remove": lambda root: (root / "a/1.jpg").unlink(),
    "rename": lambda root: (root / "a/1.jpg").rename(root / "a/3.jpg"),
    "rename a class": lambda root: (root / "b").rename(root / "z"),
    "remove a class": lambda root: shutil.rmtree(root / "b"),
    "retarget a link of a link": lambda root: retarget(root.parent / "store/now", root.parent / "store/two"),
    "a link to nowhere comes alive": lambda root: touch(root.parent, "store/late/9.jpg"),
    "another folder of that name": lambda root: (
        root.rename(root.parent / "old"),
        touch(root, "a/9.jpg", "b/c/2.jpg"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(tmp_path, walks, change):
    store = touch(tmp_path / "store", "one/5.jpg", "two/6.jpg", "two/7.jpg")
    root = touch(tmp_path / "root", "a/1.jpg", "a/2.jpg", "b/c/2.jpg", "empty/x")
    (store / "now").symlink_to("one")
    for link, target in {"linked": "one", "twice": "now", "late": "late"}.items():
        (root / link).symlink_to(store / target)
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
        lambda data: data[:10],
        lambda data: data[:-1],
        lambda data: data.replace(b"index 1", b"index 2"),
        lambda data: flip(data, data.index(b"\n") + 6),
        lambda data: flip(data, data.index(b"fingerprint")),
        lambda data: flip(data, len(data) - 1),
    ],
)
def test_a_damaged_or_foreign_file_is_replaced(tmp_path, walks, caplog, damage):
    root = touch(tmp_path / "root", "a/1.jpg", "b/2.jpg")
    settle()
    path = open_index(root).path
    intact = path.read_bytes()
    path.write_bytes(damage(intact))
    for _ in range(2):
        assert names(open_index(root)) == ["a/1.jpg", "b/2.jpg"] and len(walks) == 2
    assert path.read_bytes() == intact and not caplog.records


# --- Where it lies


def test_places_in_order(tmp_path, monkeypatch):
    root = touch(tmp_path / "root", "a/1.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert open_index(root).path.parent == tmp_path / "cache"
    monkeypatch.setenv("DINO_SPARO_CACHE", "")
    assert open_index(root).path.parent == tmp_path / "xdg" / "dino_sparo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert open_index(root).path.parent == tmp_path / "home" / ".cache" / "dino_sparo"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and entry in passwd
    assert tmp_path / "temporary" in open_index(root).path.parents and not (tmp_path / "~").exists()


@pytest.fixture
def unwritable(tmp_path, monkeypatch) -> Path:
    """A chosen place where nothing can be written, and temporary files of the test's own."""
    touch(tmp_path, "file", "temporary/x")
    monkeypatch.setenv("DINO_SPARO_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def test_unwritable_place_is_said_once(tmp_path, walks, unwritable, caplog):
    root = touch(tmp_path / "root", "a/1.jpg")
    spare = unwritable / f"dino_sparo-{os.getuid()}"
    settle()
    for _ in range(2):
        assert open_index(root).path.parent == spare
    assert len(walks) == len(caplog.records) == 1
    assert f"in {spare}, since it cannot be stored in {tmp_path}/file/cache (Not a directory)" in caplog.text
    assert spare.stat().st_mode & 0o777 == 0o700


def test_temporary_index_of_another_user_is_not_read(tmp_path, walks, unwritable, monkeypatch):
    root = touch(tmp_path / "root", "a/1.jpg")
    settle()
    theirs = open_index(root).path.parent
    somebody = os.getuid() + 1
    theirs.rename(unwritable / f"dino_sparo-{somebody}")
    monkeypatch.setattr(index_module.os, "getuid", lambda: somebody)
    open_index(root)
    assert len(walks) == 2


def test_no_place_at_all(tmp_path, unwritable):
    root = touch(tmp_path / "root", "a/1.jpg")
    touch(unwritable, f"dino_sparo-{os.getuid()}")
    with pytest.raises(UserError, match=r"in .*file/cache .* nor in .*; set DINO_SPARO_CACHE to .* 0\.0 MB"):
        open_index(root)


def test_several_at_once_get_the_same(tmp_path, walks, cache):
    root = touch(tmp_path / "root", *(f"{i % 7}/{i}.jpg" for i in range(100)))
    settle()
    with ThreadPoolExecutor(8) as pool:
        indices = list(pool.map(open_index, [root] * 8))
    assert all(names(index) == names(indices[0]) for index in indices) and len(indices[0]) == 100
    assert len(list(cache.iterdir())) == 1
    count = len(walks)
    open_index(root)
    assert len(walks) == count


# --- What it costs


def test_a_pickle_is_small_and_opens_the_same_in_another_process(tmp_path, walks):
    root = touch(tmp_path / "root", *(f"a/{i:04}.jpg" for i in range(100)))
    index = open_index(root)
    stored = pickle.dumps(index)
    assert len(stored) < 500
    program = "import pickle, sys; index = pickle.load(sys.stdin.buffer); print(len(index), index.name(50))"
    done = subprocess.run([sys.executable, "-c", program], input=stored, capture_output=True, check=True)
    assert done.stdout == b"100 a/0050.jpg\n"
    touch(root, "a/new.jpg")
    open_index(root)
    with pytest.raises(UserError, match="removed or replaced while it was in use"):
        pickle.loads(stored)


def test_a_kept_index_costs_next_to_nothing(tmp_path, walks):
    root = touch(tmp_path / "root", *(f"class{i % 10}/{i:06}.jpg" for i in range(2000)))
    settle()
    in_a_list = sum(map(sys.getsizeof, names(open_index(root))))
    tracemalloc.start()
    index = open_index(root)
    for position in range(len(index)):
        index.name(position)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(walks) == 1 and in_a_list > 120_000
    assert kept < in_a_list / 10


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_long_walk_says_how_far_it_is(tmp_path, monkeypatch, caplog, is_terminal):
    caplog.set_level("INFO", logger="dino_sparo")
    terminal = io.StringIO()
    terminal.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", terminal)
    root = touch(tmp_path / "root", "a/1.jpg", "b/2.jpg", "b/3.jpg")
    open_index(root)
    assert not caplog.records
    monkeypatch.setattr(walk_module, "SLOW_SECONDS", 0.0)
    touch(root, "b/4.jpg")
    open_index(root)
    said = terminal.getvalue() if is_terminal else caplog.text
    assert f"indexing {root}: " in said and " images" in said
    assert is_terminal != bool(caplog.records)


def test_a_folder_whose_name_this_locale_cannot_write_is_none():
    assert walk_module.state_now("\ud800/") == walk_module.NO_FOLDER
