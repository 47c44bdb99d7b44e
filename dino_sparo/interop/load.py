"""Encoders from files: our runs and checkpoints, exported folders, official DINO weights, timm's ViTs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.interop.official import read_official
from dino_sparo.interop.stored import MODELS, StoredEncoder
from dino_sparo.interop.timm_folder import CONFIG_FILE, WEIGHTS_FILE, read_exported, read_safetensors
from dino_sparo.models import Encoder
from dino_sparo.recipe.files import stored_recipe
from dino_sparo.runs.checkpoint import (
    check_format,
    check_hash,
    load_latest,
    warn_of_missing_hash,
)
from dino_sparo.runs.plain_file import read_plain

EXPECTED = "expected a run folder, an exported folder, or a weights file"
ENCODER = "encoder."  # of its parameters in our checkpoints


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
        arch: named size (or width, depth, num_heads) that the file must hold; official weights do not tell
            their number of heads, which without it is one per 64 numbers of width.

    Raises:
        UserFileNotFoundError: there is no such file, or no checkpoint in the folder.
        UserError: the file is damaged or refused, does not hold what is asked for, or does not fit.
    """
    return network_in(path, which, arch=arch).build(untrained=untrained)


def network_in(
    path: str | Path, which: str = "teacher", *, arch: str | Mapping[str, int] | None = None
) -> StoredEncoder:
    """As `load_encoder`, before the encoder is built and the weights are compared with it."""
    return one_of(networks_in(path, arch=arch), which)


def networks_in(
    path: str | Path, *, arch: str | Mapping[str, int] | None = None, num_heads: int | None = None
) -> dict[str, StoredEncoder]:
    """All networks of a file, by teacher and student.

    Args:
        path, arch: as for `load_encoder`.
        num_heads: attention heads of official weights, if they are known from elsewhere.

    Raises:
        UserFileNotFoundError, UserError: as `load_encoder`.
    """
    path = Path(path)
    if (path / CONFIG_FILE).is_file():
        path = path / WEIGHTS_FILE
    in_safetensors = path.suffix == ".safetensors"
    content = read_safetensors(path) if in_safetensors else _read_content(path)
    exported = read_exported(content, path) if in_safetensors else None
    if exported:
        networks = {exported.which: exported}
    elif _is_checkpoint(content):
        networks = {which: _of_checkpoint(content, path, which) for which in MODELS}
    else:
        networks = read_official(content, path, arch=arch, num_heads=num_heads)
    for stored in networks.values():
        stored.check_arch(arch)
    return networks


def one_of(networks: Mapping[str, StoredEncoder], which: str) -> StoredEncoder:
    """One network of a file. Raises UserError if there is no such network, or the other one only."""
    if which not in MODELS:
        raise UserError(f"which is {which!r}, expected 'teacher' or 'student'")
    if which not in networks:
        (other,) = networks.values()
        raise UserError(
            f"{other.path} holds the {other.which} only; ask for which={other.which!r}, or give a file that "
            f"holds the {which}"
        )
    return networks[which]


def _read_content(path: Path) -> Any:
    """What a run's newest checkpoint or a file of torch.save holds, tensors and plain values only."""
    if path.is_file():
        check_hash(path)
        content = read_plain(path, allow_namespace=True)
        if _is_checkpoint(content):
            check_format(content, path)
            warn_of_missing_hash(path)
        return content
    if not path.exists():
        raise UserFileNotFoundError(f"{path} does not exist; {EXPECTED}")
    state = load_latest(path, unverified=True)
    if state is None:
        raise UserFileNotFoundError(f"{path}: no checkpoint found; {EXPECTED}")
    return state


def _is_checkpoint(content: Any) -> bool:
    """Whether what a file holds is a checkpoint of ours, not weights of the official code."""
    return isinstance(content, dict) and "format" in content


def _of_checkpoint(state: Mapping[str, Any], path: Path, which: str) -> StoredEncoder:
    """One network of a checkpoint of ours."""
    try:
        recipe = stored_recipe(state["config"], "its recipe")
        network, batch_size = state[which], recipe.optim.global_batch_size
        return StoredEncoder(
            path=path,
            arguments=recipe.encoder_arguments(),
            seed=recipe.seed,
            which=which,
            weights={k.removeprefix(ENCODER): v for k, v in network.items() if k.startswith(ENCODER)},
            beside={k: v for k, v in network.items() if not k.startswith(ENCODER)},
            epochs=state["step"] // (state["images"]["num_images"] // batch_size),
        )
    except (AttributeError, KeyError, TypeError, ZeroDivisionError, UserError) as error:
        reason = error if isinstance(error, UserError) else repr(error)
        raise UserError(f"{path} is no whole checkpoint of dino-sparo ({reason}); give another") from error
