"""Checkpoints: one plain dictionary a file, written whole or not at all, checked by its hash."""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import UserError
from dino_sparo.files import atomic_write, read_small, set_aside
from dino_sparo.models import Encoder, build_encoder
from dino_sparo.parallel.processes import finished_first
from dino_sparo.recipe.sections import Recipe
from dino_sparo.runs.plain_file import read_plain

log = logging.getLogger("dino_sparo")

FORMAT = 2
FOLDER = "checkpoints"
TEMPORARY = "writing.tmp"
KEEP_LAST = 2


def save_checkpoint(state: dict[str, Any], run_dir: Path, *, step: int, keep_every_steps: int = 0) -> Path:
    """Write `run_dir/checkpoints/step_<step>.pt` and its SHA-256, then remove old ones.

    The data reach the disk under a temporary name, then the hash gets its name, then the data, then the
    folder is flushed: a crash leaves either the whole file or none. The last two are kept, and those at
    multiples of `keep_every_steps`.

    Raises:
        UserError: there is no room, or the file cannot be written; the older ones are still there.
    """
    folder = run_dir / FOLDER
    path = folder / f"step_{step:09d}.pt"
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
        descriptor = os.open(folder, os.O_RDONLY)  # to make the names durable too
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        reasons = (getattr(each, "strerror", None) for each in (error, error.__context__))
        reason = next(filter(None, reasons), "torch has not written it whole")
        raise UserError(
            f"{path} ({num_bytes(state)} bytes) cannot be written ({reason}); make room or give permission "
            f"there, then the same command resumes from the checkpoint before"
        ) from error
    for old in checkpoints_of(run_dir)[:-KEEP_LAST]:
        if not (keep_every_steps and step_of(old) % keep_every_steps == 0):
            old.unlink(missing_ok=True)
            _hash_file(old).unlink(missing_ok=True)
    return path


class Saver:
    """Writes the checkpoints of a run in a thread, one at a time; made by `saving`."""

    def __init__(self, run_dir: Path, thread: Executor, *, keep_every_steps: int, saved: int) -> None:
        self.run_dir, self.keep_every_steps, self.begun = run_dir, keep_every_steps, saved
        self.thread, self.writing = thread, list[Future]()  # the last one, or none

    def save(self, state: dict[str, Any], step: int) -> None:
        """Copy the state and return, after the checkpoint before is written; raises as `wait`."""
        self.wait()
        if step == self.begun > 0:
            return
        self.begun = step
        write = partial(save_checkpoint, step=step, keep_every_steps=self.keep_every_steps)
        self.writing = [self.thread.submit(write, _copied(state), self.run_dir)]

    def wait(self) -> None:
        """Until the last checkpoint is on disk. Raises UserError if it could not be written."""
        for writing in self.writing:
            writing.result()

    def raise_if_failed(self) -> None:
        """Raise what went wrong with the last checkpoint, if that is known; waits for nothing."""
        if all(writing.done() for writing in self.writing):
            self.wait()


@contextmanager
def saving(run_dir: Path, *, keep_every_steps: int, saved: int) -> Iterator[Saver]:
    """What writes a run's checkpoints; what is left is written when the block ends, also after an error.

    Args:
        keep_every_steps: as for `save_checkpoint`.
        saved: the step of the checkpoint that the run resumes from, 0 without one.
    """
    thread = ThreadPoolExecutor(1, "checkpoints")
    saver = Saver(run_dir, thread, keep_every_steps=keep_every_steps, saved=saved)
    with finished_first(lambda seconds: wait(saver.writing, timeout=seconds)), thread:
        yield saver
    saver.wait()


def check_room(run_dir: Path, size: int) -> None:
    """Raise a UserError if the disk of a run cannot hold so many bytes."""
    left = run_dir / FOLDER / TEMPORARY  # by a save that was killed; it will be written over
    free = shutil.disk_usage(run_dir).free + (left.stat().st_size if left.exists() else 0)
    if size > free:
        raise UserError(
            f"{run_dir / FOLDER}: a checkpoint needs {size} bytes ({size / 2**30:.2f} GiB), but only {free} "
            f"({free / 2**30:.2f} GiB) are free there; make room, then start again"
        )


def num_bytes(state: Any) -> int:
    """Size of all tensors in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, dict):
        return sum(map(num_bytes, state.values()))
    return sum(map(num_bytes, state)) if isinstance(state, list) else 0


def load_latest(run_dir: Path, *, unverified: bool = False) -> dict[str, Any] | None:
    """The newest checkpoint of a run that is whole; None if there is none at all.

    Damaged ones are named loudly and the one before is taken.

    Args:
        unverified: take one without its SHA-256 too, with a warning.

    Raises:
        UserError: there are checkpoints, but all are damaged; or one has no SHA-256 beside it.
    """
    paths = checkpoints_of(run_dir)
    if (run_dir / FOLDER).exists() and not (run_dir / FOLDER).is_dir():
        raise UserError(
            f"{run_dir / FOLDER} is no folder; restore it from a backup, or choose another run_dir to start "
            f"anew"
        )
    for path in reversed(paths):
        if not unverified and path.is_file() and not _hash_file(path).exists():
            raise UserError(
                f"{path}: {_hash_file(path).name} is missing, without which a damaged checkpoint cannot be "
                f"told from a whole one; restore that file, or pass --resume_unverified to use the "
                f"checkpoint anyway"
            )
        try:
            return load_checkpoint(path)
        except UserError as error:
            log.warning("WARNING: %s; it is passed over", error)
    if paths:
        raise UserError(
            f"{run_dir / FOLDER}: all {len(paths)} checkpoints are damaged; restore one from a backup, or "
            f"choose another run_dir to start anew"
        )
    return None


def set_damaged_aside(run_dir: Path, step: int) -> None:
    """Rename the checkpoints behind `step`, which a resume has passed over, and what is no file: rotation
    must neither count them nor remove them."""
    for path in checkpoints_of(run_dir):
        for file in (path, _hash_file(path)):
            if file.exists() and not file.is_file():
                set_aside(file)
            elif file.exists() and step_of(path) > step:
                set_aside(file, "it was passed over")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint to the CPU, tensors and plain values only.

    Raises:
        UserError: the file does not match its hash, or is no checkpoint of this project.
    """
    check_hash(path)
    state = read_plain(path)
    check_format(state, path)
    warn_of_missing_hash(path)
    return state


def check_hash(path: Path) -> None:
    """Raise a UserError for a file that differs from the SHA-256 beside it, if there is one."""
    hash_file = _hash_file(path)
    if not path.is_file():
        raise UserError(f"{path} is no regular file")
    if not hash_file.exists():
        return
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if read_small(hash_file, 4096).split()[:1] != [digest.encode()]:
        raise UserError(f"{path} is damaged: its SHA-256 differs from {hash_file.name}")


def warn_of_missing_hash(path: Path) -> None:
    """Say that nothing tells whether this checkpoint is damaged, if it has no SHA-256 beside it."""
    if not _hash_file(path).exists():
        log.warning("WARNING: %s is not verified, since %s is missing", path, _hash_file(path).name)


def check_format(content: Any, path: Path) -> None:
    """Raise a UserError for what is no checkpoint of this project, or one of another format."""
    told = content.get("format") if isinstance(content, dict) else None
    if not isinstance(told, int) or told != FORMAT:
        raise UserError(f"{path} is no checkpoint of dino-sparo with format {FORMAT}")


def encoder_of(recipe: Recipe, drop_path_rate: float = 0.0) -> Encoder:
    """The freshly initialized encoder that a recipe describes."""
    return build_encoder(drop_path_rate=drop_path_rate, **recipe.encoder_arguments())


def latest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint, by its name alone; 0 without one."""
    return max(map(step_of, checkpoints_of(run_dir)), default=0)


def most_kept(epochs: int, keep_every_epochs: int) -> int:
    """Checkpoints that a run has on disk at most: the last ones, one being written, those kept for good."""
    return KEEP_LAST + 1 + (epochs // keep_every_epochs if keep_every_epochs else 0)


def _copied(value: Any) -> Any:
    """A copy on the CPU, of tensors and of the dictionaries and lists that hold them."""
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
    """Steps that a checkpoint has behind it, by its name."""
    return int(path.stem.removeprefix("step_"))


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
