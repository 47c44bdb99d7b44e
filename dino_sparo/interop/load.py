"""Encoders from files: our runs and checkpoints, exported folders, official DINO weights, timm's ViTs."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.interop.official import read_official
from dino_sparo.interop.stored import MODELS, StoredEncoder, in_words
from dino_sparo.interop.timm_folder import CONFIG_FILE, WEIGHTS_FILE, read_exported, read_safetensors
from dino_sparo.models import Encoder
from dino_sparo.models.encoder import architecture
from dino_sparo.recipe.files import stored_recipe
from dino_sparo.runs.checkpoint import check_format, check_hash, load_latest, warn_of_missing_hash
from dino_sparo.runs.plain_file import read_plain

log = logging.getLogger("dino_sparo")

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
    stored = one_of(networks_in(path, arch), which, arch)
    if stored.epochs is None and (left_out := stored.left_out()):  # every run has a head
        log.info("%s: left out: %s", path, ", ".join(left_out))
    return stored.build(untrained=untrained)


def networks_in(path: str | Path, arch: str | Mapping[str, int] | None = None) -> dict[str, StoredEncoder]:
    """All networks of a file, by teacher and student.

    Args:
        path: as for `load_encoder`.
        arch: tells the number of heads of official weights of its width; nothing is checked against it.

    Raises:
        UserFileNotFoundError, UserError: as `load_encoder`.
    """
    path = Path(path)
    if (path / CONFIG_FILE).is_file():
        path = path / WEIGHTS_FILE
    if path.suffix == ".safetensors":
        weights = read_safetensors(path)
        exported = read_exported(weights, path)
        return {exported.which: exported} if exported else read_official(weights, path, arch)
    if not path.exists():
        raise UserFileNotFoundError(f"{path} does not exist; {EXPECTED}")
    if path.is_dir():
        state = load_latest(path, unverified=True)
        if state is None:
            raise UserFileNotFoundError(f"{path}: no checkpoint found; {EXPECTED}")
    else:
        check_hash(path)
        state = read_plain(path, allow_namespace=True)
        if not isinstance(state, dict) or "format" not in state:  # none of our checkpoints
            return read_official(state, path, arch)
        check_format(state, path)
        warn_of_missing_hash(path)
    return {which: _of_checkpoint(state, path, which) for which in MODELS}


def one_of(
    networks: Mapping[str, StoredEncoder], which: str, arch: str | Mapping[str, int] | None = None
) -> StoredEncoder:
    """One network of a file. Raises UserError if there is none, or one of another architecture."""
    if which not in MODELS:
        raise UserError(f"which is {which!r}, expected 'teacher' or 'student'")
    if which not in networks:
        (other,) = networks.values()
        raise UserError(
            f"{other.path} holds the {other.which} only; ask for which={other.which!r}, or give a file that "
            f"holds the {which}"
        )
    stored = networks[which]
    if arch is not None and architecture(arch) != architecture(stored.arguments["arch"]):
        raise UserError(
            f"arch is {arch!r} ({in_words(arch)}), but {stored.path} holds "
            f"{in_words(stored.arguments['arch'])}; leave arch out, or give the weights of that architecture"
        )
    return stored


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
            epochs=int(state["step"] // (state["images"]["num_images"] // batch_size)),
        )
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = error if isinstance(error, UserError) else repr(error)
        raise UserError(f"{path} is no whole checkpoint of dino-sparo ({reason}); give another") from error
