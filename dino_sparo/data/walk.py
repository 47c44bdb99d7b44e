"""The walk over the folders below a root, to find images, and to detect changes later."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from dino_sparo.errors import UserError
from dino_sparo.terminal import log, shown, shows_bars

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# How names of hidden files begin, and of thumbnails, copies, and deleted files on file servers and Windows.
HIDDEN = (".", "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "$RECYCLE.BIN")
PROBED_ENTRIES = 64  # entries that are listed to see what a folder contains, which may be a million images
PROBED_BELOW = 8  # folders
SHOWN_ENDINGS = 4
THREADS = 8  # a network file system answers many requests in the time of one
FOLDERS_AT_ONCE = 8 * THREADS  # few, so that an interrupted walk ends soon
SLOW_SECONDS = 5.0  # a walk that takes longer logs its progress

# A folder when it was read: inode, last change of the content and last change of any kind in ns.
State = tuple[int, int, int]
NO_FOLDER: State = (0, 0, 0)
DISTRUSTED: State = (0, 0, 1)  # equals the state of no folder
# Two changes within one tick of a file system's clock have the same time; the coarsest tick in use is 2 s.
CLOCK_TICK_NS = 2 * 10**9

# A folder still to be read: its path from the root as `Folder.below`, device and inode of those above it.
Unread = tuple[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class Folder:
    """A folder as it was read: its path from the root ("" or ending in /), and the paths of its images from
    the root, in order and joined by NUL."""

    below: str
    state: State
    num_images: int = 0
    names: bytes = b""
    others: Counter[str] = field(default_factory=Counter)
    """Number of other files by ending."""

    @property
    def top(self) -> str:
        """The folder in the root that it is in, or is; empty for the root."""
        return self.below.partition("/")[0]


def is_image(name: str) -> bool:
    """Whether a file with this name counts as an image."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(HIDDEN)


def named_by_ending(others: Mapping[str, int], limit: int = SHOWN_ENDINGS) -> str:
    """Numbers of files by ending, most frequent first: 2 ending in .gif, 1 without an ending."""
    most = sorted(others.items(), key=lambda one: (-one[1], one[0]))
    named = [
        f"{number:,} {f'ending in {shown(end)}' if end else 'without an ending'}"
        for end, number in most[:limit]
    ]
    more = len(most) - limit
    return ", ".join([*named, *([f"and {more} more endings"] if more > 0 else [])])


def list_folder(folder: Path, limit: int | None = None) -> tuple[list[str], list[str]]:
    """Names of the folders and files in the first `limit` entries of a folder, without hidden ones.

    Empty if there is no such folder.

    Raises:
        UserError: the folder cannot be read.
    """
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, limit):
                if not entry.name.startswith(HIDDEN):
                    (folders if _is_folder(entry) else files).append(entry.name)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _unreadable(folder, error) from error
    return folders, files


def holds(folder: Path, wanted: Callable[[str], bool] = is_image, levels: int = 2) -> bool:
    """Whether `found_below` finds anything."""
    return next(found_below(folder, wanted, levels), None) is not None


def found_below(
    folder: Path, wanted: Callable[[str], bool] = is_image, levels: int = 2, below: str = ""
) -> Iterator[str]:
    """Paths, from a folder, of images (or `wanted` files) among its first entries and those of its first
    folders, down to `levels`."""
    folders, files = list_folder(folder / below, PROBED_ENTRIES)
    yield from (f"{below}{name}" for name in files if wanted(name))
    for name in sorted(folders)[:PROBED_BELOW] if levels > 0 else ():
        yield from found_below(folder, wanted, levels - 1, f"{below}{name}/")


def walk(root: Path, names: Sequence[str] = ()) -> list[Folder]:
    """All folders below `root`, or these in it, level by level, without hidden ones and loops of links.

    A bar on a terminal, or else lines in the log, show the progress.
    """
    read = partial(_read_folder, root, time.time_ns())
    folders: list[Folder] = []
    level: list[Unread] = [(f"{name}/", ()) for name in names] or [("", ())]
    started, next_line = time.monotonic(), SLOW_SECONDS
    form = "{desc}: {n_fmt}{unit} [{elapsed}, {rate_fmt}]"
    bar = tqdm(
        desc=f"indexing {root}", unit=" images", bar_format=form, leave=False, disable=not shows_bars()
    )
    num_images = 0
    with ThreadPoolExecutor(THREADS) as pool, bar:
        while level:
            deeper: list[Unread] = []
            for first in range(0, len(level), FOLDERS_AT_ONCE):
                for found, inner in pool.map(read, level[first : first + FOLDERS_AT_ONCE]):
                    folders += found
                    deeper += inner
                    num_images += found[0].num_images
                    bar.update(found[0].num_images)
                elapsed = time.monotonic() - started
                if bar.disable and elapsed > next_line:
                    next_line = 2 * elapsed
                    log.info("indexing %s: %d images in %.0f s", root, num_images, elapsed)
            level = deeper
    return folders


def _read_folder(root: Path, started_ns: int, unread: Unread) -> tuple[list[Folder], list[Unread]]:
    """The folder, with its broken links, which may become folders; and the folders to read next."""
    below, ancestors = unread
    names: list[str] = []
    nowhere: list[Folder] = []
    inner: list[Unread] = []
    others: Counter[str] = Counter()
    try:
        here = os.stat(root / below)  # before listing, so that a change in between is detected next time
        identity = (here.st_dev, here.st_ino)
        for entry in os.scandir(root / below) if identity not in ancestors else ():
            if entry.name.startswith(HIDDEN):
                continue
            if _is_folder(entry):
                inner.append((f"{below}{entry.name}/", (*ancestors, identity)))
            elif entry.name.lower().endswith(EXTENSIONS):  # `is_image` of a name that is not hidden
                names.append(entry.name)
            elif entry.is_symlink():
                nowhere.append(Folder(f"{below}{entry.name}/", NO_FOLDER))
            else:
                others[os.path.splitext(entry.name)[1].lower()] += 1
    except OSError as error:
        raise _unreadable(root / below, error) from error
    packed = "\0".join(below + name for name in sorted(names)).encode("utf-8", "surrogateescape")
    trusted = 0 < max(here.st_mtime_ns, here.st_ctime_ns) < started_ns - CLOCK_TICK_NS
    state = _state(here) if trusted else DISTRUSTED
    return [Folder(below, state, len(names), packed, others), *nowhere], inner


def _unreadable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: the folder cannot be read ({error.strerror}); change its permissions")


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _state(here: os.stat_result) -> State:
    # No device number, since machines that share an index have different ones for a network file system.
    return here.st_ino, here.st_mtime_ns % 2**64, here.st_ctime_ns % 2**64


def state_now(path: str) -> State:
    """The state of a folder, whose path ends in /; NO_FOLDER if there is none."""
    try:
        return _state(os.stat(path))
    except (OSError, UnicodeError):  # also for a file, because of the /, and for a name of another locale
        return NO_FOLDER
