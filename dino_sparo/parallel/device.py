"""Which device to compute on, waiting for it, and compiling for it."""

from collections.abc import Callable
from typing import Any

import torch

from dino_sparo.errors import UserError
from dino_sparo.files import keep_compiled_code


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


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
