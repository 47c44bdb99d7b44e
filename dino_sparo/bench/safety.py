"""`dino-sparo bench --what safety`: what a healthy run pays for being stoppable, watched and saved.

Two processes train on random crops of the recipe's sizes. Beside the steps are timed, in the same run, the
calls that are there only for what may go wrong, and the checkpoint.
"""

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.multiprocessing as mp

from dino_sparo.config import parse_options
from dino_sparo.distributed import Agreement, any_rank, gather_objects, process_group, rank
from dino_sparo.options import PretrainOptions
from dino_sparo.training.pretrain import train_step
from dino_sparo.training.rundir import config_of
from dino_sparo.training.saver import Saver
from dino_sparo.training.setup import build_schedules
from dino_sparo.training.state import TrainState, build_state, capture_state
from dino_sparo.training.stopping import BadSteps

PROCESSES = 2
CALLS = 20  # of what takes less than a millisecond, for one measurement


def bench_safety(recipe: str, rounds: int) -> None:
    """Print medians of the step and of what is added to it, and their ratio."""
    with tempfile.TemporaryDirectory(prefix="dino_sparo_") as folder:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
        threads = max(1, torch.get_num_threads() // PROCESSES)
        mp.spawn(_measure, (recipe, rounds, folder, threads), nprocs=PROCESSES)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _measure(number: int, recipe: str, rounds: int, folder: str, threads: int) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(PROCESSES), "LOCAL_RANK": str(number)}
    torch.set_num_threads(threads)
    arguments = ["--config", recipe, "--data.path", "shapes", "--run_dir", folder]
    options: PretrainOptions = parse_options(PretrainOptions, arguments, usage="")
    with process_group(torch.device("cpu")), Saver(Path(folder, str(number)), 0, saved=0) as saver:
        state = build_state(config_of(options), torch.device("cpu"))
        step = _step_of(options, state)
        to_stop, bad_steps = Agreement(), BadSteps()

        def added() -> None:
            to_stop.ask(False)
            state.judge(~any_rank(torch.tensor(False)), torch.tensor(True))
            bad_steps.add(1, state.bad_steps)
            assert not list(bad_steps.found(now=False))
            saver.check()

        times: dict[str, list[float]] = {"step": [], "added": [], "copy": [], "write": []}
        for turn in range(rounds + 1):
            seconds = {"step": _seconds(step), "added": _seconds(added, CALLS)}
            seconds["copy"] = _seconds(partial(saver.save, capture_state(state), turn + 1))
            seconds["write"] = _seconds(saver.wait)
            for name, value in seconds.items():
                times[name] += [value] if turn else []  # the first one warms up
        step_ms, added_ms, copy_ms, write_ms = (1000 * statistics.median(times[name]) for name in times)
        share = statistics.median(a / s for a, s in zip(times["added"], times["step"], strict=True))
        if rank() == 0:
            print(
                f"{recipe}, {PROCESSES} processes with {threads} threads each, global batch "
                f"{options.optim.global_batch_size}: a step {step_ms:.0f} ms, being stoppable and watched "
                f"{added_ms:.2f} ms, {100 * share:.2f} % (median of {rounds} rounds); a checkpoint holds the "
                f"training up for {copy_ms:.0f} ms and is written beside it in {write_ms:.0f} ms"
            )


def _step_of(options: PretrainOptions, state: TrainState) -> Callable[[], object]:
    views, batch_size = options.views, options.optim.global_batch_size // PROCESSES
    sizes = [(2, views.global_size), (views.num_local_crops, views.local_size)]
    groups = [torch.randn(crops, batch_size, 3, side, side) for crops, side in sizes if crops]
    hyper = build_schedules(options, steps_per_epoch=100).at(0)
    return lambda: train_step(
        state, iter([groups]), 1, hyper, clip_norm=options.optim.clip_norm, autocast=nullcontext()
    )


def _seconds(call: Callable[[], object], calls: int = 1) -> float:
    """Of one call; the processes begin together."""
    gather_objects(None)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls
