"""How a program ends otherwise than well: errors that are the user's to mend, and being told to stop."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_PROBLEM = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: not done yet, try again
EXIT_INTERRUPTED = 130  # as shells have it: 128 + SIGINT
EXIT_STATUSES = {
    0: "done",
    EXIT_PROBLEM: "check or --dry-run has found a problem, a run of a study has failed, or there is a bug",
    EXIT_USER_ERROR: "a mistake or a fault; one sentence says which, and the remedy",
    EXIT_STOPPED: "stopped by a signal and saved; the same command resumes",
    EXIT_INTERRUPTED: "interrupted before there was anything to save",
}


class UserError(ValueError):
    """A mistake in a recipe, on the command line or in the data; the message says how to mend it.

    It is shown as one sentence, without a traceback.
    """


REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there"),
    errno.EFBIG: "allow larger files there (ulimit -f)",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give permission there or name another place"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST), "name another place"),
}


@contextmanager
def told_to_user() -> Iterator[None]:
    """Make a UserError of an error that names a file, of a full disk and of a full GPU; others pass."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's own, without importing torch
            raise
        reason = str(error).split(". ")[0]
        raise UserError(
            f"the memory of the GPU is too small for this ({reason}); give smaller batches or a smaller "
            f"model, or end other programs that use the GPU"
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if isinstance(error, UserError) or (error.filename is None and not full):
            raise
        name = "a file" if error.filename is None else os.fsdecode(error.filename)
        reason = error.strerror or type(error).__name__
        remedy = REMEDIES.get(error.errno or 0, "repair it")
        raise UserError(f"{name} cannot be read or written ({reason}); {remedy}, then start again") from error


class UserFileNotFoundError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist or holds nothing usable."""


class UnlabeledError(UserError):
    """Images whose classes are needed are in no class folders, or their files do not tell all classes."""


class StuckError(UserError):
    """A process of ours has failed so that one must not wait for it: after the message the program ends."""


class PeerLostError(StuckError):
    """Another process of the run has ended without a word.

    Attributes:
        at: how far this process had come.
    """

    def __init__(self, message: str, at: str) -> None:
        super().__init__(message)
        self.at = at


class StoppedError(Exception):
    """A signal has told the run to stop, and everything is saved."""
