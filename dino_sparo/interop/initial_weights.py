"""Initial weights of a run from a file with a ViT: which are copied, which are new, which are not used.

The rules, for student and teacher alike:

- The backbone must have the recipe's width, patch size, and number of heads (if the file contains it), and as
  many blocks as the recipe builds. A plain ViT may have one more, which a read-out with slots replaces. The
  final norm is then copied too, although it normalized the output of the block after.
- The position embedding is resized once to the recipe's image size, as in the official code.
- A read-out of the recipe's kind is copied, and must have its sizes; otherwise the read-out is new.
- The head is copied if it reads the same encoding and fits exactly; otherwise it is new.
- From a file with both networks, each gets its own; with a frozen backbone, both get the teacher's.

Optimizer, center, and schedules start from their initial state.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import UserError
from dino_sparo.interop.load import TIMM, networks_in, of_timm, one_of
from dino_sparo.interop.stored import StoredEncoder, check_finite, check_stored, misfits
from dino_sparo.models import DinoModel
from dino_sparo.models.encoder import WITH_SLOTS, architecture
from dino_sparo.models.head import OLD_NAMES

NOT_READOUT = ("arch", "patch_size", "image_size", "after_last_block")
DEFAULTS = {"heads": "separate", "group_size": 1}  # of read-outs, if a recipe or file omits them
PROTOTYPE_LENGTHS = OLD_NAMES["last_layer.weight_g"]
LENGTH_TOLERANCE = 0.01  # a moving average of ones is not exactly one


def read_networks(init: str, arguments: Mapping[str, Any]) -> list[StoredEncoder]:
    """The teacher of a file, and its student if it has one.

    Args:
        init: anything that `load_encoder` reads, or `timm:NAME`, which timm downloads.
        arguments: those of `build_encoder` for the recipe, which give the number of heads of weights without.

    Raises:
        UserError: there is no such file or model, or it is damaged or not allowed.
    """
    networks = of_timm(init, "init ") if init.startswith(TIMM) else networks_in(init, arguments["arch"])
    return [one_of(networks, "teacher"), *(networks[name] for name in networks if name == "student")]


@torch.no_grad()
def initialize_networks(
    student: DinoModel,
    teacher: DinoModel,
    stored: Sequence[StoredEncoder],
    arguments: Mapping[str, Any],
    *,
    norm_last_layer: bool,
    frozen: bool,
) -> str:
    """Copy initial weights into new networks, by the rules above; returns one line about what was copied.

    Args:
        stored: teacher, and student if there is one, from `read_networks`.
        arguments: those of `build_encoder` for both networks.
        norm_last_layer: whether their heads fix the norm of the prototypes.
        frozen: whether the backbones are not trained, so both must have the same weights.

    Raises:
        UserError: the file has other sizes, or contains what the rules do not cover; nothing is copied.
    """
    sources = stored[:1] if frozen else stored
    taken = [_taken(one, student, arguments, norm_last_layer=norm_last_layer) for one in sources]
    (of_teacher, told), (of_student, _) = taken[0], taken[-1]
    if of_teacher.keys() != of_student.keys():
        raise UserError(
            f"init {stored[0].path}: its student and teacher have different parameters; give a file with one "
            f"of them"
        )
    for model, parameters in ((teacher, of_teacher), (student, of_student)):
        model.load_state_dict(model.state_dict() | parameters)
    number = sum(value.numel() for value in of_teacher.values())
    own = "the student from the file's student and the teacher from its teacher"
    return (
        f"init {stored[0].path}: {number / 1e6:.2f} million parameters copied to student and teacher, "
        f"{own if len(taken) > 1 else 'the same to both'}; {told}"
    )


def _taken(
    stored: StoredEncoder, model: DinoModel, arguments: Mapping[str, Any], *, norm_last_layer: bool
) -> tuple[dict[str, Tensor], str]:
    """What is copied to a network, by the names of its parameters, and what is not, in words."""
    fresh, unused, remarks = [], [], []
    _check_sizes(stored, arguments)
    source, target = stored.build(), model.encoder  # `build` checks every name
    state = source.state_dict()
    num_blocks = len(target.backbone.blocks)
    _check_blocks(stored, len(source.backbone.blocks), num_blocks, arguments)
    if len(source.backbone.blocks) > num_blocks:
        replaced = f"backbone.blocks.{num_blocks}."
        state = {name: value for name, value in state.items() if not name.startswith(replaced)}
        unused.append(f"blocks.{num_blocks} (the read-out replaces it)")
        remarks.append(f"the final norm normalized the output of block {num_blocks} in the file")
    native, grid = source.backbone.native_grid, target.backbone.native_grid
    if native != grid:
        state["backbone.pos_embed"] = source.backbone.position_embedding(grid, grid)
        remarks.append(f"position embedding resized from {native} x {native} to {grid} x {grid} patches")
    same_readout = _same_readout(stored, arguments)
    if not same_readout:
        readout = [name for name in state if not name.startswith("backbone.")]
        if any(not name.startswith("backbone.") for name in target.state_dict()):
            fresh.append(f"read-out {arguments['readout']} (the file has {stored.arguments['readout']})")
        if readout:
            unused.append(f"read-out {stored.arguments['readout']} ({len(readout)} tensors)")
        state = {name: value for name, value in state.items() if name not in readout}
    parameters = {f"encoder.{name}": value for name, value in state.items()}
    head = {name.removeprefix("head."): v for name, v in stored.beside.items() if name.startswith("head.")}
    if reason := _why_not_head(head, model, same_readout=same_readout, norm_last_layer=norm_last_layer):
        fresh.append(f"head ({reason})")
        head = {}
    else:
        check_stored(head, f"init {stored.path}")
        check_finite(head, f"init {stored.path}")
    head = {f"head.{name}": value for name, value in head.items()}
    unused += stored.left_out(head)
    parameters |= head
    told = [
        f"new: {', '.join(fresh) or 'nothing'}",
        f"not used: {', '.join(unused) or 'nothing'}",
    ]
    return parameters, "; ".join([*told, *remarks])


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The values that differ, in words, for keys with these names."""
    return ", ".join(
        f"{name} {theirs.get(key)} (the recipe has {ours.get(key)})"
        for key, name in names.items()
        if theirs.get(key) != ours.get(key)
    )


def _check_sizes(stored: StoredEncoder, arguments: Mapping[str, Any]) -> None:
    """Raises UserError: width, number of heads, or patch size differ."""
    theirs, ours = (
        {**architecture(given["arch"]), "patch_size": given["patch_size"]}
        for given in (stored.arguments, arguments)
    )
    names = {"width": "width", "num_heads": "attention heads", "patch_size": "patch size"}
    if different := _differences(theirs, ours, names):
        raise UserError(
            f"init {stored.path} has {different}; set model.arch and model.patch_size to those of the file, "
            f"or give another file"
        )


def _check_blocks(stored: StoredEncoder, given: int, needed: int, arguments: Mapping[str, Any]) -> None:
    """Raises UserError: the number of blocks differs; a plain ViT may have one more, if it is replaced."""
    replaces = arguments["readout"] in WITH_SLOTS and not arguments.get("after_last_block", False)
    one_more = replaces and stored.arguments["readout"] not in WITH_SLOTS
    if given != needed and not (one_more and given == needed + 1):
        more = f", or {needed + 1} of a plain ViT, whose last one it replaces" if replaces else ""
        raise UserError(
            f"init {stored.path} has {given} blocks, but this recipe builds {needed} with read-out "
            f"{arguments['readout']}; expected {needed}{more}; change model.arch or give another file"
        )


def _same_readout(stored: StoredEncoder, arguments: Mapping[str, Any]) -> bool:
    """Whether the file's read-out is of the recipe's kind. Raises UserError: its sizes or options differ."""
    theirs, ours = (
        DEFAULTS | {key: v for key, v in given.items() if key not in NOT_READOUT and v is not None}
        for given in (stored.arguments, arguments)
    )
    if theirs["readout"] != ours["readout"]:
        return False
    if different := _differences(theirs, ours, {key: key for key in sorted(theirs.keys() | ours.keys())}):
        raise UserError(
            f"init {stored.path} has a read-out {theirs['readout']} with {different}; set model.readout to "
            f"that of the file, or give another file"
        )
    return True


def _why_not_head(
    head: Mapping[str, Any], model: DinoModel, *, same_readout: bool, norm_last_layer: bool
) -> str:
    """Why the head of a file, with the names of a DINOHead, is not copied; empty if it is."""
    if not any(name.startswith(("mlp.", "last_layer.")) for name in head):
        return "the file has none"
    if not same_readout:
        return "that of the file reads another encoding"
    if listed := misfits(head, model.head.state_dict()):
        return f"that of the file does not fit: {listed}"
    if norm_last_layer and (head[PROTOTYPE_LENGTHS] - 1).abs().max() > LENGTH_TOLERANCE:
        return "prototypes of the file do not have norm 1, which head.norm_last_layer requires"
    return ""
