"""Starting weights of a run, from whatever holds a ViT: what is taken, what begins fresh, what stays unused.

The rules, for student and teacher alike:

- The backbone must be of the recipe's width, patch size and number of heads (where the file tells it), with
  as many blocks as the recipe builds. Of a plain ViT the last block may be one too many: a read-out with
  slots replaces it. The final norm is then taken too, though it has normalized the output of another depth.
- The position embedding is resized once to the recipe's image size, as the official code resizes it.
- A read-out of the recipe's kind is taken, and must have its sizes; otherwise the read-out is fresh.
- The head is taken if it reads the same encoding and fits exactly; else it is fresh.
- Each network takes its own of a file with both; a frozen backbone needs one for both, the teacher's.

Optimizer, center and schedules begin anew.
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
DEFAULTS = {"heads": "separate", "group_size": 1}  # of read-outs, where a recipe or file leaves them out
PROTOTYPE_LENGTHS = OLD_NAMES["last_layer.weight_g"]
LENGTH_TOLERANCE = 0.01  # an average of ones over a long training is not exactly one


def read_networks(init: str, arguments: Mapping[str, Any]) -> list[StoredEncoder]:
    """The teacher of a file, and its student if it has one.

    Args:
        init: anything that `load_encoder` reads, or `timm:NAME`, which timm downloads.
        arguments: those of `build_encoder` for the recipe; weights that do not tell their number of heads
            have its.

    Raises:
        UserError: there is no such file or model, or it is damaged or refused.
    """
    networks = of_timm(init, "init ") if init.startswith(TIMM) else networks_in(init, arguments["arch"])
    return [one_of(networks, "teacher"), *(networks[name] for name in networks if name == "student")]


@torch.no_grad()
def start_networks(
    student: DinoModel,
    teacher: DinoModel,
    stored: Sequence[StoredEncoder],
    arguments: Mapping[str, Any],
    *,
    norm_last_layer: bool,
    frozen: bool,
) -> str:
    """Put starting weights into fresh networks, by the rules above, and tell in one line what was taken.

    Args:
        stored: teacher, and maybe student, as `read_networks` gives them.
        arguments: those of `build_encoder` for both networks.
        norm_last_layer: whether their heads fix the prototypes' length.
        frozen: whether the backbones never learn, so that both must have the same.

    Raises:
        UserError: the file has other sizes, or holds anything that the rules do not explain; nothing is put.
    """
    sources = stored[:1] if frozen else stored
    taken = [_taken(one, student, arguments, norm_last_layer=norm_last_layer) for one in sources]
    (of_teacher, told), (of_student, _) = taken[0], taken[-1]
    if of_teacher.keys() != of_student.keys():
        raise UserError(
            f"init {stored[0].path}: its student and teacher differ in what they hold; give one of them alone"
        )
    for model, parameters in ((teacher, of_teacher), (student, of_student)):
        model.load_state_dict(model.state_dict() | parameters)
    number = sum(value.numel() for value in of_teacher.values())
    return (
        f"init {stored[0].path}: {number / 1e6:.2f} million parameters taken, by student and teacher "
        f"{'each its own' if len(taken) > 1 else 'alike'}; {told}"
    )


def _taken(
    stored: StoredEncoder, model: DinoModel, arguments: Mapping[str, Any], *, norm_last_layer: bool
) -> tuple[dict[str, Tensor], str]:
    """What a network takes, by the names of its parameters, and what it does not, in words."""
    fresh, unused, remarks = [], [], []
    _check_sizes(stored, arguments)
    source, target = stored.build(), model.encoder  # `build` is strict about every name
    state = source.state_dict()
    num_blocks = len(target.backbone.blocks)
    _check_blocks(stored, len(source.backbone.blocks), num_blocks, arguments)
    if len(source.backbone.blocks) > num_blocks:
        replaced = f"backbone.blocks.{num_blocks}."
        state = {name: value for name, value in state.items() if not name.startswith(replaced)}
        unused.append(f"blocks.{num_blocks} (the read-out replaces it)")
        remarks.append(f"the final norm has normalized the output of block {num_blocks} there")
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
        f"fresh: {', '.join(fresh) or 'nothing'}",
        f"unused of the file: {', '.join(unused) or 'nothing'}",
    ]
    return parameters, "; ".join([*told, *remarks])


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The values that differ, of these keys, whose names for a reader are given."""
    return ", ".join(
        f"{name} {theirs.get(key)} (the recipe has {ours.get(key)})"
        for key, name in names.items()
        if theirs.get(key) != ours.get(key)
    )


def _check_sizes(stored: StoredEncoder, arguments: Mapping[str, Any]) -> None:
    """Refuse another width, number of heads or patch size."""
    theirs, ours = (
        {**architecture(given["arch"]), "patch_size": given["patch_size"]}
        for given in (stored.arguments, arguments)
    )
    names = {"width": "width", "num_heads": "attention heads", "patch_size": "patch size"}
    if different := _differences(theirs, ours, names):
        raise UserError(
            f"init {stored.path} holds {different}; set model.arch and model.patch_size to what the file "
            f"has, or give another file"
        )


def _check_blocks(stored: StoredEncoder, given: int, needed: int, arguments: Mapping[str, Any]) -> None:
    """Refuse another number of blocks; a plain ViT may have one more, which a read-out replaces."""
    replaces = arguments["readout"] in WITH_SLOTS and not arguments.get("after_last_block", False)
    one_more = replaces and stored.arguments["readout"] not in WITH_SLOTS
    if given != needed and not (one_more and given == needed + 1):
        more = f", or {needed + 1} of a plain ViT, whose last one it replaces" if replaces else ""
        raise UserError(
            f"init {stored.path} holds {given} blocks, but this recipe builds {needed} with read-out "
            f"{arguments['readout']}; expected {needed}{more}, so change model.arch or give another file"
        )


def _same_readout(stored: StoredEncoder, arguments: Mapping[str, Any]) -> bool:
    """Whether the file's read-out is of the recipe's kind; then refuse other sizes or choices."""
    theirs, ours = (
        DEFAULTS | {key: v for key, v in given.items() if key not in NOT_READOUT and v is not None}
        for given in (stored.arguments, arguments)
    )
    if theirs["readout"] != ours["readout"]:
        return False
    if different := _differences(theirs, ours, {key: key for key in sorted(theirs.keys() | ours.keys())}):
        raise UserError(
            f"init {stored.path} holds a read-out {theirs['readout']} with {different}; set model.readout to "
            f"what the file has, or give another file"
        )
    return True


def _why_not_head(
    head: Mapping[str, Any], model: DinoModel, *, same_readout: bool, norm_last_layer: bool
) -> str:
    """Why the head of a file, by the names of a DINOHead, begins fresh; empty if it is taken."""
    if not any(name.startswith(("mlp.", "last_layer.")) for name in head):
        return "the file has none"
    if not same_readout:
        return "the file's reads another encoding"
    if listed := misfits(head, model.head.state_dict()):
        return f"the file's does not fit: {listed}"
    if norm_last_layer and (head[PROTOTYPE_LENGTHS] - 1).abs().max() > LENGTH_TOLERANCE:
        return "the prototypes of the file's are not of length 1, as head.norm_last_layer wants"
    return ""
