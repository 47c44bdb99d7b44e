"""Encoders from files: our runs and checkpoints, exported folders, and official DINO weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.interop.export import CONFIG_FILE, WEIGHTS_FILE, read_exported
from dino_sparo.interop.official import MODELS, read_official
from dino_sparo.interop.stored import StoredEncoder
from dino_sparo.models import Encoder
from dino_sparo.training.checkpoint import check_format, check_hash, encoder_arguments, load_latest
from dino_sparo.training.plain_file import read_plain


def load_encoder(
    path: str | Path,
    which: str = "teacher",
    *,
    untrained: bool = False,
    arch: str | Mapping[str, int] | None = None,
) -> Encoder:
    """Load an encoder in evaluation mode, on the CPU.

    Args:
        path: run folder (its newest whole checkpoint), checkpoint file, exported folder or its
            `.safetensors` file, or ViT weights of the official DINO code (`.pth`).
        which: teacher or student.
        untrained: give the weights that the run began with instead, as a baseline (of an official file: the
            initial weights of seed 0).
        arch: named size (or width, depth, num_heads) that the file must hold; official weights do not tell
            their number of heads, which without it is one for 64 numbers of width.

    Raises:
        UserFileNotFoundError: there is no such file, or no checkpoint in the folder.
        UserError: the file is damaged or refused, does not hold what is asked for, or does not fit.
    """
    return read_stored(path, which, arch=arch).build(untrained=untrained)


def read_stored(
    path: str | Path, which: str = "teacher", *, arch: str | Mapping[str, int] | None = None
) -> StoredEncoder:
    """As `load_encoder`, before the encoder is built and the weights are compared with it."""
    if which not in MODELS:
        raise UserError(f"which is {which!r}, expected 'teacher' or 'student'")
    path = Path(path)
    if not is_exported(path):
        return stored_in(read_content(path), path, which, arch)
    stored = read_exported(path if path.suffix == ".safetensors" else path / WEIGHTS_FILE, which)
    stored.check_arch(arch)
    return stored


def is_exported(path: Path) -> bool:
    """Whether a path is an exported folder or its weights."""
    return path.suffix == ".safetensors" or (path / CONFIG_FILE).is_file()


def read_content(path: Path) -> Any:
    """What a file of torch.save holds, or the newest whole checkpoint of a run folder.

    Raises:
        UserFileNotFoundError: there is no such file, or no checkpoint in the folder.
        UserError: it is damaged, refused, or a checkpoint of another format.
    """
    if path.is_file():
        check_hash(path)
        content = read_plain(path, allow_namespace=True)
        if is_checkpoint(content):
            check_format(content, path)
        return content
    state = load_latest(path)
    if state is None:
        raise UserFileNotFoundError(
            f"{path}: no checkpoint found; expected a run folder, an exported folder, or a weights file"
        )
    return state


def stored_in(
    content: Any, path: Path, which: str, arch: str | Mapping[str, int] | None = None
) -> StoredEncoder:
    """The encoder in what `read_content` gives; path is for messages.

    Raises:
        UserError: it does not hold what is asked for.
    """
    if not is_checkpoint(content):
        return read_official(content, path, which, arch)
    stored = _of_checkpoint(content, path, which)
    stored.check_arch(arch)
    return stored


def is_checkpoint(content: Any) -> bool:
    """Whether what a file holds is a checkpoint of ours, not weights of the official code."""
    return isinstance(content, dict) and "format" in content


def _of_checkpoint(state: dict[str, Any], path: Path, which: str) -> StoredEncoder:
    prefix = "encoder."
    try:
        return StoredEncoder(
            path=path,
            arguments=encoder_arguments(state["config"]),
            seed=state["config"]["seed"],
            which=which,
            weights={k.removeprefix(prefix): v for k, v in state[which].items() if k.startswith(prefix)},
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole checkpoint of dino-sparo ({error!r}); give another") from error
