"""Load files of `torch.save` as tensors and plain values only, so that no code in a file is run."""

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

MOST_PICKLE = 2 * 2**20  # bytes of the pickle, which describes the tensors; ViT-B with optimizer has 0.2 MB
LONG_PICKLE = f"its pickle has more than {MOST_PICKLE} bytes"


def read_plain(path: Path, *, allow_namespace: bool = False) -> Any:
    """Load a file of `torch.save` (zip archive or the older format) to the CPU.

    Args:
        allow_namespace: allow `argparse.Namespace`, which full checkpoints of the official code contain.

    Raises:
        UserError: it cannot be read, or contains anything else than tensors and plain values.
    """
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise UserError(f"{path} is not a regular file; give a weights file")
    classes: list[Callable | tuple[Callable, str]] = [argparse.Namespace] if allow_namespace else []
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(classes):
            warnings.simplefilter("ignore")  # about TorchScript files, which are refused anyway
            with _Counted(io.FileIO(path)) as file:
                if file.peek(4).startswith(b"PK\3\4"):  # a zip archive, by the same test as in torch
                    _check_archive(path)
                return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UserError(
                f"{path} is refused: it would load {shown(refused[1])}, which may run any code; expected "
                f"tensors and plain values only, so save only its state dict with torch.save"
            ) from error
        raise UserError(
            f"{path} is not a readable weights file: it was not written by torch.save, or contains more than "
            f"tensors and plain values; save a state dict with torch.save"
        ) from error
    except Exception as error:  # torch raises many types of errors for damaged files
        reason = (str(error).splitlines() or [""])[0]
        if not reason or "weights_only" in reason:  # torch's advice to load the file unsafely
            reason = type(error).__name__
        raise UserError(
            f"{path} is not a readable weights file, or incomplete ({reason}); copy or download it again"
        ) from error


def _check_archive(path: Path) -> None:
    """Raise a UserError for a zip archive that would fill the memory; errors of `zipfile` pass."""
    reason = None
    with zipfile.ZipFile(path) as archive:
        size, entries = path.stat().st_size, archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
        if unpacked > size:
            reason = f"its {size} bytes unpack to {unpacked}, but torch.save does not compress"
        elif any(entry.file_size > MOST_PICKLE for entry in pickles):
            reason = LONG_PICKLE
        elif any(b"bytearray" in archive.read(entry) for entry in pickles):  # bytearray(n) allocates n bytes
            reason = "it contains a bytearray"
    if reason:
        raise UserError(f"{path} is refused: {reason}; save only its state dict with torch.save")


class _Counted(io.BufferedReader):
    """A file that limits the bytes read by `read`, as torch reads pickles but not tensors."""

    left = MOST_PICKLE

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(LONG_PICKLE)
        return data
