"""Process group and collectives. A single process has world size 1 and uses the same code path.

There is one process per GPU, with rank and world size in the environment variables that torchrun sets.
"""

import os
import socket
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
    errors_for_user,
)
from dino_sparo.parallel.device import PATIENCE_SECONDS
from dino_sparo.parallel.processes import (
    NOTES,
    PeerWatch,
    end_at_once,
    env_int,
    leave_note,
    machine_name,
    report,
    store_of_group,
)
from dino_sparo.terminal import log

Result = TypeVar("Result")

PATIENCE = timedelta(seconds=PATIENCE_SECONDS)
HEARTBEAT_SECONDS = 5.0
SAY_SECONDS = 10.0  # a process that waits longer for others logs it
POLL_SECONDS = 0.05
GATHERED_ROWS = 256
LOST_SECONDS = 2.0  # after a connection error the process that caused it ends within this time


def rank() -> int:
    """Rank of this process, 0 for a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Rank of this process on its machine, as torchrun sets it."""
    return env_int("LOCAL_RANK")


def local_world_size() -> int:
    """Number of processes on this machine, as torchrun sets it."""
    return env_int("LOCAL_WORLD_SIZE", 1)


class Group:
    """The processes of one run.

    Attributes:
        at: where this process is, for messages, such as `step 37`.
    """

    def __init__(self) -> None:
        self.at = ""

    def lost(self, ranks: Sequence[int]) -> PeerLostError:
        """The error for processes that ended without reporting one; empty ranks: on another machine."""
        who = ", ".join(f"process {number}" for number in ranks) or "a process on another machine"
        return PeerLostError(
            f"{who} of {world_size()} ended without an error message{f' at {self.at}' if self.at else ''} "
            f"(killed, often because it was out of memory); the same command resumes from the last "
            f"checkpoint",
            self.at,
        )


@contextmanager
def process_group(device: torch.device) -> Iterator[Group]:
    """Join the process group: NCCL between GPUs, gloo on CPUs, nothing for a single process.

    A process does not outlive its launcher, and ends if another process on its machine is gone.

    Raises:
        UserError: raised in the block; rank and step of this process are added to its message.
        PeerLostError: another process ended without reporting an error.
        StuckError: a collective has timed out.
    """
    group = Group()
    number, size = env_int("RANK"), env_int("WORLD_SIZE", 1)
    if size == 1:
        with errors_for_user():
            yield group
        return
    store = _meet(number, size)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=dist.PrefixStore("group", store), rank=number, world_size=size, timeout=PATIENCE
    )
    store_of_group.append(store)
    machine = machine_name()
    everyone = gather_objects((machine, os.getpid()))
    peers = {n: pid for n, (where, pid) in enumerate(everyone) if where == machine and n != number}
    watch = PeerWatch(peers, lambda gone: _end_without(group.lost(gone)))
    try:
        with errors_for_user():
            yield group
        dist.barrier()
    except StoppedError:
        watch.close()
        raise
    except UserError as error:
        if group.at:
            error.args = (f"{error} (process {number} at {group.at})",)
        raise
    except Exception as error:  # a connection error if another process is gone
        gone = watch.gone(wait_seconds=LOST_SECONDS)
        elsewhere = size > local_world_size() and ("gloo" in str(error) or isinstance(error, dist.DistError))
        if not gone and not elsewhere:
            if not any(word in str(error).lower() for word in ("timed out", "timeout")):
                raise
            leave_note("stuck", group.at)
            raise StuckError(
                f"process {number} has waited {PATIENCE.total_seconds() / 60:.0f} minutes for the others"
                f"{f' at {group.at}' if group.at else ''}: one of them hangs or was stopped; the same "
                f"command resumes from the last checkpoint"
            ) from error
        raise group.lost(gone) from error
    # Not in a `finally`: after an error the other processes may never get here.
    watch.close()
    store_of_group.clear()
    dist.destroy_process_group()


def _meet(number: int, size: int) -> dist.Store:
    """The store that all processes share; process 0 waits until all have joined.

    It is a file if `launch` started the processes, so that no port is open. Otherwise it is the TCP store of
    torchrun, or one that process 0 serves.

    Raises:
        UserError: a process has not joined in time, or the store cannot be reached.
    """
    everyone = [f"process {each}" for each in range(size)]
    host, port = os.environ.get("MASTER_ADDR", ""), env_int("MASTER_PORT")
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
            socket.getaddrinfo(host, port)  # torch does not report an unknown host name
            store = dist.TCPStore(
                *(host, port, size, hosts, PATIENCE), wait_for_workers=False, multi_tenant=True
            )
        except (OSError, dist.DistError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{everyone[number]} of {size} cannot use MASTER_ADDR {host!r}, MASTER_PORT {port} "
                f"({reason}); give the address of the machine of process 0, and a port that is free there"
            ) from error
    store.set(everyone[number], "")
    if number == 0:
        _wait_for(others, everyone[0], size)
    return store


def _wait_for(missing: Callable[[], str], name: str, size: int) -> None:
    """Wait until `missing()` is empty; logs whom it waits for, at doubling intervals.

    Raises:
        UserError: a process is still missing after 30 minutes.
    """
    began, next_word = time.monotonic(), SAY_SECONDS
    while who := missing():
        waited = time.monotonic() - began
        text = f"{name} of {size} has waited {waited:.0f} s for {who}"
        if waited > PATIENCE.total_seconds():
            raise UserError(f"{text}; check its log, then start all processes again")
        if waited > next_word:
            log.error("%s; it stops after %.0f minutes", text, PATIENCE.total_seconds() / 60)
            next_word *= 2
        time.sleep(POLL_SECONDS)


def _end_without(error: PeerLostError) -> None:
    """End this process at once: it would wait for a lost process without end."""
    report(error)
    end_at_once(EXIT_USER_ERROR)


class Agreement:
    """Whether any process has said yes, without blocking: each answer arrives one call later."""

    def __init__(self) -> None:
        self._votes: tuple[dist.Work, Tensor] | None = None

    def ask(self, yes: bool) -> bool:
        """Vote yes or no; returns the result of the previous vote (of this one for a single process)."""
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
    """Mean of a tensor over all processes, in place."""
    return sum_over_ranks(values).div_(world_size())


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_objects(value: Result) -> list[Result]:
    """The values of all processes in the order of ranks, in every process."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def first_rank_decides(decision: bool) -> bool:
    """The decision of rank 0, in every process."""
    return bool(sum_over_ranks(torch.tensor([int(decision and rank() == 0)])).item())


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """Rows of all R processes on the CPU, (total, ...); process r has rows r, r + R, r + 2R, ..."""
    if not dist.is_initialized():
        return rows
    size = world_size()
    gathered = rows.new_empty(total, *rows.shape[1:])
    most = -(-total // size)  # rows of a process; some have one less
    for start in range(0, most, GATHERED_ROWS):  # in parts, which need little memory
        padded = rows.new_zeros(min(GATHERED_ROWS, most - start), *rows.shape[1:])
        some = rows[start : start + len(padded)]
        padded[: len(some)] = some
        shares = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(shares, padded)
        together = torch.stack(shares, dim=1).flatten(0, 1)[: total - start * size]
        gathered[start * size : start * size + len(together)] = together
    return gathered


def first_rank_first(work: Callable[[], Result]) -> Result:
    """Do the same work in every process: first in rank 0, then in one per other machine, then in all others.

    For work that stores its result in a file, which the others then find. They wait without a timeout. An
    error in one process ends all of them with its message.
    """
    if not dist.is_initialized():
        return work()
    my_turn = 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    done: Future[Result] = Future()

    def keep() -> None:
        try:
            with errors_for_user():
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
    """Average gradients over all processes, in place.

    One all-reduce of all gradients in the order of the parameters makes the order of summation the same after
    a resume. DistributedDataParallel would overlap it with the backward pass (205 MB of gradients of ViT-S/16
    with SPARO on eight H100: about 1 ms per step), but reorders its buckets after the first step.
    """
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
