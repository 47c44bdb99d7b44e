"""Load encoders from runs, checkpoints, exported folders, official DINO weights, and timm."""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dino_sparo.data.images import evaluation_input
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.files import did_you_mean, read_as
from dino_sparo.interop.official import NUM_HEADS, read_official
from dino_sparo.interop.stored import MODELS, StoredEncoder, in_words
from dino_sparo.interop.timm_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_exported,
    read_safetensors,
    warn_of_normalization,
)
from dino_sparo.models import Encoder
from dino_sparo.models.encoder import architecture
from dino_sparo.recipe.files import stored_recipe
from dino_sparo.runs.checkpoint import check_format, check_hash, load_latest, warn_of_missing_hash
from dino_sparo.runs.plain_file import read_plain
from dino_sparo.terminal import log, shown

EXPECTED = "expected a run folder, an exported folder, a weights file, or timm:NAME"
TIMM = "timm:"
NAME = re.compile(r"\w+(\.\w+)*", re.ASCII)  # a model of timm itself, not a location
OF_EXPERIMENT = ("seed", "views", "model", "head", "loss", "optim")  # sections of a recipe without data
ENCODER = "encoder."  # prefix of its parameters in checkpoints of ours


def load_encoder(
    path: str | Path,
    which: str = "teacher",
    *,
    untrained: bool = False,
    arch: str | Mapping[str, int] | None = None,
) -> Encoder:
    """Load an encoder in evaluation mode, on the CPU; its `transform` converts an image to its input.

    Args:
        path: run folder (its newest complete checkpoint), checkpoint file, exported folder or its
            `.safetensors` file, or a ViT's weights in the format of the official DINO code or timm (`.pth`,
            `.bin`, `.safetensors`); or `timm:NAME`, a pretrained ViT that timm downloads.
        which: teacher or student.
        untrained: return random weights instead, as a baseline: the initial weights of a run with this seed
            and without `init` (of an official file: seed 0).
        arch: named size (or width, depth, num_heads) that the file must have; official weights do not
            contain their number of heads, which without `arch` is one per 64 dimensions.

    Raises:
        UserFileNotFoundError: there is no such file, or no checkpoint in the folder.
        UserError: the file is damaged or not allowed, does not contain what is asked for, or does not fit.
    """
    stored = one_of(networks_in(path, arch), which, arch)
    if stored.epochs is None and (left_out := stored.left_out()):  # every run has a head
        log.info("%s: not used: %s", path, ", ".join(left_out))
    encoder = stored.build(untrained=untrained)
    encoder.transform = partial(evaluation_input, size=encoder.image_size, value_range=encoder.value_range)
    return encoder


def networks_in(path: str | Path, arch: str | Mapping[str, int] | None = None) -> dict[str, StoredEncoder]:
    """All networks in a file, by teacher and student.

    Args:
        path: as for `load_encoder`.
        arch: gives the number of heads of official weights with its width; it is not checked.

    Raises:
        UserFileNotFoundError, UserError: as `load_encoder`.
    """
    if str(path).startswith(TIMM):
        return of_timm(str(path))
    path = Path(path)
    if (path / CONFIG_FILE).is_file():
        path = path / WEIGHTS_FILE
    if path.suffix == ".safetensors":
        weights = read_safetensors(path)
        exported = read_exported(weights, path)
        if isinstance(exported, StoredEncoder):
            return {exported.which: exported}
        return read_official({"model": weights, NUM_HEADS: exported}, path, arch)
    if not path.exists():
        raise UserFileNotFoundError(f"{path} does not exist{did_you_mean(path)}; {EXPECTED}")
    if path.is_dir():
        state = load_latest(path, unverified=True)
        if state is None:
            raise UserFileNotFoundError(f"{path}: no checkpoint found; {EXPECTED}")
    else:
        check_hash(path)
        state = read_plain(path, allow_namespace=True)
        if not isinstance(state, dict) or "format" not in state:  # not a checkpoint of ours
            return read_official(state, path, arch)
        check_format(state, path)
        warn_of_missing_hash(path)
    return {which: _of_checkpoint(state, path, which) for which in MODELS}


def of_timm(name: str, key: str = "") -> dict[str, StoredEncoder]:
    """The pretrained ViT `timm:NAME`, which timm downloads the first time. `key` is for messages."""
    import timm

    what = f"{key}{shown(repr(name))}"
    if not NAME.fullmatch(name.removeprefix(TIMM)):
        raise UserError(
            f"{what} is not a model of timm itself; expected a name from timm.list_pretrained('vit*'), such "
            f"as timm:vit_small_patch16_224.dino; give other weights as a file"
        )
    try:
        model = timm.create_model(name.removeprefix(TIMM), pretrained=True)
    except Exception as error:  # network, hub, and timm raise many types
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{what} cannot be loaded from timm ({reason}); check the name (timm.list_pretrained('vit*')) "
            f"and the network, or give a weights file"
        ) from error
    if not isinstance(model, timm.models.VisionTransformer):
        raise UserError(f"{what} is a {type(model).__name__}; expected a plain VisionTransformer of timm")
    warn_of_normalization(getattr(model, "pretrained_cfg", None), f"{key}{name}")
    attention: Any = model.get_submodule("blocks.0.attn")
    return read_official({"model": model.state_dict(), NUM_HEADS: attention.num_heads}, Path(name))


def one_of(
    networks: Mapping[str, StoredEncoder], which: str, arch: str | Mapping[str, int] | None = None
) -> StoredEncoder:
    """One network of a file. Raises UserError: it is not in the file, or has another architecture."""
    if which not in MODELS:
        raise UserError(f"which is {which!r}, expected 'teacher' or 'student'")
    if which not in networks:
        (other,) = networks.values()
        raise UserError(
            f"{other.path} contains only the {other.which}; use which={other.which!r} where that is an "
            f"option, or give a file with the {which}"
        )
    stored = networks[which]
    if arch is not None and architecture(arch) != architecture(stored.arguments["arch"]):
        raise UserError(
            f"arch is {arch!r} ({in_words(arch)}), but {stored.path} has "
            f"{in_words(stored.arguments['arch'])}; leave arch out, or give weights of that architecture"
        )
    return stored


def _name_of(path: str) -> str:
    """The name of a folder or file without its location on this machine; datasets by name unchanged."""
    return shown(path if path.startswith(("hub:", TIMM)) else Path(path).name)


def _of_checkpoint(state: Mapping[str, Any], path: Path, which: str) -> StoredEncoder:
    """One network of a checkpoint."""
    with read_as(f"{path} is not a complete checkpoint of dino-sparo", "give another file"):
        recipe = stored_recipe(
            state["config"], f"{path} is not a complete checkpoint of dino-sparo: its recipe"
        )
        network, batch_size = state[which], recipe.optim.global_batch_size
        return StoredEncoder(
            path=path,
            arguments=recipe.encoder_arguments(),
            seed=recipe.seed,
            which=which,
            weights={k.removeprefix(ENCODER): v for k, v in network.items() if k.startswith(ENCODER)},
            beside={k: v for k, v in network.items() if not k.startswith(ENCODER)},
            value_range=recipe.data.value_range,
            epochs=(epochs := int(state["step"] // (state["images"]["num_images"] // batch_size))),
            trained={
                "data": f"{_name_of(recipe.data.path)}, {state['images']['num_images']} images",
                "epochs": str(epochs),
                "recipe": json.dumps(
                    {name: value for name, value in recipe.as_dict().items() if name in OF_EXPERIMENT}
                    | {"init": recipe.init and _name_of(recipe.init)}
                ),
            },
        )
