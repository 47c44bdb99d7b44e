"""The device to compute on: choose it, wait for it, compile for it."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from dino_sparo.errors import StuckError, UserError
from dino_sparo.files import keep_compiled_code

PATIENCE_SECONDS = 30 * 60.0  # timeout of a step on the GPU, and of waiting for other processes
POLL_SECONDS = 0.0005


def choose_device(name: str, number: int = 0) -> torch.device:
    """`auto`: CUDA if there is a GPU, else the CPU; `number` is the index of the GPU.

    Raises:
        UserError: there is no GPU of this number.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch finds no GPU; use cpu or auto, or fix the GPU driver")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise UserError(
            f"process {number + 1} on this machine has no GPU: there are {torch.cuda.device_count()}; start "
            f"one process per GPU, with machine.batch_size_per_gpu for gradient accumulation"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile` a function; the code is stored in a folder that only this user can write."""
    keep_compiled_code()
    import torch._inductor.config as inductor_config  # creates the folder

    if hasattr(inductor_config, "cpp_cache_precompile_headers"):  # would use torch's default folder
        inductor_config.cpp_cache_precompile_headers = False
    return torch.compile(function, **options)


@cache
def why_not_compiled() -> str:
    """Why `compiled` does not work for the GPU of this machine; empty if it does, or without a GPU."""
    if not torch.cuda.is_available():
        return ""
    try:
        from torch.utils._triton import triton_backend

        triton_backend()  # compiles a small C file, or finds the cached one
    except Exception as error:  # any failure of the compiler
        return str(error).split("\n")[0] or repr(error)
    return ""


def wait_for(device: torch.device) -> None:
    """Wait for the current stream of a GPU, as `wait_for_event` does; returns at once on a CPU."""
    wait_for_event(end_of_work(device))


def end_of_work(device: torch.device) -> torch.cuda.Event | None:
    """An event at the end of the work queued in a GPU's current stream; None on a CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def wait_for_event(event: torch.cuda.Event | None) -> None:
    """Wait for an event by polling, since NCCL has no timeout for the collectives of a CUDA graph.

    Raises:
        StuckError: it has not happened after 30 minutes.
    """
    if event is None:
        return
    until = time.monotonic() + PATIENCE_SECONDS
    while not event.query():
        if time.monotonic() > until:
            raise StuckError(
                f"the GPU has not finished a step for {PATIENCE_SECONDS / 60:.0f} minutes: it or another "
                f"process of the run hangs; the same command resumes from the last checkpoint"
            )
        time.sleep(POLL_SECONDS)
