"""The only place that speaks to other processes. One process is world size 1, on the same code path.

Processes are torchrun's: one a GPU, numbered by the environment it sets.
"""

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dino_sparo.errors import (
    EXIT_USER_ERROR,
    PeerLostError,
    StoppedError,
    StuckError,
    UserError,
    told_to_user,
)
from dino_sparo.parallel.device import PATIENCE_SECONDS
from dino_sparo.parallel.processes import (
    NOTES,
    PeerWatch,
    end_at_once,
    first_to_fail,
    leave_note,
    machine_name,
    told,
)
from dino_sparo.terminal import error_line

log = logging.getLogger("dino_sparo")

Result = TypeVar("Result")

PATIENCE = timedelta(seconds=PATIENCE_SECONDS)
HEARTBEAT_SECONDS = 5.0
SAY_SECONDS = 10.0  # after which a process that waits for others says so
POLL_SECONDS = 0.05
LOST_SECONDS = 2.0  # between an error of the connection and the end of the process that caused it
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
    return told("LOCAL_RANK")


def local_world_size() -> int:
    """Number of processes on this machine, as torchrun sets it."""
    return told("LOCAL_WORLD_SIZE", 1)


class Group:
    """The processes of one run.

    Attributes:
        at: how far this process has come, for messages, such as `step 37`.
    """

    def __init__(self) -> None:
        self.at = ""

    def lost(self, ranks: Sequence[int]) -> PeerLostError:
        """The error for processes that have ended without a word; none here: those of another machine."""
        who = ", ".join(f"process {number}" for number in ranks) or "a process of another machine"
        return PeerLostError(
            f"{who} of {world_size()} ended without a word{f' at {self.at}' if self.at else ''} (killed, "
            f"often out of memory); the same command resumes from the last checkpoint",
            self.at,
        )


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """Join the processes that torchrun started: NCCL between GPUs, gloo on CPUs; nothing to do for one.

    None of them outlives its launcher, and none waits for one of this machine that is gone.

    Raises:
        UserError: what was raised within, with the number of this process and where it was.
        PeerLostError: another process has ended without a word.
    """
    group = Group()
    number, size = told("RANK"), told("WORLD_SIZE", 1)
    if size == 1:
        with told_to_user():
            yield group
        return
    store = _meet(number, size)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=number, world_size=size, timeout=PATIENCE
    )
    _store.append(store)
    machine = machine_name()
    everyone = gather_objects((machine, os.getpid()))
    peers = {n: pid for n, (where, pid) in enumerate(everyone) if where == machine and n != number}
    watch = PeerWatch(peers, lambda gone: _end_without(group.lost(gone)))
    try:
        with told_to_user():
            yield group
        dist.barrier()
    except StoppedError:
        watch.close()
        raise
    except UserError as error:
        if group.at:
            error.args = (f"{error} (process {number} at {group.at})",)
        raise
    except Exception as error:  # of the connection, if another process is gone
        gone = watch.gone(wait_seconds=LOST_SECONDS)
        elsewhere = size > local_world_size() and ("gloo" in str(error) or isinstance(error, dist.DistError))
        if not gone and not elsewhere:
            if not any(word in str(error).lower() for word in ("timed out", "timeout")):
                raise
            leave_note("stuck", group.at)
            raise StuckError(
                f"process {number} has waited {PATIENCE.total_seconds() / 60:.0f} minutes for the others"
                f"{f' at {group.at}' if group.at else ''}: one of them is stuck or stopped; the same command "
                f"resumes from the last checkpoint"
            ) from error
        raise group.lost(gone) from error
    # Only after the end: on an error the other processes may never come.
    watch.close()
    _store.clear()
    dist.destroy_process_group()


def _meet(number: int, size: int) -> dist.Store:
    """What all processes of the run write to: a file of our launcher, so that no port is opened, else the
    server of torchrun, or that of process 0. Process 0 returns when all have come.

    Raises:
        UserError: not all have come in time, or there can be no server.
    """
    everyone = [f"process {each}" for each in range(size)]
    host, port = os.environ.get("MASTER_ADDR", ""), told("MASTER_PORT")
    hosts = number == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

    def server() -> str:
        try:
            socket.create_connection((host, port), timeout=SAY_SECONDS).close()
        except OSError as error:
            return f"process 0 at {host}, port {port} ({error.strerror or error})"
        return ""

    def others() -> str:
        return ", ".join(name for name in everyone if not store.check([name]))

    store: dist.Store
    if notes := os.environ.get(NOTES):
        store = dist.FileStore(os.path.join(notes, "store"), size)
    else:
        if not hosts:
            _wait_for(server, everyone[number], size)
        try:
            socket.getaddrinfo(host, port)  # of a wrong name torch would not say so
            store = dist.TCPStore(
                *(host, port, size, hosts, PATIENCE), wait_for_workers=False, multi_tenant=True
            )
        except (OSError, dist.DistError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{everyone[number]} of {size} cannot use MASTER_ADDR {host!r}, MASTER_PORT {port} "
                f"({reason}); give an address of the machine of process 0, and a port that is free there"
            ) from error
    store.set(everyone[number], "")
    if number == 0:
        _wait_for(others, everyone[0], size)
    return store


def _wait_for(missing: Callable[[], str], name: str, size: int) -> None:
    """Until nobody is missing; says so after some seconds, then half as often each time.

    Raises:
        UserError: somebody has not come in time.
    """
    began, next_word = time.monotonic(), SAY_SECONDS
    while who := missing():
        waited = time.monotonic() - began
        text = f"{name} of {size} has waited {waited:.0f} s for {who}"
        if waited > PATIENCE.total_seconds():
            raise UserError(f"{text}; see what became of it, then start all processes again")
        if waited > next_word:
            log.error("%s; it gives up after %.0f minutes", text, PATIENCE.total_seconds() / 60)
            next_word *= 2
        time.sleep(POLL_SECONDS)


def _end_without(error: PeerLostError) -> None:
    """End this process, wherever it is, since it would wait for one that is gone."""
    report(error)
    end_at_once(EXIT_USER_ERROR)


def report(error: UserError) -> None:
    """Show what ends the run, if this process speaks for all; our launcher knows more of a lost one."""
    if speaks_for_all() and not (isinstance(error, PeerLostError) and leave_note("lost", error.at)):
        print(error_line(error), file=sys.stderr)


def speaks_for_all() -> bool:
    """Whether this process is the one to report the failure that ends it: the first one of all that fail.

    A process that fails because another has ended finds that one's claim, on any machine.
    """
    if not first_to_fail():
        return False
    if not _store:
        return True
    number = str(rank())
    try:
        return _store[0].compare_set(FAILED, "", number) == number.encode()
    except RuntimeError:  # the launcher, which keeps the store, is gone
        return number == "0"


class Agreement:
    """Whether any process has said yes: known at the next question, so that nobody waits in between."""

    def __init__(self) -> None:
        self._votes: tuple[dist.Work, Tensor] | None = None

    def ask(self, yes: bool) -> bool:
        """Say yes or no; the answer is to the question before. Alone, a process decides at once."""
        if not dist.is_initialized():
            return yes
        agreed = False
        if self._votes is not None:
            work, votes = self._votes
            work.wait()
            agreed = bool(votes.item())
        votes = torch.tensor([int(yes)])
        self._votes = dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True), votes
        return agreed


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
    done: Future[Result] = Future()

    def keep() -> None:
        try:
            with told_to_user():
                done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    for turn in range(3):
        mine = turn == my_turn
        if mine:
            threading.Thread(target=keep, daemon=True).start()
        while sum_over_ranks(torch.tensor([int(mine and not done.done())])).item():
            if mine:
                wait([done], timeout=HEARTBEAT_SECONDS)
        error = done.exception() if mine else None
        messages = list(filter(None, gather_objects(str(error or ""))))
        if error:
            raise error
        if messages:
            raise UserError(messages[0])
    return done.result()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean over all processes of the gradients of a step, in place; nothing to do when there is one.

    All gradients go in one all-reduce, in the order of the parameters, so that the order of summation never
    depends on where a run started. DistributedDataParallel would overlap it with the backward pass (205 MB
    of gradients of ViT-S/16 with SPARO on eight H100: about 1 ms a step), but orders its buckets anew after
    the first step.
    """
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
