"""The device to compute on: choose it, wait for it, compile for it."""

import functools
import os
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from dino_sparo.errors import StuckError, UserError
from dino_sparo.files import COMPILED, keep_compiled_code
from dino_sparo.terminal import log

Made = TypeVar("Made")

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
    """`torch.compile` a function. The code is stored in a folder that only this user can write, and broken
    code there is compiled again."""
    keep_compiled_code()
    import torch._inductor.config as inductor_config  # creates the folder

    if hasattr(inductor_config, "cpp_cache_precompile_headers"):  # would use torch's default folder
        inductor_config.cpp_cache_precompile_headers = False
    fast = torch.compile(function, **options)
    return functools.wraps(function)(functools.partial(_without_broken_code, fast))


def _without_broken_code(make: Callable[..., Made], *arguments: Any, **named: Any) -> Made:
    """What `make` returns, which may load compiled code. A kept library that cannot be loaded, such as the
    empty one that a killed process leaves, is removed, and `make` is called again."""
    removed: set[Path] = set()
    while True:
        try:
            return make(*arguments, **named)
        except Exception as error:
            broken = {path for path in _libraries_in(str(error)) if path not in removed}
            if not broken:
                raise
            removed |= broken
            for path in broken:
                log.warning("WARNING: %s; it is removed and compiled again", what_is_wrong(error))
                path.unlink(missing_ok=True)  # another process may have done so


def _libraries_in(message: str) -> list[Path]:
    """The libraries of a message that lie where compiled code is kept, torch's or Triton's own."""
    of_triton = os.environ.get("TRITON_CACHE_DIR") or os.path.expanduser("~/.triton/cache")
    folders = [folder for folder in (os.environ.get(COMPILED), of_triton) if folder]
    paths = map(Path, re.findall(r"/[^\s:'\"]+\.so\b", message))
    return [path for path in paths if any(path.is_relative_to(folder) for folder in folders)]


def what_is_wrong(error: Exception) -> str:
    """The line of a compiler's long message that says it."""
    lines = str(error).split("\n")
    return next((line for line in lines if "rror:" in line), lines[0]) or repr(error)


@cache
def why_not_compiled() -> str:
    """Why `compiled` does not work for the GPU of this machine; empty if it does, or without a GPU."""
    if not torch.cuda.is_available():
        return ""
    try:
        from torch.utils._triton import triton_backend

        _without_broken_code(triton_backend)  # compiles a small C file, or finds the cached one
    except Exception as error:  # any failure of the compiler
        return what_is_wrong(error)
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
