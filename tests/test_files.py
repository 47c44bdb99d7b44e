"""Files are whole or not there; compiled code, which torch unpickles, comes from the user's own folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dino_sparo.files import COMPILED, atomic_write, keep_compiled_code, write_file

COMPILING = """
import torch
import torch._inductor.config  # as other libraries do
from dino_sparo.parallel.device import compiled
assert compiled(lambda x: x + 1)(torch.zeros(3)).tolist() == [1, 1, 1]
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DINO_SPARO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(COMPILED, "")  # as good as none, and what is set is undone
    return tmp_path / "cache"


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path):
    write_file(tmp_path / "x", "old")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "x") as file:
        file.write(b"new" * (1 // 0))
    assert (tmp_path / "x").read_text() == "old" and len([*tmp_path.iterdir()]) == 1


def test_halves_of_characters_which_json_can_hold_are_escaped(tmp_path):
    write_file(tmp_path / "x", "a\ud800ü")
    assert (tmp_path / "x").read_text() == "a\\ud800ü"


def test_an_error_of_the_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as raised, atomic_write(tmp_path / "x"):
        raise OSError(28, "No space left on device")  # as `write` does, without a name
    assert raised.value.filename == str(tmp_path / "x") and not [*tmp_path.iterdir()]


def test_a_name_that_is_almost_too_long(tmp_path):
    write_file(tmp_path / ("x" * 240), "new")
    name = "x" * 250
    with pytest.raises(OSError, match="name too long") as raised:
        write_file(tmp_path / name, "new")
    assert raised.value.filename == str(tmp_path / name)


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path):
    left, busy = (tmp_path / f"x[1].{name}.tmp" for name in ("left", "busy"))
    left.touch()
    os.utime(left, (1, 1))
    busy.touch()
    write_file(tmp_path / "x[1]", "new")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "x[1]", busy]


def test_compiled_code_is_kept_in_a_private_folder_below_the_cache(cache):
    keep_compiled_code()
    folder = Path(os.environ[COMPILED])
    assert folder.parent == cache and folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_the_users_choice_stays(cache, monkeypatch):
    monkeypatch.setenv(COMPILED, "mine")
    keep_compiled_code()
    assert os.environ[COMPILED] == "mine" and not cache.exists()


@pytest.mark.parametrize("trap", ["replaceable", "writable by all", "of another user", "a link"])
def test_what_others_can_have_written_is_not_used(trap, cache, tmp_path, monkeypatch, caplog):
    if trap == "of another user":
        another = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: another)
    elif trap == "replaceable":
        cache.mkdir()
        cache.chmod(0o777)
    else:
        keep_compiled_code()
        folder = Path(os.environ.pop(COMPILED))
        if trap == "a link":
            folder.rename(tmp_path / "elsewhere")
            folder.symlink_to(tmp_path / "elsewhere")
        else:
            folder.chmod(0o777)
        assert caplog.text == ""
    keep_compiled_code()
    assert "(other users can write to it)" in caplog.text
    used = Path(os.environ[COMPILED])
    assert not used.is_relative_to(cache) and used.stat().st_mode & 0o777 == 0o700


@pytest.mark.long  # compiles
def test_torch_takes_nothing_from_the_folder_that_anybody_can_make_nor_a_library_that_is_empty(
    cache, tmp_path
):
    """A killed process may leave one."""
    (tmp_path / "shared").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != COMPILED}
    environment["TMPDIR"] = str(tmp_path / "shared")
    command = [sys.executable, "-c", COMPILING]
    subprocess.run(command, env=environment, check=True)
    assert not [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]
    assert [*cache.glob("compiled-*/fxgraph/**/*")], "nothing was kept in the cache"
    libraries = [*cache.rglob("*.so")]
    for library in libraries:
        library.write_bytes(b"")
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stderr
    (broken,) = [library for library in libraries if f"{library}: file too short" in told]
    assert "it is removed and compiled again" in told and broken.stat().st_size
