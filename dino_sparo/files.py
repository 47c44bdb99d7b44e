"""Atomic writes, locks, JSON lines, and cache folders that only this user can write."""

import atexit
import difflib
import errno
import fcntl
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
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

from dino_sparo.errors import UserError

log = logging.getLogger("dino_sparo")

COMPILED = "TORCHINDUCTOR_CACHE_DIR"  # environment variable; importing torch's compiler sets it too
ABANDONED_SECONDS = 3600.0  # an older temporary file was left by a killed process
MOST_JSON = 2**27  # bytes of a file of JSON; the largest are results, 10 kB for 50,000 images
MOST_LINE = 2**24  # bytes per line of JSON; the longest lines name all images of a batch
MOST_NAMES = 1000  # names in a folder that are compared with a mistyped one
LOCK_OF_FILES = ".lock_files"
OF_TORCH = "torchinductor_"  # torch's default folder is this followed by the user name


@contextmanager
def named(path: Path, instead_of: Path | None = None) -> Iterator[None]:
    """Set `filename` of an OSError that has none (such as a full disk) or that names `instead_of`."""
    try:
        yield
    except OSError as error:
        if error.filename in (None, str(instead_of)):
            error.filename = str(path)
        raise


def existing_part(path: Path) -> Path:
    """The path, or the first of the folders that contain it that exists."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def is_writable(folder: Path) -> bool:
    """Whether files can be made there, as far as the system tells; the folder need not exist."""
    return os.access(existing_part(folder), os.W_OK | os.X_OK)


def check_space(folder: Path, needed: int, what: str, spare: int = 0) -> None:
    """Raises UserError if the disk of a folder, which need not exist, has less than `needed` bytes free.

    Args:
        what: who needs them, for the message.
        spare: bytes of files that will be overwritten.
    """
    free = shutil.disk_usage(existing_part(folder)).free + spare
    if needed > free:
        raise UserError(
            f"{what} {needed} bytes ({needed / 2**30:.2f} GiB), but only {free} ({free / 2**30:.2f} GiB) are "
            f"free there; free some space or use another disk, then run again"
        )


@contextmanager
def read_as(what: str, remedy: str) -> Iterator[None]:
    """Turn errors about the content of a file into one sentence: `what` is wrong, the reason, and the remedy.

    What another program wrote may raise anything.

    Raises:
        UserError: for any error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
        reason = f"it has no {error}" if isinstance(error, KeyError) else reason or type(error).__name__
        raise UserError(f"{what} ({reason}); {remedy}") from error


@contextmanager
def atomic_write(path: Path, temporary: Path | None = None, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that is renamed to `path` when the block ends without an error.

    A reader sees the old file or the new one. A killed process leaves its temporary file behind; the next
    write to the same path removes it after an hour.

    Args:
        path: its folder must exist.
        temporary: temporary name, if only one process writes; None: a unique name.
        durable: flush the content to disk before the file is renamed.

    Raises:
        OSError: the file cannot be written; `filename` is set.
    """
    if temporary is None:
        for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
            with suppress(OSError):  # another process may have removed it
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    left.unlink()
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with named(path, instead_of=temporary):
            with open(temporary, "w+b") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib as a PNG file with `atomic_write`. Raises OSError."""
    with atomic_write(path, durable=False) as file:
        figure.savefig(file, dpi=110, format="png")


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file with `atomic_write`, text as UTF-8 with lone surrogates escaped. Raises OSError."""
    with atomic_write(path) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextmanager
def alone_in(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Lock a folder by a hidden file in it; on a file system without locks, only log that there are none.

    The folder itself is not locked, because on NFS other machines would not notice.

    Raises:
        UserError: another process holds the lock of an output folder, and `wait` is false.
        OSError: the folder cannot be written.
    """
    with open(folder / LOCK_OF_FILES, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(
                f"--out {str(folder)!r}: another process writes to it; wait until it ends"
            ) from error
        except OSError:
            log.info(
                "%s: the file system has no locks; run only one program at a time in this folder", folder
            )
        yield


def did_you_mean(path: Path) -> str:
    """A suggestion in parentheses: the name beside a missing file or folder that is most similar."""
    with suppress(OSError):
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in islice(entries, MOST_NAMES)]
        near = difflib.get_close_matches(path.name, names, n=1)
        return f" (did you mean {str(path.parent / near[0])!r}?)" if near else ""
    return ""


def open_regular(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading, without blocking on a pipe or reading a device without end.

    Raises:
        OSError: the path is not a regular file, or cannot be opened.
    """
    file = open(  # noqa: SIM115
        path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
    )
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def read_small(path: Path, most: int) -> bytes:
    """Read a regular file of at most `most` bytes. Raises UserError, OSError."""
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise UserError(f"{path} is not a regular file; give another path")
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} has more than {most:,} bytes, too many for such a file; give another path")
    return content


def parsed_json(text: str | bytes | Path) -> Any:
    """Parse JSON text, or a file of it.

    Raises:
        ValueError: not JSON, or nested too deeply.
        UserError, OSError: the file is not a regular file, is too large, or cannot be read.
    """
    text = read_small(text, MOST_JSON) if isinstance(text, Path) else text
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def append_line(path: Path, entry: Mapping[str, object]) -> None:
    """Append an object to a file of JSON lines. Raises OSError."""
    with named(path), open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


def read_lines(path: Path, is_whole: Callable[[dict[str, Any]], bool] = bool) -> Iterator[dict[str, Any]]:
    """Iterate over the objects in a file of JSON lines; nothing if there is no file.

    Damaged lines, and objects that `is_whole` rejects, are skipped; a warning says how many.
    """
    damaged = 0
    for entry in _lines(path, is_whole):
        if entry:
            yield entry
        else:
            damaged += 1
    if damaged:
        log.warning("WARNING: %s: %s", path, _damage(path, damaged))


def clean_lines(
    path: Path,
    is_whole: Callable[[dict[str, Any]], bool] = bool,
    keep: Callable[[dict[str, Any]], bool] | None = None,
) -> None:
    """Rewrite a file of JSON lines without damaged lines and those that `keep` rejects.

    Only for the one process that writes this file. A file with damaged lines is renamed first. Nothing is
    written if no line is damaged and `keep` is None.

    Raises:
        OSError: the file cannot be written.
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
            set_aside(path, _damage(path, damaged))


def _lines(path: Path, is_whole: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any] | None]:
    """Objects of a file of JSON lines; None for each damaged line, or once for a path that is not a file."""
    if not path.is_file():
        yield from [None] * path.exists()
        return
    with open(path, "rb") as file:
        for line in iter(partial(file.readline, MOST_LINE), b""):
            entry = None
            with suppress(ValueError):
                entry = parsed_json(line)
            yield entry if isinstance(entry, dict) and is_whole(entry) else None


def _damage(path: Path, damaged: int) -> str:
    lines = f"{damaged} of its lines cannot be read, the others are kept"
    return lines if path.is_file() else "it is not a regular file"


def set_aside(path: Path, reason: str = "it is not a regular file") -> None:
    """Rename a damaged file of a run to NAME.damaged, NAME.damaged-2, and so on, and warn about it.

    Raises:
        OSError: it cannot be renamed.
    """
    names = (f"{path.name}.damaged{f'-{number}' if number > 1 else ''}" for number in count(1))
    aside = next(name for name in names if not os.path.lexists(path.with_name(name)))
    os.rename(path, path.with_name(aside))
    log.warning("WARNING: %s: %s; it is renamed to %s", path, reason, aside)


def cache_folder() -> Path:
    """Folder of indexes, compiled code and downloaded datasets; it may not exist."""
    of_user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if of_user.startswith("~"):  # a user without a home
        of_user = str(temporary_folder())
    return Path(os.environ.get("DINO_SPARO_CACHE") or os.path.join(of_user, "dino_sparo"))


def temporary_folder() -> Path:
    """This user's folder in the system's temporary folder; it may not exist, or belong to somebody else."""
    return Path(tempfile.gettempdir()) / f"dino_sparo-{os.getuid()}"


def keep_compiled_code() -> None:
    """Let `torch.compile` store its code below the cache folder, where only this user can write.

    Torch's default is a folder with a predictable name in the system's temporary folder, from which it would
    unpickle files of other users. Each type of processor gets its own folder. If the folder cannot be created
    or is not private, this process and its children use a temporary one, removed at exit. A folder that the
    user has set in $TORCHINDUCTOR_CACHE_DIR is kept.
    """
    given = Path(os.environ.get(COMPILED, ""))
    if given.name and not (given.parent == Path(tempfile.gettempdir()) and given.name.startswith(OF_TORCH)):
        return
    folder = cache_folder() / f"compiled-{os.getuid()}-{_processor()}"
    reason = None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(folder):
            reason = "other users can write to it"
        elif not os.access(folder, os.W_OK | os.X_OK):
            reason = "it cannot be written"
    except OSError as error:
        reason = str(error.strerror)
    if reason is not None:
        log.warning(
            "%s: compiled code cannot be stored there (%s), so it is compiled again at each start; set %s to "
            "another folder",
            *(folder, reason, COMPILED),
        )
        folder = Path(tempfile.mkdtemp(prefix="dino_sparo-compiled-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[COMPILED] = str(folder)


def can_build_c() -> bool:
    """Whether there are a C compiler and Python's headers, which compiling for a GPU needs."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    return any(map(shutil.which, compilers)) and Path(sysconfig.get_path("include"), "Python.h").exists()


def _is_private(folder: Path) -> bool:
    """Whether a folder (not a link) belongs to this user, and nobody else can write to it or replace it.

    Its parents may belong to root, and may be writable by all if they have the sticky bit, like /tmp.
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
    """Eight hexadecimal digits that identify the type of processor."""
    described = {platform.machine()}
    with suppress(OSError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        described |= {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}
    return hashlib.sha256("\n".join(sorted(described)).encode()).hexdigest()[:8]
