"""The only place that speaks to other processes. One process is world size 1, on the same code path.

Processes are torchrun's: one a GPU, numbered by the environment it sets. `launch` starts them on this
machine through torch's own launcher.
"""

import logging
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from dino_sparo.errors import UserError

Result = TypeVar("Result")

PATIENCE = timedelta(minutes=30)  # how long a process waits for the others; they all work alike
HEARTBEAT_SECONDS = 5.0
FAILED = "failed"  # key in the store: the number of the process that speaks about a failure

_store: list[dist.Store] = []  # of the process group, while there is one


def rank() -> int:
    """Number of this process among all, 0 when there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine, as torchrun sets it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Number of processes on this machine, as torchrun sets it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started: NCCL between GPUs, gloo on CPUs; nothing to do for one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    store, number, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=number, world_size=size, timeout=PATIENCE
    )
    _store.append(store)
    yield
    # After an error the other processes may never come: the end of this one is all that is left to do.
    dist.barrier()
    _store.clear()
    dist.destroy_process_group()


def speaks_for_all(patience_seconds: float = 3.0) -> bool:
    """Whether this process is the one to report the failure that ends it: the first one if it fails too.

    Of processes that make the same mistake the first one reports; the others wait for it, since the
    launcher ends all of them as soon as one has ended. A process that fails because another has ended
    finds that one's claim.
    """
    number = int(os.environ.get("RANK", "0"))
    if not _store:
        time.sleep(patience_seconds if number else 0)
        return number == 0
    try:
        waited_until = time.monotonic() + (patience_seconds if number else 0)
        while time.monotonic() < waited_until and not _store[0].check([FAILED]):
            time.sleep(0.05)
        return _store[0].compare_set(FAILED, "", str(number)) == str(number).encode()
    except dist.DistError:  # the launcher, which keeps the store, is gone
        return number == 0


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes, in place; the tensor itself when there is one."""
    return sum_over_ranks(values).div_(world_size())


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place; the tensor itself when there is one."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_objects(value: Result) -> list[Result]:
    """The plain values of all processes, by rank, in every process."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def first_rank_decides(decision: bool) -> bool:
    """The first process's decision, in every process."""
    return bool(sum_over_ranks(torch.tensor([int(decision and rank() == 0)])).item())


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """Rows of all processes on the CPU, (total, ...): process r holds rows r, r + R, r + 2R, ... of R."""
    if not dist.is_initialized():
        return rows
    size = world_size()
    padded = rows.new_zeros(-(-total // size), *rows.shape[1:])
    padded[: len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(shares, padded)
    gathered = rows.new_empty(total, *rows.shape[1:])
    for number, share in enumerate(shares):
        gathered[number::size] = share[: len(range(number, total, size))]
    return gathered


def first_rank_first(work: Callable[[], Result]) -> Result:
    """Every process does the work: the first one before all others, then one on each other machine.

    For work whose result is kept in a file, so that the others find it done. They wait by a heartbeat,
    however long it takes. An error of one process ends all of them with its message.
    """
    if not dist.is_initialized():
        return work()
    my_turn = 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    results: list[Result] = []
    for turn in range(3):
        errors: list[BaseException] = []
        thread = threading.Thread(target=_keep, args=(work, results, errors), daemon=True)
        if turn == my_turn:
            thread.start()
        while sum_over_ranks(torch.tensor([int(thread.is_alive())])).item():
            if turn == my_turn:
                thread.join(HEARTBEAT_SECONDS)
        messages = [message for message in gather_objects(str(errors[0]) if errors else "") if message]
        if errors:
            raise errors[0]
        if messages:
            raise UserError(messages[0])
    return results[0]


def _keep(work: Callable[[], Result], results: list[Result], errors: list[BaseException]) -> None:
    """Work in a thread, whose result or error is kept for the one that waits."""
    try:
        results.append(work())
    except BaseException as error:
        errors.append(error)


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module whose backward averages gradients over all processes; itself when there is one."""
    if not dist.is_initialized():
        return module
    return DistributedDataParallel(
        module, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def unsynchronized(module: nn.Module, unless: bool) -> AbstractContextManager[Any]:
    """Leave gradients local within: for all micro-batches of a step but the last (`unless`)."""
    if unless or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def launch(num_processes: int, arguments: list[str]) -> int:
    """Run `python -m dino_sparo ARGUMENTS` in so many processes on this machine; returns the exit status.

    Raises:
        UserError: one of them was ended by a signal.


    The same as `torchrun --standalone --nproc-per-node N -m dino_sparo ARGUMENTS`, without its own report
    beside that of the process that failed.
    """
    logging.disable(logging.ERROR)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    try:
        with tempfile.TemporaryDirectory(prefix="dino_sparo_") as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=num_processes,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=logs),  # nothing is kept there, but the folder must be
            )
            elastic_launch(config, sys.executable)("-m", "dino_sparo", *arguments)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        raise UserError(
            f"process {number} was ended by {failure.signal_name()}, often for want of memory; the same "
            f"command goes on from the last checkpoint"
        ) from error
    except SignalException as error:
        return 128 + error.sigval
    return 0
