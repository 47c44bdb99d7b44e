"""Which device to compute on."""

import torch

from dino_sparo.errors import UserError


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA where there is a GPU, else the CPU.

    Raises:
        UserError: CUDA is asked for, but there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch sees no GPU; choose cpu or auto, or repair the driver")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
