"""The walk over the folders below a root: which images there are, and how to see later that none has come."""

import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dino_sparo.errors import UserError
from dino_sparo.terminal import shows_bars

log = logging.getLogger("dino_sparo")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
THREADS = 8  # a network file system answers many questions in the time of one
FOLDERS_AT_ONCE = 8 * THREADS  # so few that an interrupted walk ends soon
IMAGES_A_REPORT = 10_000
SLOW_SECONDS = 5.0  # a walk that takes longer says how far it is

# A folder when it was read: inode, last change of the content and last change of any kind in ns.
State = tuple[int, int, int]
NO_FOLDER: State = (0, 0, 0)
DISTRUSTED: State = (0, 0, 1)  # no folder's
# Two changes within one tick of a file system's clock leave the same time; the coarsest tick in use is 2 s.
CLOCK_TICK_NS = 2 * 10**9


@dataclass(frozen=True)
class Folder:
    """A folder as it was read: its path from the root, "" or with / at its end, and the names of its images,
    from the root too, in order and joined by NUL."""

    below: str
    state: State
    num_images: int = 0
    names: bytes = b""


@dataclass(frozen=True)
class _Unread:
    """A folder still to be read, with device and inode of those above it."""

    below: str
    ancestors: tuple[tuple[int, int], ...] = ()


class _Progress:
    """How far a walk is: a bar on a terminal, else a line in the log now and then."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.num_images, self.started, self.next_line = 0, time.monotonic(), SLOW_SECONDS
        self.lock = threading.Lock()
        self.bar = tqdm(
            desc=f"indexing {root}",
            unit=" images",
            bar_format="{desc}: {n_fmt}{unit} [{elapsed}, {rate_fmt}]",
            leave=False,
            disable=not shows_bars(),
        )

    def add(self, num_images: int) -> None:
        """Count images, from any thread."""
        with self.lock:
            self.num_images += num_images
            self.bar.update(num_images)
            elapsed = time.monotonic() - self.started
            if self.bar.disable and elapsed > self.next_line:
                self.next_line = 2 * elapsed
                log.info("indexing %s: %d images in %.0f s", self.root, self.num_images, elapsed)


def walk(root: Path) -> list[Folder]:
    """All folders below `root`, level by level; hidden ones ignored, looping links not followed."""
    progress = _Progress(root)
    read = partial(_read_folder, root, progress, time.time_ns())
    folders, level = [], [_Unread("")]
    with ThreadPoolExecutor(THREADS) as pool, progress.bar:
        while level:
            deeper: list[_Unread] = []
            for first in range(0, len(level), FOLDERS_AT_ONCE):
                for found, inner in pool.map(read, level[first : first + FOLDERS_AT_ONCE]):
                    folders += found
                    deeper += inner
            level = deeper
    return folders


def _read_folder(
    root: Path, progress: _Progress, started_ns: int, unread: _Unread
) -> tuple[list[Folder], list[_Unread]]:
    """The folder, with links to nowhere in it, which may become folders; and the folders to read next."""
    below, path = unread.below, os.path.join(root, unread.below)
    names: list[str] = []
    nowhere: list[Folder] = []
    inner: list[_Unread] = []
    try:
        here = os.stat(path)  # before the list: a change between the two is seen the next time
        identity = (here.st_dev, here.st_ino)
        if identity not in unread.ancestors:
            for entry in os.scandir(path):
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    inner.append(_Unread(f"{below}{entry.name}/", (*unread.ancestors, identity)))
                elif entry.name.lower().endswith(EXTENSIONS):
                    names.append(entry.name)
                    if len(names) % IMAGES_A_REPORT == 0:
                        progress.add(IMAGES_A_REPORT)
                elif entry.is_symlink():
                    nowhere.append(Folder(f"{below}{entry.name}/", NO_FOLDER))
    except OSError as error:
        raise UserError(
            f"{root / below}: the folder cannot be read ({error.strerror}); repair or remove it"
        ) from error
    progress.add(len(names) % IMAGES_A_REPORT)
    packed = "\0".join(below + name for name in sorted(names)).encode("utf-8", "surrogateescape")
    trusted = 0 < max(here.st_mtime_ns, here.st_ctime_ns) < started_ns - CLOCK_TICK_NS
    return [Folder(below, _state(here) if trusted else DISTRUSTED, len(names), packed), *nowhere], inner


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _state(here: os.stat_result) -> State:
    # No device number: that of a network file system differs between machines that share one index.
    return here.st_ino, here.st_mtime_ns % 2**64, here.st_ctime_ns % 2**64


def state_now(path: str) -> State:
    """The state of a folder, its path ending in /; NO_FOLDER if there is none."""
    try:
        return _state(os.stat(path))
    except OSError:  # also for a file, because of the /
        return NO_FOLDER
