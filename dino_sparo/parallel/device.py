"""Which device to compute on, waiting for it, and compiling for it."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from dino_sparo.errors import StuckError, UserError
from dino_sparo.files import keep_compiled_code

PATIENCE_SECONDS = 30 * 60.0  # for a step to end, or for the other processes; all work alike
POLL_SECONDS = 0.0005


def choose_device(name: str, number: int = 0) -> torch.device:
    """`auto` takes CUDA where there is a GPU, else the CPU; `number` is that of the GPU.

    Raises:
        UserError: CUDA is asked for, but there is no GPU, or none of this number.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch sees no GPU; choose cpu or auto, or repair the driver")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise UserError(
            f"process {number + 1} of this machine has no GPU, there are {torch.cuda.device_count()}; start "
            f"one process a GPU, machine.batch_size_per_gpu makes up for missing ones"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile` of a function with these options; the code is kept where nobody else can write."""
    keep_compiled_code()
    import torch._inductor.config as inductor_config  # which makes the folder

    if hasattr(inductor_config, "cpp_cache_precompile_headers"):  # they would stay in torch's own folder
        inductor_config.cpp_cache_precompile_headers = False
    return torch.compile(function, **options)


@cache
def why_not_compiled() -> str:
    """What keeps `compiled` from making code for the GPU here, in words; empty if nothing does."""
    if not torch.cuda.is_available():
        return ""
    try:
        from torch.utils._triton import triton_backend

        triton_backend()  # compiles a little C by itself, or finds that of before
    except Exception as error:  # whatever is wrong with the compiler
        return str(error).split("\n")[0] or repr(error)
    return ""


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was given in the current stream; a CPU always has.

    Raises:
        StuckError: it has not after half an hour.
    """
    wait_for_event(end_of_work(device))


def end_of_work(device: torch.device) -> torch.cuda.Event | None:
    """The end of all that a GPU was given in the current stream; None on a CPU, which has done it."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def wait_for_event(event: torch.cuda.Event | None) -> None:
    """Until a GPU has come to this event, by asking: nobody else watches the collectives of a CUDA graph.

    Raises:
        StuckError: it has not after half an hour.
    """
    if event is None:
        return
    until = time.monotonic() + PATIENCE_SECONDS
    while not event.query():
        if time.monotonic() > until:
            raise StuckError(
                f"the GPU has not finished a step for {PATIENCE_SECONDS / 60:.0f} minutes: it, or another "
                f"process of the run, is stuck; the same command resumes from the last checkpoint"
            )
        time.sleep(POLL_SECONDS)
