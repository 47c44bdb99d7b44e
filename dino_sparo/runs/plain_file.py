"""Files of `torch.save` read as tensors and plain values only: no code that a file brings is ever run."""

import argparse
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

from dino_sparo.errors import UserError

SHOWN_NAMES = 3
NUM_LEGACY_PICKLES = 5  # of the format before zip archives: magic number, version, machine, object, storages


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
        names = [refused[1]] if refused else _foreign_names(path)
        if names:
            raise UserError(
                f"{path} is refused: it would load {', '.join(names[:SHOWN_NAMES])}, which may run any code; "
                f"expected tensors and plain values only, so save its state dict alone with torch.save"
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


def _foreign_names(path: Path) -> list[str]:
    """What the pickles of a file would load besides torch's own, in order; nothing of them is run."""
    names: list[str] = []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    if member.endswith("data.pkl"):
                        with archive.open(member) as file:
                            names.extend(_loaded_names(file))
        else:
            with open(path, "rb") as file:
                for _ in range(NUM_LEGACY_PICKLES):
                    names.extend(_loaded_names(file))
    except Exception:  # the file is damaged, or no pickle follows: what was seen till then must do
        pass
    own = ("torch.", "collections.OrderedDict")
    return [name for name in dict.fromkeys(names) if not name.startswith(own)]


def _loaded_names(file: IO[bytes]) -> Iterator[str]:
    """The `module.name` of every object that one pickle would load, read up to its end."""
    texts: list[str] = []  # a newer pickle pushes module and name as texts, or takes them from its memo
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1] if texts else ""
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            texts.append(memo.get(int(argument or 0), ""))
        elif "UNICODE" in opcode.name:
            texts.append(str(argument))
