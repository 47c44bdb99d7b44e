"""The index of a folder: where it lies, and what it costs."""

import io
import os
import pickle
import subprocess
import sys
import tempfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dino_sparo.data import index as index_module
from dino_sparo.data import walk as walk_module
from dino_sparo.data.index import open_index
from dino_sparo.errors import UserError
from tests.index_folders import count_walks, names, settle, touch


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DINO_SPARO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def walks(cache, monkeypatch) -> list[Path]:
    return count_walks(monkeypatch)


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
