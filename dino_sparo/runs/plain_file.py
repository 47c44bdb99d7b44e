"""Files of `torch.save` read as tensors and plain values only: no code that a file brings is ever run."""

import argparse
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dino_sparo.errors import UserError
from dino_sparo.terminal import shown

MOST_PICKLE = 2 * 2**20  # bytes that describe the tensors; those of a ViT-B with optimizer are 0.2 MB
LONG_PICKLE = f"it describes its content in more than {MOST_PICKLE} bytes"


def read_plain(path: Path, *, allow_namespace: bool = False) -> Any:
    """Read a file of `torch.save`, zip archive or the older format, to the CPU.

    Args:
        allow_namespace: let it hold `argparse.Namespace`, as full checkpoints of the official code do.

    Raises:
        UserError: it cannot be read, or is refused because it would load more than plain values (named).
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait, a device may never end
        raise UserError(f"{path} is no regular file; give a weights file")
    classes: list[Callable | tuple[Callable, str]] = [argparse.Namespace] if allow_namespace else []
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(classes):
            warnings.simplefilter("ignore")  # about kinds of files that are refused right after
            with _Counted(io.FileIO(path)) as file:
                if file.peek(4).startswith(b"PK\3\4"):  # as torch tells its two formats apart
                    _check_archive(path)
                return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path} is refused: it would load {shown(refused[1])}, which may run any code; expected "
                f"tensors and plain values only, so save its state dict alone with torch.save"
            ) from error
        raise UserError(
            f"{path} is no readable weights file: either torch.save did not write it, or it holds more than "
            f"tensors and plain values; save a state dict with torch.save"
        ) from error
    except Exception as error:  # torch raises many kinds for a file that is not what it should be
        reason = (str(error).splitlines() or [""])[0]
        if not reason or "weights_only" in reason:  # torch's advice to run whatever the file brings
            reason = type(error).__name__
        raise UserError(
            f"{path} is no readable weights file, or only a part of one ({reason}); get it again"
        ) from error


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that would fill the memory. Raises UserError, and what `zipfile` raises."""
    reason = None
    with zipfile.ZipFile(path) as archive:
        size, entries = path.stat().st_size, archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if unpacked > size:
            reason = f"its {size} bytes unpack to {unpacked}, but torch.save compresses nothing"
        elif any(entry.file_size > MOST_PICKLE for entry in pickles):
            reason = LONG_PICKLE
        elif any(b"bytearray" in archive.read(entry) for entry in pickles):  # a number makes it of any size
            reason = "it holds a bytearray"
    if reason:
        raise UserError(f"{path} is refused: {reason}; save its state dict alone with torch.save")


class _Counted(io.BufferedReader):
    """A file whose pickles, which torch reads by `read`, may not be long; tensors are read otherwise."""

    left = MOST_PICKLE

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(LONG_PICKLE)
        return data
