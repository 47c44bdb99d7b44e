"""Folders of empty files, the names in their index, and how often they are walked."""

import time
from pathlib import Path

from dino_sparo.data import index as index_module
from dino_sparo.data import walk as walk_module
from dino_sparo.data.index import FolderIndex

TICK_SECONDS = 0.01


def count_walks(monkeypatch) -> list[Path]:
    """The walks that there will be; the file system's clock is taken to be a fine one."""
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
