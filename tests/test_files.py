"""Folders of the user's own: compiled code, which torch unpickles, comes from nowhere else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dino_sparo.files import COMPILED, keep_compiled_code

COMPILING = """
import torch
import torch._inductor.config  # as other libraries do
from dino_sparo.device import compiled
assert compiled(lambda x: x + 1)(torch.zeros(3)).tolist() == [1, 1, 1]
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DINO_SPARO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(COMPILED, raising=False)
    return tmp_path / "cache"


def test_compiled_code_is_kept_in_a_private_folder_below_the_cache(cache):
    keep_compiled_code()
    folder = Path(os.environ[COMPILED])
    assert folder.parent == cache and folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_the_users_choice_stays(cache, monkeypatch):
    monkeypatch.setenv(COMPILED, "mine")
    keep_compiled_code()
    assert os.environ[COMPILED] == "mine" and not cache.exists()


@pytest.mark.parametrize("trap", ["writable by all", "of another user", "a link"])
def test_what_others_can_have_written_is_not_used(trap, cache, tmp_path, monkeypatch, caplog):
    if trap == "of another user":
        another = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: another)
    keep_compiled_code()
    if trap == "of another user":
        assert "somebody else can write it" in caplog.text
    else:
        folder = Path(os.environ.pop(COMPILED))
        assert caplog.text == ""
        if trap == "a link":
            folder.rename(tmp_path / "elsewhere")
            folder.symlink_to(tmp_path / "elsewhere")
        else:
            folder.chmod(0o777)
        keep_compiled_code()
        assert f"{folder}: compiled code cannot be kept there (somebody else can write it)" in caplog.text
    used = Path(os.environ[COMPILED])
    assert not used.is_relative_to(cache) and used.stat().st_mode & 0o777 == 0o700


@pytest.mark.long  # compiles
def test_torch_takes_nothing_from_the_folder_that_anybody_can_make(cache, tmp_path):
    (tmp_path / "shared").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "shared")}
    subprocess.run([sys.executable, "-c", COMPILING], env=environment, check=True)
    assert not [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]
    assert [*cache.glob("compiled-*/fxgraph/**/*")], "nothing was kept in the cache"
