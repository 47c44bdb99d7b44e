"""Files that are whole or not there, and folders of the user's own: caches that nobody else may write."""

import atexit
import errno
import glob
import hashlib
import json
import logging
import os
import platform
import shutil
import stat
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from dino_sparo.errors import UserError

log = logging.getLogger("dino_sparo")

COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # environment variable; torch sets it too, when its compiler is imported
ABANDONED_SECONDS = 3600.0  # after which a temporary file belongs to a process that was killed
MOST_LINE = 2**24  # bytes of a line of JSON; the longest are bad steps, which name the images of a batch
OF_TORCH = "torchinductor_"  # followed by the user's name, the folder that torch chooses


@contextmanager
def named(path: Path, instead_of: Path | None = None) -> Iterator[None]:
    """Name a file in an error of the system that names none, as that of a full disk, or names another one."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(instead_of)):
            error.filename = str(path)
        raise


@contextmanager
def atomic_write(path: Path, temporary: Path | None = None, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends well: a reader sees the old file or the new one.

    After an error nothing stays behind; after a kill the temporary file does, and a later write of the same
    path removes it.

    Args:
        path: in a folder that exists.
        temporary: name until then, where only one process writes; None takes one that no other process has.
        durable: flush the content to disk before the file gets its name.

    Raises:
        OSError: it cannot be written; `filename` is set.
    """
    if temporary is None:
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            with suppress(OSError):  # another process has removed it
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    left.unlink()
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with named(path, instead_of=temporary):
            with open(temporary, "w+b") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a whole file by `atomic_write`, text as UTF-8. Raises OSError."""
    with atomic_write(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def open_regular(path: str | Path, buffering: int = -1) -> BinaryIO:
    """A regular file, open for reading, at once: a pipe would make its reader wait, a device may never end.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    file = open(  # noqa: SIM115
        path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return file


def read_small(path: Path, most: int) -> bytes:
    """The content of a regular file of at most so many bytes. Raises UserError, OSError."""
    if path.exists() and not path.is_file():  # reading a pipe would wait, a device may never end
        raise UserError(f"{path} is no regular file; give another")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(
            f"{path} is larger than {most:,} bytes, too large for what it should hold; give another"
        )
    return content


def parsed_json(text: str | bytes) -> Any:
    """What JSON text holds. Raises ValueError, also for text that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def append_line(path: Path, entry: Mapping[str, object]) -> None:
    """Add an object to a file of JSON lines. Raises OSError."""
    with named(path), open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


def read_lines(path: Path, is_whole: Callable[[dict[str, Any]], bool] = bool) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines, one after the other; none without the file.

    Lines that are damaged, or not whole by that rule, are passed over, and a warning tells how many.
    """
    damaged = 0
    for entry in _lines(path, is_whole):
        if entry:
            yield entry
        else:
            damaged += 1
    if damaged:
        log.warning("WARNING: %s: %s", path, _told(path, damaged))


def clean_lines(
    path: Path,
    is_whole: Callable[[dict[str, Any]], bool] = bool,
    keep: Callable[[dict[str, Any]], bool] | None = None,
) -> None:
    """Write a file of JSON lines anew with those that are whole and to be kept; for its only writer.

    A file with damaged lines is set aside before. Without those, and without `keep`, nothing is written.

    Raises:
        OSError: it cannot be written.
    """
    if keep is None and all(_lines(path, is_whole)):
        return
    damaged = 0
    with atomic_write(path) as file:
        for entry in _lines(path, is_whole):
            damaged += not entry
            if entry and (keep is None or keep(entry)):
                file.write(f"{json.dumps(entry)}\n".encode())
        if damaged:
            set_aside(path, _told(path, damaged))


def _lines(path: Path, is_whole: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any] | None]:
    """The objects of a file of JSON lines; None for what is none."""
    if not path.is_file():
        yield from [None] * path.exists()
        return
    with open(path, "rb") as file:
        for line in iter(partial(file.readline, MOST_LINE), b""):
            entry = None
            with suppress(ValueError):
                entry = parsed_json(line)
            yield entry if isinstance(entry, dict) and is_whole(entry) else None


def _told(path: Path, damaged: int) -> str:
    lines = f"{damaged} of its lines cannot be read, the others are kept"
    return lines if path.is_file() else "it is no regular file"


def set_aside(path: Path, reason: str = "it is no regular file") -> None:
    """Rename what this program has written and cannot read: NAME.damaged, or NAME.damaged-2, and so on.

    Raises:
        OSError: it cannot be renamed.
    """
    names = (f"{path.name}.damaged{f'-{number}' if number > 1 else ''}" for number in count(1))
    aside = next(name for name in names if not os.path.lexists(path.with_name(name)))
    os.rename(path, path.with_name(aside))
    log.warning("WARNING: %s: %s; it is set aside as %s", path, reason, aside)


def cache_folder() -> Path:
    """Where indexes, compiled code and downloaded sets are kept; it need not exist."""
    of_user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if of_user.startswith("~"):  # a user without a home
        of_user = str(temporary_folder())
    return Path(os.environ.get("DINO_SPARO_CACHE") or os.path.join(of_user, "dino_sparo"))


def temporary_folder() -> Path:
    """The user's own folder among the temporary files; it need not exist, and anybody can have made it."""
    return Path(tempfile.gettempdir()) / f"dino_sparo-{os.getuid()}"


def keep_compiled_code() -> None:
    """Let `torch.compile` keep its code below the cache, in a folder that only this user can write.

    Torch itself would take a folder of a predictable name among the temporary files, and unpickle what
    somebody else has put there. Processors have folders of their own, since the code is made for one. Where
    there can be no such folder, this process and those that it starts use one that is removed at the end. A
    folder of the user's choice in $TORCHINDUCTOR_CACHE_DIR stays.
    """
    given = Path(os.environ.get(COMPILED, ""))
    if given.name and not (given.parent == Path(tempfile.gettempdir()) and given.name.startswith(OF_TORCH)):
        return
    folder = cache_folder() / f"compiled-{os.getuid()}-{_processor()}"
    reason = None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(folder):
            reason = "somebody else can write it"
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = "it cannot be written"
    except OSError as error:
        reason = str(error.strerror)
    if reason is not None:
        log.warning(
            "%s: compiled code cannot be kept there (%s) and is compiled at each start; %s can name a folder",
            *(folder, reason, COMPILED),
        )
        folder = Path(tempfile.mkdtemp(prefix="dino_sparo-compiled-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[COMPILED] = str(folder)


def can_build_c() -> bool:
    """Whether there are a C compiler and Python's headers, which code for a GPU needs when it is compiled."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    return any(map(shutil.which, compilers)) and Path(sysconfig.get_path("include"), "Python.h").exists()


def _is_private(folder: Path) -> bool:
    """Whether a folder, no link, is this user's alone, and nobody else can put another one in its place.

    Folders above it may belong to root, and be writable by all if they are sticky as /tmp is.
    """
    own, state = os.getuid(), folder.lstat()
    parent = folder.parent.resolve()
    above = [one.stat() for one in (parent, *parent.parents)]
    return (
        stat.S_ISDIR(state.st_mode)
        and state.st_uid == own
        and not state.st_mode & 0o022
        and all(one.st_uid in (0, own) for one in above)
        and all(one.st_mode & stat.S_ISVTX or not one.st_mode & stat.S_IWOTH for one in above)
    )


def _processor() -> str:
    """Eight hexadecimal digits that differ between processors of different instructions."""
    told = {platform.machine()}
    with suppress(OSError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told |= {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}
    return hashlib.sha256("\n".join(sorted(told)).encode()).hexdigest()[:8]
