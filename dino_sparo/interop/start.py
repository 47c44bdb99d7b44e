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

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import UserError
from dino_sparo.interop.load import networks_in, one_of
from dino_sparo.interop.official import read_official
from dino_sparo.interop.stored import StoredEncoder, architecture, misfits
from dino_sparo.models import DinoModel
from dino_sparo.models.encoder import WITH_SLOTS
from dino_sparo.models.head import OLD_NAMES

log = logging.getLogger("dino_sparo")

TIMM = "timm:"
NOT_READOUT = ("arch", "patch_size", "image_size", "after_last_block")
DEFAULTS = {"heads": "separate", "group_size": 1}  # of read-outs, where a recipe or file leaves them out
PROTOTYPE_LENGTHS = OLD_NAMES["last_layer.weight_g"]
LENGTH_TOLERANCE = 0.01  # an average of ones over a long training is not exactly one


@dataclass
class StartingWeights:
    """What one network takes of a file: parameters of a DinoModel by name, and the rest in words."""

    parameters: dict[str, Tensor]
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_networks(init: str, arguments: Mapping[str, Any]) -> list[StoredEncoder]:
    """The teacher of a file, and its student if it has one.

    Args:
        init: anything that `load_encoder` reads, or `timm:NAME`, which timm downloads.
        arguments: those of `build_encoder` for the recipe; weights without a number of heads have its.

    Raises:
        UserError: there is no such file or model, or it is damaged or refused.
    """
    if init.startswith(TIMM):
        content, num_heads = _from_timm(init.removeprefix(TIMM))
        networks = read_official(content, Path(init), num_heads=num_heads)
    else:
        networks = networks_in(init, num_heads=architecture(arguments["arch"])["num_heads"])
    return [one_of(networks, "teacher"), *(networks[name] for name in networks if name == "student")]


def _from_timm(name: str) -> tuple[dict[str, Tensor], int]:
    """State dict and number of heads of a pretrained model, which timm downloads if it is not there yet."""
    import timm

    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # of the network, the hub or timm: there are many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"init {TIMM + name!r} cannot be had from timm ({reason}); check the name "
            f"(timm.list_pretrained('vit*')) and the network, or give a weights file"
        ) from error
    if not isinstance(model, timm.models.VisionTransformer):
        raise UserError(
            f"init {TIMM + name!r} is a {type(model).__name__}; expected a plain VisionTransformer of timm"
        )
    expected = {"mean": timm.data.IMAGENET_DEFAULT_MEAN, "std": timm.data.IMAGENET_DEFAULT_STD}
    told: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    other = [f"{key} {told[key]}" for key, value in expected.items() if tuple(told.get(key, value)) != value]
    if other:
        log.warning(
            "WARNING: init %s%s was trained on images normalized by %s, here they are by ImageNet's",
            *(TIMM, name, " and ".join(other)),
        )
    attention: Any = model.get_submodule("blocks.0.attn")
    return model.state_dict(), attention.num_heads


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
    taken = [_starting_weights(one, student, arguments, norm_last_layer=norm_last_layer) for one in sources]
    first, last = taken[0], taken[-1]
    if first.parameters.keys() != last.parameters.keys():
        raise UserError(
            f"init {stored[0].path}: its student and teacher differ in what they hold; give one of them alone"
        )
    for model, part in ((teacher, first), (student, last)):
        model.load_state_dict(model.state_dict() | part.parameters)
    number = sum(value.numel() for value in first.parameters.values())
    shared = "each its own" if len(taken) > 1 else "alike"
    parts = [
        f"{number / 1e6:.2f} million parameters taken, by student and teacher {shared}",
        f"fresh: {', '.join(first.fresh) or 'nothing'}",
        f"unused of the file: {', '.join(first.unused) or 'nothing'}",
        *first.remarks,
    ]
    return f"init {stored[0].path}: {'; '.join(parts)}"


def _starting_weights(
    stored: StoredEncoder, model: DinoModel, arguments: Mapping[str, Any], *, norm_last_layer: bool
) -> StartingWeights:
    """What a network takes; nothing about it changes."""
    _check_sizes(stored, arguments)
    source, target = stored.build(), model.encoder  # `build` is strict about every name
    num_blocks = len(target.backbone.blocks)
    dropped = _blocks_dropped(stored, len(source.backbone.blocks), num_blocks, arguments)
    unwanted = tuple(f"backbone.blocks.{number}." for number in dropped)
    state = {name: v for name, v in source.state_dict().items() if not name.startswith(unwanted)}
    readout = [name for name in state if not name.startswith("backbone.")]
    same_readout = _same_readout(stored, arguments)
    taken = StartingWeights(
        {f"encoder.{name}": v for name, v in state.items() if same_readout or name not in readout}
    )
    for number in dropped:
        taken.unused.append(f"blocks.{number} (the read-out replaces it)")
        taken.remarks.append(f"the final norm has normalized the output of block {number} there")
    native, grid = source.backbone.native_grid, target.backbone.native_grid
    if native != grid:
        taken.parameters["encoder.backbone.pos_embed"] = source.backbone.position_embedding(grid, grid)
        taken.remarks.append(
            f"position embedding resized from {native} x {native} to {grid} x {grid} patches"
        )
    if not same_readout:
        if any(not name.startswith("backbone.") for name in target.state_dict()):
            taken.fresh.append(
                f"read-out {arguments['readout']} (the file has {stored.arguments['readout']})"
            )
        if readout:
            taken.unused.append(f"read-out {stored.arguments['readout']} ({len(readout)} tensors)")
    head = {name.removeprefix("head."): v for name, v in stored.beside.items() if name.startswith("head.")}
    reason = _why_not_head(head, model, same_readout=same_readout, norm_last_layer=norm_last_layer)
    if not reason:
        taken.parameters |= {f"head.{name}": value for name, value in head.items()}
        return taken
    taken.fresh.append(f"head ({reason})")
    kinds = [name.partition(".")[0] for name in stored.beside]
    taken.unused += [f"{kind} ({kinds.count(kind)} tensors)" for kind in dict.fromkeys(kinds)]
    return taken


def _check_sizes(stored: StoredEncoder, arguments: Mapping[str, Any]) -> None:
    """Refuse another width, number of heads or patch size."""
    ours, theirs = (
        {**architecture(given["arch"]), "patch_size": given["patch_size"]}
        for given in (arguments, stored.arguments)
    )
    names = {"width": "width", "num_heads": "attention heads", "patch_size": "patch size"}
    different = [
        f"{name} {theirs[key]} (the recipe has {ours[key]})"
        for key, name in names.items()
        if theirs[key] != ours[key]
    ]
    if different:
        raise UserError(
            f"init {stored.path} holds {', '.join(different)}; set model.arch and model.patch_size to "
            f"what the file has, or give another file"
        )


def _blocks_dropped(
    stored: StoredEncoder, given: int, needed: int, arguments: Mapping[str, Any]
) -> list[int]:
    """Numbers of the blocks that the file has and the recipe replaces, at most one."""
    replaces = arguments["readout"] in WITH_SLOTS and not arguments.get("after_last_block", False)
    one_more = replaces and stored.arguments["readout"] not in WITH_SLOTS
    if given != needed and not (one_more and given == needed + 1):
        more = f", or {needed + 1} of a plain ViT, whose last one it replaces" if replaces else ""
        raise UserError(
            f"init {stored.path} holds {given} blocks, but this recipe builds {needed} with read-out "
            f"{arguments['readout']}; expected {needed}{more}, so change model.arch or give another file"
        )
    return list(range(needed, given))


def _same_readout(stored: StoredEncoder, arguments: Mapping[str, Any]) -> bool:
    """Whether the file's read-out is of the recipe's kind.

    Raises:
        UserError: it is, but with other sizes or choices.
    """
    theirs, ours = (
        DEFAULTS | {key: v for key, v in given.items() if key not in NOT_READOUT and v is not None}
        for given in (stored.arguments, arguments)
    )
    if theirs["readout"] != ours["readout"]:
        return False
    different = [
        f"{key} {theirs.get(key)} (the recipe has {ours.get(key)})"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if different:
        raise UserError(
            f"init {stored.path} holds a read-out {theirs['readout']} with {', '.join(different)}; set "
            f"model.readout to what the file has, or give another file"
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
