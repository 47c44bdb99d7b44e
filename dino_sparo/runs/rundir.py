"""The run folder: its recipe, its lock, and the lists of starts, bad images and bad steps."""

import fcntl
import os
import platform
import re
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dino_sparo import __version__
from dino_sparo.errors import UserError
from dino_sparo.files import append_line, clean_lines, named, read_lines, set_aside, write_file
from dino_sparo.parallel.processes import typed_command
from dino_sparo.recipe.files import CONFIG_FILE, read_sections, stored_recipe
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import flattened
from dino_sparo.runs.checkpoint import FOLDER, TEMPORARY
from dino_sparo.terminal import log, shown

STARTS_FILE = "starts.jsonl"
LOCK_FILE = ".lock"
MARKER_FILE = "stopped.json"
BAD_IMAGES_FILE, BAD_STEPS_FILE = "bad_images.jsonl", "bad_steps.jsonl"
MOST_STARTS = 1000
LOCK_SECONDS = 3.0  # a killed process may hold its lock so long while the system frees its memory
SHOWN_CHANGES = 4
NOT_EXPERIMENT = (
    "run_dir",
    "monitor",
    "machine",
    "log",
    *("data.path", "data.train", "data.val", "data.label_column"),
    "data.max_pixels",
    "data.on_bad_image",
    "optim.max_bad_steps",
)
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


def check_same_experiment(run_dir: Path, recipe: Recipe) -> None:
    """Check that a folder is empty, absent, or the run folder of the same experiment.

    Fields in NOT_EXPERIMENT may change. That the images are the same is checked against the checkpoint.

    Raises:
        UserError: it is not a run folder, or fields differ, which the message names.
    """
    path = run_dir / CONFIG_FILE
    try:
        os.fsencode(run_dir).decode()
    except UnicodeDecodeError:
        raise UserError(
            f"run_dir {shown(str(run_dir))} is not a name in UTF-8, as TensorBoard needs; choose another"
        ) from None
    if not path.exists():
        # Files left by a process that was killed before it wrote the recipe.
        left = re.compile(rf"{re.escape(CONFIG_FILE)}\..*tmp|{re.escape(LOCK_FILE)}")
        if run_dir.exists() and not (run_dir.is_dir() and all(map(left.fullmatch, os.listdir(run_dir)))):
            raise UserError(
                f"run_dir {str(run_dir)!r} exists, but is not a run folder (it has no {CONFIG_FILE}); "
                f"choose a new or an empty folder"
            )
        return
    remedy = f"start the same recipe in another run_dir and copy its {CONFIG_FILE} here"
    try:
        recipes = stored_recipe(read_sections(path), str(path)), recipe
    except UserError as error:
        raise UserError(f"{path} is damaged or of another version ({error}); {remedy}") from error
    before, now = (flattened(each.as_dict(), without=NOT_EXPERIMENT) for each in recipes)
    changed = [
        f"{key} was {before.get(key, 'not set')}, is now {now.get(key, 'not set')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        if len(changed) > SHOWN_CHANGES:
            rest = [change.split(" ")[0] for change in changed[SHOWN_CHANGES:]]
            changed = [*changed[:SHOWN_CHANGES], f"also changed: {', '.join(rest)}"]
        raise UserError(
            f"run_dir {str(run_dir)!r} contains another experiment ({'; '.join(changed)}); set these fields "
            f"back to resume it, or choose another run_dir, with --init {run_dir} to start from the weights "
            f"of this run"
        )


def start_run_dir(run_dir: Path, recipe: Recipe, machine: dict[str, Any]) -> None:
    """Write the recipe, add this start to the list of starts, remove the stop marker. Raises OSError."""
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": typed_command(),
        "python": platform.python_version(),
        "versions": {"dino-sparo": __version__} | {package: version(package) for package in PACKAGES},
        "git": _git_state(),
        **machine,
    }
    write_file(run_dir / CONFIG_FILE, yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    append_line(run_dir / STARTS_FILE, start)
    (run_dir / MARKER_FILE).unlink(missing_ok=True)


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; of ever so many the last."""
    return list(deque(read_lines(run_dir / STARTS_FILE, _is_start), MOST_STARTS))


def _is_start(entry: dict[str, Any]) -> bool:
    """Whether an entry has the fields of a start that are read."""
    kinds = {
        "time": str,
        "command": list,
        "versions": dict,
        "device": str,
        "precision": str,
        "processes": int,
    }
    return (
        all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
        and all(isinstance(word, str) for word in entry["command"])
        and {"torch", "timm"} <= entry["versions"].keys()
    )


def repair_run_dir(run_dir: Path) -> None:
    """Rename damaged files that a run does not need. `RunLog` handles metrics, `load_latest` checkpoints.

    Only for the process that holds the lock of the folder.

    Raises:
        OSError: a file cannot be renamed or written.
    """
    clean_lines(run_dir / STARTS_FILE, _is_start)
    clean_lines(run_dir / BAD_IMAGES_FILE, is_bad_image)
    clean_lines(run_dir / BAD_STEPS_FILE)
    temporary = run_dir / FOLDER / TEMPORARY
    for path in (run_dir / MARKER_FILE, temporary, temporary.with_name(f"{TEMPORARY}.sha256")):
        if path.is_dir():
            set_aside(path)


def is_bad_image(entry: dict[str, Any]) -> bool:
    """Whether an entry has the fields of a bad image that are read."""
    return isinstance(entry.get("name"), str) and isinstance(entry.get("reason"), str)


@contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Create the run folder if it does not exist, and lock it; the lock ends with this process.

    Raises:
        UserError: another process trains there.
        OSError: the folder cannot be created or written.
    """
    path = run_dir / LOCK_FILE
    with named(path):
        run_dir.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            set_aside(path)
        file = open(path, "a+")  # noqa: SIM115 closed below
        file.write(" ")  # fails on a full disk
        file.flush()
    with file:
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not shared with data workers
            except BlockingIOError as error:
                if time.monotonic() < give_up:
                    time.sleep(0.05)
                    continue
                file.seek(0)
                other = file.read(100).strip() or "another process"
                raise UserError(
                    f"run_dir {str(run_dir)!r} is in use: {other} trains there; wait until it ends, stop it, "
                    f"or choose another run_dir"
                ) from error
            except OSError:
                log.warning("WARNING: %s: the file system has no locks; start only one run there", run_dir)
            break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _git_state() -> str | None:
    """Git commit of the checkout of this package, with `-dirty` if it has changes; None if installed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError, subprocess.CalledProcessError):
        where = Path(__file__).parent
        return subprocess.check_output(command, cwd=where, text=True, stderr=subprocess.DEVNULL).strip()
    return None
