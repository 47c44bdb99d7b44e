"""The run folder: which experiment it holds, and what is written beside the checkpoints."""

import fcntl
import logging
import os
import platform
import re
import subprocess
import sys
import time
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
from dino_sparo.recipe.files import stored_recipe
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import flattened, read_yaml
from dino_sparo.runs.checkpoint import FOLDER, TEMPORARY

CONFIG_FILE = "config.yaml"
STARTS_FILE = "starts.jsonl"
LOCK_FILE = ".lock"
MARKER_FILE = "stopped.json"
BAD_IMAGES_FILE, BAD_STEPS_FILE = "bad_images.jsonl", "bad_steps.jsonl"
LOCK_SECONDS = 3.0  # a killed process may hold its lock so long, while the system takes its memory back
log = logging.getLogger("dino_sparo")

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
    """Refuse a folder that holds something else than this experiment.

    Where the images lie may change (that they are the same ones is checked against the checkpoint), and
    what becomes of bad ones, of which there were none if they were to stop the run.

    Raises:
        UserError: naming the changed fields, or that the folder is no run folder.
    """
    path = run_dir / CONFIG_FILE
    if not path.exists():
        # What a start leaves that is killed before it has written the recipe.
        left = re.compile(rf"{re.escape(CONFIG_FILE)}\..*tmp|{re.escape(LOCK_FILE)}")
        if run_dir.exists() and not (run_dir.is_dir() and all(map(left.fullmatch, os.listdir(run_dir)))):
            raise UserError(
                f"run_dir {str(run_dir)!r} exists, but is no run folder (it has no {CONFIG_FILE}); "
                f"choose another folder or an empty one"
            )
        return
    remedy = f"start the same recipe in another run_dir and copy its {CONFIG_FILE} here"
    try:
        stored = read_yaml(path)
        if not isinstance(stored, dict):
            raise UserError("it has no sections")
        recipes = stored_recipe(stored, str(path)), recipe
    except UserError as error:
        raise UserError(f"{path} is damaged or of another version ({error}); {remedy}") from error
    before, now = (flattened(each.as_dict(), without=NOT_EXPERIMENT) for each in recipes)
    changed = [
        f"{key} was {before.get(key, 'not set')}, is now {now.get(key, 'not set')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        if len(changed) > SHOWN_CHANGES:  # a wholly other recipe: the names of the rest are enough
            rest = [change.split(" ")[0] for change in changed[SHOWN_CHANGES:]]
            changed = [*changed[:SHOWN_CHANGES], f"also changed: {', '.join(rest)}"]
        raise UserError(
            f"run_dir {str(run_dir)!r} holds another experiment ({'; '.join(changed)}); set these "
            f"fields back to resume it, or choose another run_dir, which with --init {run_dir} begins with "
            f"the weights of this one"
        )


def start_run_dir(run_dir: Path, recipe: Recipe, machine: dict[str, Any]) -> None:
    """Write the resolved recipe, add this start to the list of starts, remove the marker. Raises OSError."""
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {"dino-sparo": __version__} | {package: version(package) for package in PACKAGES},
        "git": _git_state(),
        **machine,
    }
    write_file(run_dir / CONFIG_FILE, yaml.safe_dump(recipe.as_dict(), sort_keys=False))
    append_line(run_dir / STARTS_FILE, start)
    (run_dir / MARKER_FILE).unlink(missing_ok=True)


def read_starts(run_dir: Path) -> list[dict[str, Any]]:
    """All starts of a run, oldest first."""
    return list(read_lines(run_dir / STARTS_FILE, _is_start))


def _is_start(entry: dict[str, Any]) -> bool:
    """Whether an entry has what is read of a start."""
    kinds = {"time": str, "command": list, "versions": dict, "device": str, "processes": int}
    return all(isinstance(entry.get(key), kind) for key, kind in kinds.items())


def mend(run_dir: Path) -> None:
    """Set aside what earlier starts have written and nobody can read, where a run can do without it.

    For the process that holds the folder. Metrics are the business of `RunLog`, checkpoints of `load_latest`;
    a run cannot do without its recipe.

    Raises:
        OSError: something cannot be renamed or written.
    """
    clean_lines(run_dir / STARTS_FILE, _is_start)
    clean_lines(run_dir / BAD_IMAGES_FILE, is_bad_image)
    clean_lines(run_dir / BAD_STEPS_FILE)
    temporary = run_dir / FOLDER / TEMPORARY
    for path in (run_dir / MARKER_FILE, temporary, temporary.with_name(f"{TEMPORARY}.sha256")):
        if path.is_dir():
            set_aside(path)


def is_bad_image(entry: dict[str, Any]) -> bool:
    """Whether an entry has what is read of an image that was replaced."""
    return isinstance(entry.get("name"), str) and isinstance(entry.get("reason"), str)


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Keep other starts out of the folder, which is made if need be; a lock that ends with this process.

    Raises:
        UserError: another process trains there.
        OSError: the folder cannot be made or written.
    """
    path = run_dir / LOCK_FILE
    with named(path):
        run_dir.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            set_aside(path)
        file = open(path, "a+")  # noqa: SIM115 closed below
        file.write(" ")  # what a full disk refuses
        file.flush()
    with file:
        give_up = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process, not of its data workers
            except BlockingIOError as error:
                if time.monotonic() < give_up:
                    time.sleep(0.05)
                    continue
                file.seek(0)
                other = file.read().strip() or "another process"
                raise UserError(
                    f"run_dir {str(run_dir)!r} is in use: {other} trains there; "
                    f"wait until it has ended or stop it, or choose another folder"
                ) from error
            except OSError:
                log.warning("WARNING: %s: this file system has no locks; start only one run there", run_dir)
            break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _git_state() -> str | None:
    """Commit of the checkout that the package runs from, marked if it has changes; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError, subprocess.CalledProcessError):
        where = Path(__file__).parent
        return subprocess.check_output(command, cwd=where, text=True, stderr=subprocess.DEVNULL).strip()
    return None
