"""Files of `torch.save` read as tensors and plain values only: no code that a file brings is ever run."""

import argparse
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dino_sparo.errors import UserError


def read_plain(path: Path, *, allow_namespace: bool = False) -> Any:
    """Read a file of `torch.save`, zip archive or the older format, to the CPU.

    Args:
        allow_namespace: let it hold `argparse.Namespace`, as full checkpoints of the official code do.

    Raises:
        UserError: it cannot be read, or is refused because it would load more than plain values (named).
    """
    classes: list[Callable | tuple[Callable, str]] = [argparse.Namespace] if allow_namespace else []
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(classes):
            warnings.simplefilter("ignore")  # about kinds of files that are refused right after
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path} is refused: it would load {refused[1]}, which may run any code; expected tensors "
                f"and plain values only, so save its state dict alone with torch.save"
            ) from error
        raise UserError(
            f"{path} is no readable weights file: either torch.save did not write it, or it holds more than "
            f"tensors and plain values; save a state dict with torch.save"
        ) from error
    except Exception as error:  # torch raises many kinds for a file that is not what it should be
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is no readable weights file, or only a part of one ({reason}); get it again"
        ) from error
