"""Weights out as the official DINO code writes them: student and teacher with heads, or a bare encoder.

Of a run: `student` (names after `module.`, as its data-parallel wrapper has it), `teacher` and `epoch`, with
`backbone.*`, `head.*` and, which the official code does not know, `readout.*` of SPARO and beside the models
the number of attention heads, which weights do not tell. The weight norm of
the last layer has its older names, the only ones that the official code reads.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import UserError
from dino_sparo.files import write_file
from dino_sparo.interop.load import (
    is_checkpoint,
    is_exported,
    read_content,
    read_stored,
    stored_in,
    weights_path,
)
from dino_sparo.interop.official import HEAD_DIM, MODELS, NUM_HEADS
from dino_sparo.interop.stored import StoredEncoder, architecture
from dino_sparo.interop.timm_config import is_plain_sparo
from dino_sparo.models.head import OLD_NAMES
from dino_sparo.recipe.files import stored_recipe

SUFFIX = ".pth"
OFFICIAL_NAMES = {f"head.{new}": f"head.{old}" for old, new in OLD_NAMES.items()}


def write_official(
    source: Path, out: Path, which: str, *, arch: str | Mapping[str, int] | None = None
) -> str:
    """Write a run's student and teacher with heads, or the bare encoder of weights that have no heads.

    Args:
        source: run folder or checkpoint; or an exported folder or official weights, for the bare encoder.
        out: new file, NAME.pth.
        which: whose backbone; a run's file holds both models.
        arch: as for `load_encoder`.

    Returns:
        What was written, in words.

    Raises:
        UserError: the read-out has no official form, `out` is there already or has another ending, or the
            source does not fit.
        OSError: it cannot be written.
    """
    if out.suffix != SUFFIX:
        raise UserError(f"out is {out}, expected a file of the official style, so give NAME{SUFFIX}")
    if out.exists():
        raise UserError(f"out: {out} exists already; choose another name or remove it")
    source = weights_path(source)
    if is_exported(source):
        written: dict[str, Any] = bare_content(read_stored(source, which, arch=arch))
    else:
        content = read_content(source)
        if is_checkpoint(content):
            if which != "teacher":
                raise UserError(f"which is {which!r}, but {out} is to hold student and teacher; leave it out")
            for model in MODELS:
                stored_in(content, source, model, arch=arch).build()  # says what does not fit
            written = full_content(content, source)
        else:
            written = bare_content(stored_in(content, source, which, arch=arch))
    buffer = io.BytesIO()
    torch.save(written, buffer)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, buffer.getvalue())
    return "student and teacher with heads" if "teacher" in written else f"the {which}'s encoder"


def full_content(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The official form of one of our checkpoints; `epoch` is the number of whole epochs trained.

    Raises:
        UserError: the official style has no place for the read-out.
    """
    recipe = stored_recipe(state["config"], str(path))
    arguments = recipe.encoder_arguments()
    check_has_form(arguments, path)
    steps_per_epoch = state["images"]["num_images"] // recipe.optim.global_batch_size
    return {
        "student": {f"module.{name}": value for name, value in _official_names(state["student"]).items()},
        "teacher": _official_names(state["teacher"]),
        "epoch": state["step"] // steps_per_epoch,
        NUM_HEADS: architecture(arguments["arch"])["num_heads"],
    }


def bare_content(stored: StoredEncoder) -> dict[str, Tensor]:
    """The backbone by its bare names, as in `dino_deitsmall16_pretrain.pth`, and `readout.*` of SPARO.

    Raises:
        UserError: the official style has no place for the read-out, or the weights do not fit.
    """
    check_has_form(stored.arguments, stored.path)
    arch = architecture(stored.arguments["arch"])
    if arch["width"] != HEAD_DIM * arch["num_heads"]:
        raise UserError(
            f"{stored.path} has {arch['num_heads']} attention heads at width {arch['width']}, which a bare "
            f"official file cannot tell: whoever reads it takes one for {HEAD_DIM} numbers; export with "
            f"format timm"
        )
    return {name.removeprefix("backbone."): value for name, value in stored.build().state_dict().items()}


def check_has_form(arguments: Mapping[str, Any], path: Path) -> None:
    """Refuse a read-out, by the arguments of `build_encoder`, that official names cannot tell.

    Raises:
        UserError: it is such a one.
    """
    if arguments["readout"] != "cls" and not is_plain_sparo(arguments):
        options = " with options of its own" if arguments["readout"] == "sparo" else ""
        raise UserError(
            f"{path} has the read-out {arguments['readout']!r}{options}, but the official style holds cls "
            f"and plain sparo only; export it with format timm"
        )


def _official_names(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a DinoModel: `encoder.backbone.*` -> `backbone.*`, and so on."""
    return {OFFICIAL_NAMES.get(name, name.removeprefix("encoder.")): value for name, value in model.items()}
