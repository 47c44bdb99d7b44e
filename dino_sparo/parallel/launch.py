"""`--nproc N`: several processes on this machine, started by torch's launcher."""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dino_sparo.errors import EXIT_STOPPED, UserError
from dino_sparo.parallel.processes import (
    COMMAND,
    LAUNCHER,
    NOTES,
    STOP_SIGNALS,
    cores,
    on_stop_signals,
    read_note,
)

SHUTDOWN_SECONDS = 300  # for a stopped process to finish its step and save
KILL_SECONDS = 23  # after a process is lost; the others end sooner unless a call in C blocks them


def launch(num_processes: int, arguments: list[str]) -> int:
    """Run `dino-sparo ARGUMENTS` in `num_processes` processes on this machine; returns the exit status.

    The same as `torchrun --standalone --nproc-per-node N --no-python dino-sparo ARGUMENTS`, without the error
    report of torchrun.

    Raises:
        UserError: a signal ended a process.
    """
    logging.disable(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // num_processes)))
    checkout = Path(__file__).parents[2]
    if sys.path[0] == str(checkout) == os.getcwd():  # `python -m dino_sparo`: all processes use this checkout
        os.environ["PYTHONPATH"] = os.pathsep.join([str(checkout), *filter(None, [os.getenv("PYTHONPATH")])])
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))
    PContext.close.__defaults__ = (None, KILL_SECONDS)  # there is no option for torch's 30 s
    with tempfile.TemporaryDirectory(prefix="dino_sparo_") as folder:
        os.environ |= {NOTES: folder, LAUNCHER: str(os.getpid()), COMMAND: json.dumps(sys.argv)}
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # no port that other machines can reach
        for loopback in {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
        on_stop_signals(_stop_all)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=os.path.join(folder, "rendezvous"),
            rdzv_configs={"store_type": "file"},
            max_restarts=0,
            signals_to_handle="SIGQUIT",  # with torch's handlers a third signal would leave processes behind
            logs_specs=DefaultLogsSpecs(log_dir=folder),  # required, but not used
        )
        try:
            elastic_launch(config, sys.executable)("-m", "dino_sparo", *arguments)
        except ChildFailedError as error:
            return status_after(error, num_processes, Path(folder))
        except SignalException as error:
            if read_note(Path(folder), "done"):
                return 0
            return EXIT_STOPPED if read_note(Path(folder), "stopped") else 128 + error.sigval
    return 0


def _stop_all(number: int, frame: FrameType | None) -> None:
    """Make torch pass the first signal on to all processes; later ones are ignored."""
    for other in STOP_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise SignalException(f"got {signal.Signals(number).name}", sigval=signal.Signals(number))


def status_after(error: ChildFailedError, num_processes: int, notes: Path) -> int:
    """The exit status of the process that reported the failure.

    Raises:
        UserError: a signal that the launcher did not send ended a process.
    """
    reported = any(failure.exitcode > 0 for failure in error.failures.values())
    by_us = [-signal.SIGTERM, -signal.SIGKILL] if read_note(notes, "stuck") else [-signal.SIGTERM]
    for number, failure in error.failures.items():  # in the order of failures; torch ends the others
        if failure.exitcode < 0 and not (reported and failure.exitcode in by_us):
            at = read_note(notes, "lost")
            raise UserError(
                f"process {number} of {num_processes} was ended by {failure.signal_name()}"
                f"{f' at {at}' if at else ''}, often because it was out of memory; the "
                f"same command resumes from the last checkpoint"
            ) from error
    return next(failure.exitcode for failure in error.failures.values() if failure.exitcode > 0)
