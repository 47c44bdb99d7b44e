"""Encoders from files: our runs and checkpoints, exported folders, official DINO weights, timm's ViTs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.interop.export import CONFIG_FILE, OUR_KEY, WEIGHTS_FILE, read_exported
from dino_sparo.interop.official import MODELS, read_official
from dino_sparo.interop.stored import StoredEncoder
from dino_sparo.models import Encoder
from dino_sparo.recipe.files import stored_recipe
from dino_sparo.runs.checkpoint import (
    check_format,
    check_hash,
    load_latest,
    warn_of_missing_hash,
)
from dino_sparo.runs.plain_file import read_plain

SAFETENSORS = ".safetensors"


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
            `.safetensors` file, or a ViT's weights as the official DINO code or timm keep them (`.pth`,
            `.bin`, `.safetensors`).
        which: teacher or student.
        untrained: give random weights instead, as a baseline: those that a run of this seed begins with if
            no file starts it (of an official file: seed 0).
        arch: named size (or width, depth, num_heads) that the file must hold; such weights do not tell
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
    path = weights_path(path)
    if is_exported(path):
        stored = read_exported(path, which)
        stored.check_arch(arch)
        return stored
    return stored_in(read_content(path), path, which, arch=arch)


def weights_path(path: str | Path) -> Path:
    """The weights in an exported folder, of ours or timm's; any other path as it is."""
    path = Path(path)
    return path / WEIGHTS_FILE if (path / CONFIG_FILE).is_file() else path


def is_exported(path: Path) -> bool:
    """Whether it is weights of `dino-sparo export`; a `.safetensors` file may also be timm's.

    `path` is as `weights_path` gives it.
    """
    if path.suffix != SAFETENSORS:
        return False
    if not path.is_file() or _is_ours(path.with_name(CONFIG_FILE)):
        return True
    try:
        with safe_open(path, "pt") as file:
            return "cls_token" not in file.keys()  # noqa: SIM118 it is no mapping
    except (SafetensorError, OSError):
        return False  # and who reads it says why


def _is_ours(config_path: Path) -> bool:
    """Whether a config.json is not that of a model which timm alone has written."""
    try:
        config = json.loads(config_path.read_text())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    if not isinstance(config, dict) or OUR_KEY in config:
        return True
    return "sparo" in str(config.get("architecture", "sparo"))


def read_content(path: Path) -> Any:
    """What a run's newest checkpoint or a weights file holds, tensors and plain values only.

    Raises:
        UserFileNotFoundError: there is no such file, or no checkpoint in the folder.
        UserError: the file is damaged, refused, or a checkpoint of another format.
    """
    if path.suffix == SAFETENSORS:
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is no readable safetensors file, or only a part of one ({error}); get it again"
            ) from error
    if path.is_file():
        check_hash(path)
        content = read_plain(path, allow_namespace=True)
        if is_checkpoint(content):
            check_format(content, path)
            warn_of_missing_hash(path)
        return content
    if not path.exists():
        raise UserFileNotFoundError(
            f"{path} does not exist; expected a run folder, an exported folder, or a weights file"
        )
    state = load_latest(path, unverified=True)
    if state is None:
        raise UserFileNotFoundError(
            f"{path}: no checkpoint found; expected a run folder, an exported folder, or a weights file"
        )
    return state


def stored_in(
    content: Any,
    path: Path,
    which: str,
    *,
    arch: str | Mapping[str, int] | None = None,
    num_heads: int | None = None,
) -> StoredEncoder:
    """One network of such a content; `num_heads` is for weights that do not tell it.

    Raises:
        UserError: it is not there, or not as it should be.
    """
    if not is_checkpoint(content):
        return read_official(content, path, which, arch, num_heads=num_heads)
    stored = _of_checkpoint(content, path, which)
    stored.check_arch(arch)
    return stored


def is_checkpoint(content: Any) -> bool:
    """Whether what a file holds is a checkpoint of ours, not weights of the official code."""
    return isinstance(content, dict) and "format" in content


def _of_checkpoint(state: dict[str, Any], path: Path, which: str) -> StoredEncoder:
    prefix = "encoder."
    try:
        recipe = stored_recipe(state["config"], f"{path}: recipe")
        return StoredEncoder(
            path=path,
            arguments=recipe.encoder_arguments(),
            seed=recipe.seed,
            which=which,
            weights={k.removeprefix(prefix): v for k, v in state[which].items() if k.startswith(prefix)},
            beside={k: v for k, v in state[which].items() if not k.startswith(prefix)},
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole checkpoint of dino-sparo ({error!r}); give another") from error
