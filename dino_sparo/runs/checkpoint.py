"""Checkpoints: one plain dictionary per file, written atomically, verified by SHA-256."""

import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import UserError
from dino_sparo.files import atomic_write, check_space, read_small, set_aside
from dino_sparo.parallel.processes import finished_first
from dino_sparo.runs.plain_file import read_plain
from dino_sparo.terminal import log

FORMAT = 2
FOLDER = "checkpoints"
TEMPORARY = "writing.tmp"
KEEP_LAST = 2


def save_checkpoint(state: dict[str, Any], run_dir: Path, *, step: int, keep_every_steps: int = 0) -> Path:
    """Write `run_dir/checkpoints/step_<step>.pt` and its SHA-256, then remove old checkpoints.

    The data are flushed to disk under a temporary name; then the hash file is renamed, then the data, and the
    folder is flushed, so that a crash leaves the whole file or none. The last two checkpoints are kept, and
    those at multiples of `keep_every_steps`.

    Raises:
        UserError: the file cannot be written; older checkpoints are still there.
    """
    folder = run_dir / FOLDER
    path = _path(run_dir, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_room(run_dir, num_bytes(state))
        with atomic_write(path, folder / TEMPORARY, durable=False) as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            with atomic_write(_hash_file(path), folder / f"{TEMPORARY}.sha256") as hash_file:
                hash_file.write(f"{digest}  {path.name}\n".encode())
        descriptor = os.open(folder, os.O_RDONLY)  # flush the renames too
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError for a full disk
        reasons = (getattr(each, "strerror", None) for each in (error, error.__context__))
        reason = next(filter(None, reasons), "torch has not written all of it")
        raise UserError(
            f"{path} ({num_bytes(state)} bytes) cannot be written ({reason}); free some space or change the "
            f"permissions there, then the same command resumes from the previous checkpoint"
        ) from error
    for old in checkpoints_of(run_dir)[:-KEEP_LAST]:
        if not (step_of(old) and keep_every_steps and step_of(old) % keep_every_steps == 0):
            old.unlink(missing_ok=True)
            _hash_file(old).unlink(missing_ok=True)
    return path


def _path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:09d}.pt"


class Saver:
    """Writes the checkpoints of a run in a thread, one at a time; created by `saving`."""

    def __init__(self, run_dir: Path, thread: Executor, *, keep_every_steps: int, saved: int) -> None:
        self.run_dir, self.keep_every_steps, self.begun = run_dir, keep_every_steps, saved
        self.thread, self.writing = thread, list[Future]()  # at most one

    def save(self, state: dict[str, Any], step: int) -> None:
        """Copy the state and start writing it, once the previous checkpoint is on disk. Raises UserError."""
        self.wait()
        if step == self.begun and (step or _path(self.run_dir, step).exists()):  # it is on disk
            return
        self.begun = step
        write = partial(save_checkpoint, step=step, keep_every_steps=self.keep_every_steps)
        self.writing = [self.thread.submit(write, _copied(state), self.run_dir)]

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises UserError if it could not be written."""
        for writing in self.writing:
            writing.result()

    def raise_if_failed(self) -> None:
        """Raise a UserError if the last checkpoint could not be written; does not wait."""
        if all(writing.done() for writing in self.writing):
            self.wait()


@contextmanager
def saving(run_dir: Path, *, keep_every_steps: int, saved: int) -> Iterator[Saver]:
    """A Saver; at the end of the block it finishes the checkpoint being written, also after an error.

    Args:
        keep_every_steps: as for `save_checkpoint`.
        saved: step of the checkpoint from which the run resumes, or 0.
    """
    thread = ThreadPoolExecutor(1, "checkpoints")
    saver = Saver(run_dir, thread, keep_every_steps=keep_every_steps, saved=saved)
    with finished_first(lambda seconds: wait(saver.writing, timeout=seconds)), thread:
        yield saver
    saver.wait()


def check_room(run_dir: Path, size: int) -> None:
    """Raise a UserError if the disk of a run has not `size` bytes free."""
    left = run_dir / FOLDER / TEMPORARY  # left by a killed process, will be overwritten
    spare = left.stat().st_size if left.exists() else 0
    check_space(run_dir, size, f"{run_dir / FOLDER}: a checkpoint needs", spare)


def num_bytes(state: Any) -> int:
    """Size of all tensors in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(num_bytes, state.values()))
    return sum(map(num_bytes, state)) if isinstance(state, list) else 0


def load_latest(run_dir: Path, *, unverified: bool = False) -> dict[str, Any] | None:
    """The newest checkpoint of a run that is not damaged; None if there are no checkpoints.

    A warning names each damaged one.

    Args:
        unverified: also load a checkpoint without a SHA-256 file, with a warning.

    Raises:
        UserError: all checkpoints are damaged, or one has no SHA-256 file.
    """
    paths = checkpoints_of(run_dir)
    if (run_dir / FOLDER).exists() and not (run_dir / FOLDER).is_dir():
        raise UserError(
            f"{run_dir / FOLDER} is not a folder; restore it from a backup, or start in another run_dir"
        )
    for path in reversed(paths):
        if not unverified and path.is_file() and not _hash_file(path).exists():
            raise UserError(
                f"{path}: {_hash_file(path).name} is missing, so the checkpoint cannot be verified; restore "
                f"that file, or pass --resume_unverified to use the checkpoint anyway"
            )
        try:
            return load_checkpoint(path)
        except UserError as error:
            log.warning("WARNING: %s; it is skipped", error)
    if paths:
        raise UserError(
            f"{run_dir / FOLDER}: all {len(paths)} checkpoints are damaged; restore one from a backup, or "
            f"start in another run_dir"
        )
    return None


def set_damaged_aside(run_dir: Path, step: int) -> None:
    """Rename damaged checkpoints, which come after `step`, so that `save_checkpoint` ignores them."""
    for path in checkpoints_of(run_dir):
        for file in (path, _hash_file(path)):
            if file.exists() and not file.is_file():
                set_aside(file)
            elif file.exists() and step_of(path) > step:
                set_aside(file, "it was skipped")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU, tensors and plain values only.

    Raises:
        UserError: the file differs from its SHA-256, or is not a checkpoint of dino-sparo.
    """
    check_hash(path)
    state = read_plain(path)
    check_format(state, path)
    warn_of_missing_hash(path)
    return state


def check_hash(path: Path) -> None:
    """Raise a UserError for a file that differs from its SHA-256, if there is a SHA-256 file."""
    hash_file = _hash_file(path)
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    if not hash_file.exists():
        return
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if read_small(hash_file, 4096).split()[:1] != [digest.encode()]:
        raise UserError(f"{path} is damaged: its SHA-256 differs from {hash_file.name}")


def warn_of_missing_hash(path: Path) -> None:
    """Warn about a checkpoint without a SHA-256 file."""
    if not _hash_file(path).exists():
        log.warning("WARNING: %s is not verified, because %s is missing", path, _hash_file(path).name)


def check_format(content: Any, path: Path) -> None:
    """Raise a UserError for content that is not a checkpoint of dino-sparo in the current format."""
    stored = content.get("format") if isinstance(content, dict) else None
    if not isinstance(stored, int) or stored != FORMAT:
        raise UserError(f"{path} is not a checkpoint of dino-sparo with format {FORMAT}")


def latest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint by its file name; 0 if there is none."""
    return max(map(step_of, checkpoints_of(run_dir)), default=0)


def most_kept(epochs: int, keep_every_epochs: int) -> int:
    """Largest number of checkpoints on disk: the last ones, the one being written, and those kept forever."""
    return KEEP_LAST + 1 + (epochs // keep_every_epochs if keep_every_epochs else 0)


def _copied(value: Any) -> Any:
    """Copy tensors in nested dictionaries and lists to the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    paths = (run_dir / FOLDER).glob("step_*.pt")
    return sorted((path for path in paths if re.fullmatch(r"step_\d+\.pt", path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Step of a checkpoint by its file name."""
    return int(path.stem.removeprefix("step_"))


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
