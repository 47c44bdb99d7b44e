"""Exit statuses, and errors that are shown to the user as one sentence without a traceback."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_PROBLEM = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done yet, try again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as in shells
EXIT_STATUSES = {
    0: "done",
    EXIT_PROBLEM: "check or --dry-run found a problem, a run of a study failed, or there is a bug",
    EXIT_USER_ERROR: "an error; one sentence says what is wrong and what to do",
    EXIT_STOPPED: "stopped by a signal and saved; the same command resumes",
    EXIT_INTERRUPTED: "interrupted before there was anything to save",
}


class UserError(ValueError):
    """A mistake in a recipe, on the command line or in the data; the message says how to fix it."""


REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there"),
    errno.EFBIG: "allow larger files there (ulimit -f)",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions or give another path"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "give another path"),
}


@contextmanager
def errors_for_user() -> Iterator[None]:
    """Turn an OSError about a file or a full disk, and a GPU out of memory, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch.OutOfMemoryError, without importing torch
            raise
        reason = str(error).split(". ")[0]
        raise UserError(
            f"the GPU is out of memory ({reason}); use smaller batches or a smaller model, or end other "
            f"programs that use the GPU"
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if isinstance(error, UserError) or (error.filename is None and not full):
            raise
        name = "a file" if error.filename is None else os.fsdecode(error.filename)
        reason = error.strerror or type(error).__name__
        remedy = REMEDIES.get(error.errno or 0, "repair it")
        raise UserError(f"{name} cannot be read or written ({reason}); {remedy}, then run again") from error


class UserFileNotFoundError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist or contains nothing usable."""


class UnlabeledError(UserError):
    """Labels are needed, but the images are not in class folders, or their files do not give all labels."""


class TooFewImagesError(UserError):
    """There are fewer images than an analysis needs."""


class StuckError(UserError):
    """A process or the GPU hangs, so the program ends after the message without waiting for it."""


class PeerLostError(StuckError):
    """Another process of the run ended without reporting an error.

    Attributes:
        at: where this process was, such as `step 37`.
    """

    def __init__(self, message: str, at: str) -> None:
        super().__init__(message)
        self.at = at


class StoppedError(Exception):
    """A signal has stopped the run, and everything is saved."""
