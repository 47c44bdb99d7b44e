"""Processes of this machine: which ones have ended, signals, and free memory."""

import ctypes
import json
import multiprocessing
import os
import platform
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dino_sparo.errors import PeerLostError, UserError
from dino_sparo.terminal import error_line, shown

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # ask a run to stop
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
GRACE_SECONDS = 5.0  # for the main thread to notice that another process is gone
FINISH_SECONDS = 16.0  # for a checkpoint that is being written when another process is lost
NOTES = "DINO_SPARO_NOTES"  # environment variable: folder of messages from processes to `launch`
FAILED = "failed"  # key in the store: the rank of the process that reports the failure
LAUNCHER = "DINO_SPARO_LAUNCHER"  # environment variable: the process identifier of `launch`
COMMAND = "DINO_SPARO_COMMAND"  # environment variable: the arguments of `launch` as the user typed them, JSON
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")  # set by torchrun
COPIES = {  # launchers of several copies of a program: their variables for world size and rank
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
    "mpirun_rsh": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),  # of MVAPICH
    "jsrun": ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    "flux run": ("FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
}

store_of_group: list[Any] = []  # torch's store that all processes share, while they are a group
_unfinished: list[Callable[[float], object]] = []


def env_int(name: str, default: int = 0) -> int:
    """The number in an environment variable."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def typed_command() -> list[str]:
    """The command that the user typed: `sys.argv`, in a process of `launch` that of the launcher."""
    return json.loads(os.environ[COMMAND]) if COMMAND in os.environ else sys.argv


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_environment() -> None:
    """Check the environment variables for rank and world size; empty ones are removed.

    On an error RANK and WORLD_SIZE are changed so that one process reports it.

    Raises:
        UserError: a variable is not a number or is missing, or several copies run without a process group.
    """
    for name in (*NUMBERS, "MASTER_ADDR"):
        if not os.environ.get(name, "").strip():
            os.environ.pop(name, None)
    odd = next((name for name in NUMBERS if not os.environ.get(name, "0").isdecimal()), None)
    size, needed = env_int("WORLD_SIZE", 1), ("RANK", "MASTER_ADDR", "MASTER_PORT")
    wrong = None
    if odd:
        wrong = f"{odd} is {shown(repr(os.environ[odd]))}, expected a number"
    elif size > 1 and (missing := [name for name in needed if name not in os.environ]):
        wrong = f"WORLD_SIZE is {size}, but there is no {' and no '.join(missing)}"
    elif env_int("MASTER_PORT") >= 2**16:
        wrong = f"MASTER_PORT is {env_int('MASTER_PORT')}, expected at most {2**16 - 1}"
    elif env_int("RANK") >= size:
        of = f"WORLD_SIZE is {size}" if "WORLD_SIZE" in os.environ else "there is no WORLD_SIZE"
        wrong = f"RANK is {env_int('RANK')}, but {of}"
    if wrong:
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        raise UserError(
            f"the environment variables for rank and world size do not fit: {wrong}; use torchrun, which "
            f"sets all of them, or unset them and use --nproc"
        )
    for starter, (of_size, of_rank) in COPIES.items():
        if env_int(of_size, 1) > 1 and "WORLD_SIZE" not in os.environ:
            os.environ["RANK"] = os.environ.get(of_rank, "0")
            raise UserError(
                f"{starter} has started this program {env_int(of_size)} times without a process group, so "
                f"each copy would do the whole work; start torchrun once per machine, as "
                f"scripts/pretrain_slurm.sbatch does, or one process with --nproc; if each copy is to work "
                f"alone, set WORLD_SIZE=1"
            )


def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Handle STOP_SIGNALS, except SIGHUP under nohup; returns the previous handlers."""
    hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    taken = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not hangup_ignored]
    return {number: signal.signal(number, handler) for number in taken}


def end_with_parent(number: signal.Signals) -> None:
    """Have this signal sent to this process when its parent ends; only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def end_with_launcher() -> None:
    """Have SIGTERM sent to this process when its launcher ends, or now if it has already ended."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    end_with_parent(signal.SIGTERM)
    if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGTERM)


def machine_name() -> tuple[str, ...]:
    """Machine and container: processes with equal names can see each other's process identifiers."""
    with suppress(OSError):  # not Linux
        return os.environ.get("GROUP_RANK", ""), platform.node(), os.readlink("/proc/self/ns/pid")
    return os.environ.get("GROUP_RANK", ""), platform.node()


class PeerWatch:
    """Watches other processes of this machine, since a collective with a lost process may never end.

    Args:
        peers: process identifiers by rank.
        when_gone: called in another thread with the ranks that have ended, unless `close` is called within
            GRACE_SECONDS.
    """

    def __init__(self, peers: Mapping[int, int], when_gone: Callable[[list[int]], None]) -> None:
        self._closed = threading.Event()
        self._ranks: dict[int, int] = {}
        if hasattr(os, "pidfd_open"):  # Linux; elsewhere nothing is watched
            for number, pid in peers.items():
                with suppress(OSError):  # old kernels and some containers forbid it
                    self._ranks[os.pidfd_open(pid)] = number
        self._when_gone = when_gone
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def gone(self, wait_seconds: float = 0) -> list[int]:
        """Ranks of the processes that have ended; waits up to `wait_seconds` for the first one."""
        poll = select.poll()  # one per call, since two threads may wait at once
        for descriptor in self._ranks:
            poll.register(descriptor, select.POLLIN)
        return sorted(self._ranks[descriptor] for descriptor, _ in poll.poll(1000 * wait_seconds))

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while self._ranks and not self._closed.is_set():
            if self.gone(wait_seconds=1.0) and not self._closed.wait(GRACE_SECONDS):
                self._when_gone(self.gone())
                return


@contextmanager
def finished_first(finish: Callable[[float], object]) -> Iterator[None]:
    """Inside the block, `end_at_once` calls `finish(seconds)`, where seconds is its time limit."""
    _unfinished.append(finish)
    try:
        yield
    finally:
        _unfinished.remove(finish)


def end_at_once(status: int) -> NoReturn:
    """End this process and its children without waiting for any other process."""
    for finish in _unfinished:
        finish(FINISH_SECONDS)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # else torch reports the killed children
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def report(error: UserError) -> None:
    """Print the error that ends the run, in one process; a lost process is left to `launch` to report."""
    if speaks_for_all() and not (isinstance(error, PeerLostError) and leave_note("lost", error.at)):
        print(error_line(error), file=sys.stderr)


def speaks_for_all() -> bool:
    """Whether this process reports the failure: the first one to fail, on any machine."""
    if not _first_to_fail():
        return False
    if not store_of_group:
        return True
    number = str(env_int("RANK"))
    try:
        return store_of_group[0].compare_set(FAILED, "", number) == number.encode()
    except RuntimeError:  # the launcher, which holds the store, is gone
        return number == "0"


def _first_to_fail() -> bool:
    """Whether this is the first process of this launcher to fail.

    From then on it ignores SIGTERM, by which the launcher would end it before its report.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # one per process, all below one folder
    if not error_file:
        return env_int("RANK") == 0
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        Path(error_file).parents[1].joinpath("failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher, which holds the folder, is gone
        return env_int("RANK") == 0
    return True


def leave_note(name: str, value: object) -> bool:
    """Leave a JSON file for `launch`; False if something else started this process."""
    folder = os.environ.get(NOTES)
    if folder is None:
        return False
    with suppress(OSError):  # `launch` has been killed
        Path(folder, f"{name}.json").write_text(json.dumps(value))
    return True


def read_note(folder: Path, name: str) -> str:
    """The content of a note that `leave_note` wrote; empty if there is none."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else ""


def private_bytes(pid: int | None) -> int:
    """Memory of a process that it does not share, in bytes; 0 if unknown."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Private_", "Swap:")))


def memory_free(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Free memory in bytes, within the limits of cgroups version 2; that of this process counts as free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):  # includes the file cache
                free = 1024 * int(line.split()[1])
        lines = (proc / "self" / "cgroup").read_text().splitlines()
        group = cgroups / next((line[4:] for line in lines if line.startswith("0::/")), "")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(cgroups) or not (folder / "memory.max").exists():
                continue
            if (most := (folder / "memory.max").read_text().strip()) != "max":
                cached = re.search(
                    r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE
                )
                used = int((folder / "memory.current").read_text()) - int(cached[1] if cached else 0)
                free = min(free, max(0, int(most) - used))
    return free + private_bytes(os.getpid())
