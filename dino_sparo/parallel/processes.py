"""What the system knows about our processes: which ones are gone, and that none outlives its parent."""

import ctypes
import fcntl
import json
import logging
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

from dino_sparo.errors import UserError
from dino_sparo.terminal import shown

log = logging.getLogger("dino_sparo")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # ask a run to stop
PR_SET_PDEATHSIG = 1  # of Linux
GRACE_SECONDS = 5.0  # for the main thread to see by itself that another process is gone
FINISH_SECONDS = 16.0  # for a checkpoint that is being written when another process is lost
NOTES = "DINO_SPARO_NOTES"  # environment variable: where processes leave notes for `launch`
LAUNCHER = "DINO_SPARO_LAUNCHER"  # environment variable: the process of `launch`
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")  # as torchrun sets them
COPIES = {  # what starts a program several times, and its variables for how many there are, and which this is
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpiexec": ("PMI_SIZE", "PMI_RANK"),
    "mpirun_rsh": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),  # of MVAPICH
    "jsrun": ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    "flux run": ("FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
}

_unfinished: list[Callable[[float], object]] = []


def told(name: str, default: int = 0) -> int:
    """The number in an environment variable, which is checked by `check_environment`."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def check_environment() -> None:
    """Refuse an environment that does not tell which of how many processes this is.

    Empty variables are taken away: they stand for nothing, as where a template has not been filled in. After
    an error this process counts as the only one, or as the task of `srun` that it is, so that it reports it.

    Raises:
        UserError: a variable is no number, or missing, or a program was only started several times.
    """
    for name in (*NUMBERS, "MASTER_ADDR"):
        if not os.environ.get(name, "").strip():
            os.environ.pop(name, None)
    odd = next((name for name in NUMBERS if not os.environ.get(name, "0").isdecimal()), None)
    size, needed = told("WORLD_SIZE", 1), ("RANK", "MASTER_ADDR", "MASTER_PORT")
    wrong = None
    if odd:
        wrong = f"{odd} is {shown(repr(os.environ[odd]))}, expected a number"
    elif size > 1 and (missing := [name for name in needed if name not in os.environ]):
        wrong = f"WORLD_SIZE is {size}, but there is no {' and no '.join(missing)}"
    elif told("MASTER_PORT") >= 2**16:
        wrong = f"MASTER_PORT is {told('MASTER_PORT')}, expected less than {2**16}"
    elif told("RANK") >= size:
        of = f"WORLD_SIZE is {size}" if "WORLD_SIZE" in os.environ else "there is no WORLD_SIZE"
        wrong = f"RANK is {told('RANK')}, but {of}"
    if wrong:
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        raise UserError(
            f"environment variables do not tell which of how many processes this is: {wrong}; torchrun sets "
            f"all of them, and without any there is one process, which --nproc multiplies"
        )
    for starter, (of_size, of_rank) in COPIES.items():
        if told(of_size, 1) > 1 and "WORLD_SIZE" not in os.environ:
            os.environ["RANK"] = os.environ.get(of_rank, "0")
            raise UserError(
                f"{starter} has started this program {told(of_size)} times, and each would do the whole "
                f"work; start torchrun once on each machine, as scripts/pretrain_slurm.sbatch does, or one "
                f"process with --nproc; if each is to work alone, set WORLD_SIZE=1"
            )


def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Handle what asks a run to stop, but no SIGHUP under nohup; the handlers before."""
    hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    taken = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not hangup_ignored]
    return {number: signal.signal(number, handler) for number in taken}


def end_with_parent(number: signal.Signals) -> None:
    """Get this signal when the parent ends, however it ends; only Linux can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def end_with_launcher() -> None:
    """Get a SIGTERM when the launcher, if one has started this process, ends, or has ended already."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    end_with_parent(signal.SIGTERM)
    if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGTERM)


def machine_name() -> tuple[str, ...]:
    """What is the same for processes that know each other by their identifiers: machine and container."""
    with suppress(OSError):  # not Linux
        return os.environ.get("GROUP_RANK", ""), platform.node(), os.readlink("/proc/self/ns/pid")
    return os.environ.get("GROUP_RANK", ""), platform.node()


class PeerWatch:
    """Watches other processes of this machine: a wait for one that is gone may never end.

    Args:
        peers: process identifiers by rank.
        when_gone: called, in a thread of its own, with the ranks that have ended, if the watch is still on
            some seconds later.
    """

    def __init__(self, peers: Mapping[int, int], when_gone: Callable[[list[int]], None]) -> None:
        self._closed = threading.Event()
        self._ranks: dict[int, int] = {}
        if hasattr(os, "pidfd_open"):  # Linux; elsewhere nobody watches
            for number, pid in peers.items():
                with suppress(OSError):  # old kernels and containers forbid it
                    self._ranks[os.pidfd_open(pid)] = number
        self._when_gone = when_gone
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def gone(self, wait_seconds: float = 0) -> list[int]:
        """Ranks of the processes that have ended; waits for the first one at most so long."""
        poll = select.poll()  # one for each call: two threads may wait at once
        for descriptor in self._ranks:
            poll.register(descriptor, select.POLLIN)
        return sorted(self._ranks[descriptor] for descriptor, _ in poll.poll(1000 * wait_seconds))

    def close(self) -> None:
        """From now on others may end."""
        self._closed.set()

    def _watch(self) -> None:
        while self._ranks and not self._closed.is_set():
            if self.gone(wait_seconds=1.0) and not self._closed.wait(GRACE_SECONDS):
                self._when_gone(self.gone())
                return


@contextmanager
def finished_first(finish: Callable[[float], object]) -> Iterator[None]:
    """Within, `end_at_once` calls this, with the seconds that it may take, before it ends the process."""
    _unfinished.append(finish)
    try:
        yield
    finally:
        _unfinished.remove(finish)


def end_at_once(status: int) -> NoReturn:
    """End this process and those it has started, without waiting for any other one."""
    for finish in _unfinished:
        finish(FINISH_SECONDS)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # or torch would report their death
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def first_to_fail() -> bool:
    """Whether no other process of this launcher has asked before: the one to report why they all end.

    It then holds back the signal by which the launcher ends those that are left, till its own end.
    """
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # one a process, in folders of one folder
    if not error_file:
        return told("RANK") == 0
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        Path(error_file).parents[1].joinpath("failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # the launcher, which keeps the folder, is gone
        return told("RANK") == 0
    return True


def leave_note(name: str, value: object) -> bool:
    """Tell something to the launcher that started this process; False if it is not ours."""
    folder = os.environ.get(NOTES)
    if folder is None:
        return False
    with suppress(OSError):  # it has been killed
        Path(folder, f"{name}.json").write_text(json.dumps(value))
    return True


def read_note(folder: Path, name: str) -> str:
    """A note left there, or an empty text."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else ""


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Refuse to work in a folder that another process is writing to.

    Raises:
        UserError: another one holds its lock; where the file system has no locks, the log says so.
    """
    descriptor = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UserError(f"--out {str(out)!r} is being written by another process; wait for it") from error
    except OSError:
        log.info("%s: the file system has no locks; do not write to this folder twice at once", out)
    try:
        yield
    finally:
        os.close(descriptor)


def private_bytes(pid: int | None) -> int:
    """Memory of a process that no other has; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Private_", "Swap:")))


def memory_free(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that processes can still take, this one's own counted as free.

    A container or job may have less than the machine; its limits are those of cgroups, version 2.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):
        for line in (proc / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):  # also what the file cache would give back
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
