"""Layouts that become the same two splits, and how to see what `prepare` made and touched."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from dino_sparo.prepare import RECORD
from tests import imagenet_layouts as mini


def all_tars(folder: Path) -> None:
    mini.official_tars(folder)
    mini.devkit_archive(folder)


def class_tars_and_flat_val(folder: Path) -> None:
    mini.write(folder / "train", mini.class_tars() | {"notes.txt": b"", "n1.tar": b""})
    mini.write(folder / "val", mini.VAL)
    mini.devkit(folder)


def class_folders(folder: Path) -> None:
    mini.write_classes(folder / "train", mini.TRAIN)
    mini.write_classes(folder / "val", mini.SORTED_VAL)


def unpacked_with_solution(folder: Path) -> None:
    mini.unpacked(folder)
    mini.solution(folder)


LAYOUTS = {
    "class folders": class_folders,
    "Kaggle": mini.kaggle,
    "tars": all_tars,
    "class tars": class_tars_and_flat_val,
    "unpacked": unpacked_with_solution,
}


def images(split: Path) -> dict[str, dict[str, bytes]]:
    """Contents by class and file name, read through links; hidden files must be the record alone."""
    hidden = [path.name for path in split.rglob(".*")]
    assert hidden in ([], [RECORD])
    return {
        folder.name: {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in split.iterdir()
        if not folder.name.startswith(".")
    }


def state(folder: Path) -> dict[str, tuple]:
    """Whatever would change if a file or link below the folder were touched."""
    found = {}
    for path in sorted([folder, *folder.rglob("*")]):
        status = path.lstat()
        link = os.readlink(path) if path.is_symlink() else None
        found[str(path)] = (status.st_mode, status.st_ino, status.st_mtime_ns, status.st_size, link)
    return found


KILLED = """
import os, shutil, signal, sys
copy, calls = shutil.copyfileobj, []
def breaking(source, target):
    calls.append(1)
    if len(calls) == int(sys.argv[3]):
        target.write(source.read(100))
        target.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    copy(source, target)
shutil.copyfileobj = breaking
link = os.symlink
def breaking_link(target, path):
    calls.append(1)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    link(target, path)
os.symlink = breaking_link
from dino_sparo.prepare import prepare
prepare(sys.argv[1], sys.argv[2])
"""


def killed(source: Path, out: Path, image: int) -> None:
    """Prepare in a process that is killed while it makes an image, having written a part of it."""
    result = subprocess.run([sys.executable, "-c", KILLED, source, out, str(image)], check=False)
    assert result.returncode == -signal.SIGKILL
