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

from dino_sparo.bench_index import bench_index
from dino_sparo.data import index as index_module
from dino_sparo.data import walk as walk_module
from dino_sparo.data.index import FolderIndex, open_index
from dino_sparo.data.sources import open_images, open_labelled
from dino_sparo.errors import UserError

TICK_SECONDS = 0.01


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DINO_SPARO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def walks(cache, monkeypatch) -> list[Path]:
    """The walks that there have been; the file system's clock is taken to be a fine one."""
    done = []

    def counted(root: Path) -> list:
        done.append(root)
        return walk_module.walk(root)

    monkeypatch.setattr(index_module, "walk", counted)
    monkeypatch.setattr(walk_module, "CLOCK_TICK_NS", int(TICK_SECONDS * 1e9))
    return done


def settle() -> None:
    """Let what has changed be older than a tick."""
    time.sleep(3 * TICK_SECONDS)


def touch(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def names(index: FolderIndex) -> list[str]:
    return [index.name(position) for position in range(len(index))]


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


# --- Where it lies


def test_places_in_order(tmp_path, monkeypatch):
    root = touch(tmp_path / "root", "a/1.jpg")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("DINO_SPARO_CACHE", str(tmp_path / "chosen"))
    assert open_index(root).path.parent == tmp_path / "chosen"
    monkeypatch.setenv("DINO_SPARO_CACHE", "")
    assert open_index(root).path.parent == tmp_path / "xdg" / "dino_sparo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert open_index(root).path.parent == tmp_path / "home" / ".cache" / "dino_sparo"


@pytest.fixture
def unwritable(tmp_path, monkeypatch) -> Path:
    """A chosen place where nothing can be written, and temporary files of the test's own."""
    touch(tmp_path, "file")
    (tmp_path / "temporary").mkdir()
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
    assert "file/cache: the index of the images cannot be kept there (Not a directory)" in caplog.text
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
    (unwritable / f"dino_sparo-{os.getuid()}").touch()
    with pytest.raises(UserError, match=r"file/cache: .*nor in .*; set DINO_SPARO_CACHE to a folder"):
        open_index(root)


def test_a_failed_write_leaves_nothing(tmp_path, cache, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(index_module.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left .* room for 0\.0 MB"):
        open_index(touch(tmp_path / "root", "a/1.jpg"))
    assert list(cache.iterdir()) == []


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
    with pytest.raises(UserError, match="another one by now"):
        pickle.loads(stored)
    index.path.unlink()
    with pytest.raises(UserError, match="gone or another one"):
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


def test_a_long_walk_says_how_far_it_is(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="dino_sparo")
    root = touch(tmp_path / "root", "a/1.jpg", "b/2.jpg", "b/3.jpg")
    open_index(root)
    assert not caplog.records
    monkeypatch.setattr(walk_module, "SLOW_SECONDS", 0.0)
    open_index(root)
    assert f"indexing {root}: " in caplog.text and " images in " in caplog.text


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="dino_sparo")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(walk_module, "SLOW_SECONDS", 0.0)
    root = touch(tmp_path / "root", "a/1.jpg", "b/2.jpg", "b/3.jpg")
    open_index(root)
    assert f"indexing {root}: 0 images" in terminal.getvalue() and not caplog.records


@pytest.mark.long
def test_benchmark_prints_its_table_and_removes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bench_index(num_files=20_000, ranks=2, workers=2)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.lstrip()[:1].isdigit()]
    assert [int(row[0]) for row in rows] == [2000, 10_000, 20_000]
    for column in (3, 4):  # the index file and a list of the names
        sizes = [float(row[column]) for row in rows]
        assert sizes[0] < sizes[1] < sizes[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_files": 9}, "index_files is 9"),
        ({"ranks": 0}, "index_processes is 0"),
        ({"workers": 0}, "index_workers is 0"),
    ],
)
def test_benchmark_refuses_numbers_too_small(wrong, message):
    with pytest.raises(UserError, match=f"^{message}, expected"):
        bench_index(**{"num_files": 10, "ranks": 1, "workers": 1, **wrong})


def test_a_user_without_a_home_gets_no_folder_named_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("DINO_SPARO_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and entry in passwd
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    root = touch(tmp_path / "root", "a/1.jpg")
    assert str(tmp_path / "temporary") in str(open_index(root).path)
    assert not (tmp_path / "~").exists()


def test_what_killed_writers_have_left_is_removed_after_an_hour(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_SPARO_CACHE", str(tmp_path / "cache"))
    root = touch(tmp_path / "root", "a/1.jpg")
    path = open_index(root).path
    old, new = (path.with_name(f"{path.name}.{name}.tmp") for name in ("old", "new"))
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    path.unlink()
    open_index(root)
    assert not old.exists() and new.exists() and path.exists()
