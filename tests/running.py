"""Runs as a user starts them, in processes of their own, looked at from outside."""

import multiprocessing
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from dino_sparo.__main__ import main
from dino_sparo.cli.pretraining import PretrainOptions, pretrain
from dino_sparo.runs.runlog import read_metrics
from dino_sparo.training import pretrain as program
from tests.tiny import tiny_arguments

# All of torch's compiler except for writing code, which takes a C++ compiler minutes.
COMPILER = "aot_eager_decomp_partition"


def command(data: Path, run_dir: Path, processes: int = 1, **changes) -> list[str]:
    """The command line of a tiny run."""
    arguments = tiny_arguments(data, run_dir, **changes)
    return [sys.executable, "-m", "dino_sparo", "pretrain", *arguments, f"--nproc={processes}"]


def in_new_process(
    arguments: list[str], before: Callable | None = None
) -> multiprocessing.context.ForkServerProcess:
    """The program, after `before`, in a process forked from one that has only imported it: seconds less."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_program, args=(arguments, before))
    process.start()
    return process


def _program(arguments: list[str], before: Callable | None) -> None:
    if before is not None:
        before()
    sys.exit(main(arguments))


def finished(command: list[str], **options) -> subprocess.CompletedProcess[str]:
    """A program that has ended, with what it has printed."""
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def wait_for_step(step: int, run_dir: Path, process: subprocess.Popen) -> None:
    """Until a step is in the log."""
    while process.poll() is None and not any(entry["step"] >= step for entry in logged(run_dir)):
        time.sleep(0.002)
    assert process.poll() is None, "the run has ended before it could be stopped"


def family(pid: int) -> list[int]:
    """A process and all that it and those have started."""
    return [pid, *(member for child in children(pid) for member in family(child))]


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def children(pid: int) -> list[int]:
    """Processes that this one has started."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, check=False).stdout
    return [*map(int, found.split())]


def is_gone(pid: int) -> bool:
    """Whether a process has ended, within some seconds, if only its parent would look."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(100):
        with suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return True
    return False


def logged(run_dir: Path) -> list[dict]:
    with suppress(OSError, ValueError):
        return read_metrics(run_dir)
    return []


def plant_modules(folder: Path) -> None:
    """Files named as what the program imports, which end any process that imports them from there."""
    (folder / "dino_sparo").mkdir(parents=True)
    for name in ("dino_sparo/__init__.py", "yaml.py", "queue.py", "socket.py"):
        (folder / name).write_text("raise SystemExit('imported from the working directory')\n")


def spawn(function: Callable, *arguments: object, processes: int) -> None:
    """Call `function(number, *arguments)` in so many processes, which can meet at a free port."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "localhost")
        patch.setenv("MASTER_PORT", str(port))
        mp.spawn(function, arguments, nprocs=processes)


def at_once(function: Callable, *arguments: object) -> None:
    """Call it in three processes at the same time, which all must end well."""
    context = multiprocessing.get_context("fork")
    starts = [context.Process(target=function, args=arguments) for _ in range(3)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert [start.exitcode for start in starts] == [0, 0, 0]


def of_rank(rank: int, launcher: int) -> int:
    """The process of this number among those that a launcher has started."""
    return next(pid for pid in children(launcher) if environment_of(pid)["RANK"] == str(rank))


class PowerCutError(Exception):
    """What breaks off a run."""


def pretrain_until(step: int, options: PretrainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, and break off when `step` steps of this start are done."""
    original, calls = program.train_step, []

    def breaking(*args, **kwargs):
        if len(calls) == step:
            raise PowerCutError
        calls.append(1)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(program, "train_step", breaking)
        with pytest.raises(PowerCutError):
            pretrain(options)
