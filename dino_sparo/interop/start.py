"""Starting weights of a run, from whatever holds a ViT: what is taken, what begins fresh, what stays unused.

The rules, for student and teacher alike:

- The backbone must be of the recipe's width, patch size and number of heads (where the file tells it), with
  as many blocks as the recipe builds. Of a plain ViT the last block may be one too many: a read-out with
  slots replaces it. The final norm is then taken too, though it has normalised the output of another depth.
- The position embedding is resized once to the recipe's image size, as the official code resizes it.
- A read-out of the recipe's kind is taken, and must have its sizes; otherwise the read-out is fresh.
- The head is taken if it reads the same encoding and fits exactly; else it is fresh.
- Each network takes its own of a file with both; a frozen backbone needs one for both, the teacher's.

Optimiser, centre and schedules begin anew.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import UserError
from dino_sparo.interop.export import read_exported
from dino_sparo.interop.load import is_exported, read_content, stored_in, weights_path
from dino_sparo.interop.stored import StoredEncoder, architecture, misfits
from dino_sparo.models import DinoModel, Encoder
from dino_sparo.models.encoder import WITH_SLOTS
from dino_sparo.models.head import OLD_NAMES

log = logging.getLogger("dino_sparo")

TIMM = "timm:"
NOT_READOUT = ("arch", "patch_size", "image_size", "after_last_block")
SAME_AS_LEFT_OUT = {"heads": "separate", "group_size": 1}
LENGTHS = OLD_NAMES["last_layer.weight_g"]
LENGTH_TOLERANCE = 0.01  # an average of ones over a long training is not exactly one


@dataclass(frozen=True)
class Taken:
    """What one network takes of a file: parameters of a DinoModel by name, and the rest in words."""

    parameters: dict[str, Tensor]
    fresh: list[str]
    unused: list[str]
    remarks: list[str]


def read_networks(init: str, arguments: Mapping[str, Any]) -> list[StoredEncoder]:
    """The teacher of a file, and its student if it has one.

    Args:
        init: anything that `load_encoder` reads, or `timm:NAME`, which timm downloads.
        arguments: those of `build_encoder` for the recipe; weights without a number of heads have its.

    Raises:
        UserError: there is no such file or model, or it is damaged or refused.
    """
    num_heads = architecture(arguments["arch"])["num_heads"]
    path = weights_path(init)
    if init.startswith(TIMM):
        content, num_heads = _from_timm(init.removeprefix(TIMM))
    elif is_exported(path):
        return [read_exported(path, "teacher")]
    else:
        content = read_content(path)
    both = isinstance(content, Mapping) and "teacher" in content and "student" in content
    which = ("teacher", "student") if both else ("teacher",)
    return [stored_in(content, path, name, num_heads=num_heads) for name in which]


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
            "WARNING: init %s%s was trained on images normalised by %s, here they are by ImageNet's",
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
    taken = [_take(source, student, arguments, norm_last_layer=norm_last_layer) for source in sources]
    first, last = taken[0], taken[-1]
    if first.parameters.keys() != last.parameters.keys():
        raise UserError(
            f"init {stored[0].path}: its student and teacher differ in what they hold; give one of them alone"
        )
    for model, part in ((teacher, first), (student, last)):
        model.load_state_dict(model.state_dict() | part.parameters)
    number = sum(value.numel() for value in first.parameters.values())
    parts = [
        f"{number / 1e6:.2f} million parameters taken"
        + (", by student and teacher each its own" if len(taken) > 1 else ", by student and teacher alike"),
        f"fresh: {', '.join(first.fresh) or 'nothing'}",
        f"unused of the file: {', '.join(first.unused) or 'nothing'}",
        *first.remarks,
    ]
    return f"init {stored[0].path}: {'; '.join(parts)}"


def _take(
    stored: StoredEncoder, model: DinoModel, arguments: Mapping[str, Any], *, norm_last_layer: bool
) -> Taken:
    """What a network takes; nothing about it changes."""
    _check_sizes(stored, arguments)
    source = stored.build()  # which is strict about every name
    dropped = _blocks_dropped(stored.path, source, model.encoder, arguments)
    remarks, fresh = [], []
    unused = [f"blocks.{number} (the read-out replaces it)" for number in dropped]
    if dropped:
        remarks.append(f"the final norm has normalised the output of block {dropped[-1]} there")
    parameters = {
        f"encoder.{name}": value
        for name, value in source.state_dict().items()
        if name.startswith("backbone.")
        and not name.startswith(tuple(f"backbone.blocks.{n}." for n in dropped))
    }
    native, grid = source.backbone.native_grid, model.encoder.backbone.native_grid
    if native != grid:
        parameters["encoder.backbone.pos_embed"] = source.backbone.position_embedding(grid, grid)
        remarks.append(f"position embedding resized from {native} x {native} to {grid} x {grid} patches")

    same_readout = _same_readout(stored, arguments)
    of_source = {
        name: value for name, value in source.state_dict().items() if not name.startswith("backbone.")
    }
    if same_readout:
        parameters |= {f"encoder.{name}": value for name, value in of_source.items()}
    else:
        if any(not name.startswith("backbone.") for name in model.encoder.state_dict()):
            fresh.append(f"read-out {arguments['readout']} (the file has {stored.arguments['readout']})")
        unused += [f"read-out {stored.arguments['readout']} ({len(of_source)} tensors)"] if of_source else []
    head, why_not = _head(stored.beside, model, same_readout=same_readout, norm_last_layer=norm_last_layer)
    parameters |= head
    fresh += [f"head ({why_not})"] if why_not else []
    kinds = dict.fromkeys(name.partition(".")[0] for name in stored.beside) if why_not else {}
    unused += [
        f"{kind} ({sum(name.startswith(f'{kind}.') for name in stored.beside)} tensors)" for kind in kinds
    ]
    return Taken(parameters, fresh, unused, remarks)


def _check_sizes(stored: StoredEncoder, arguments: Mapping[str, Any]) -> None:
    """Refuse another width, number of heads or patch size."""
    ours, theirs = (
        {**architecture(given["arch"]), "patch_size": given["patch_size"]}
        for given in (arguments, stored.arguments)
    )
    different = [
        f"{what} {theirs[key]} (the recipe has {ours[key]})"
        for key, what in (("width", "width"), ("num_heads", "attention heads"), ("patch_size", "patch size"))
        if theirs[key] != ours[key]
    ]
    if different:
        raise UserError(
            f"init {stored.path} holds {', '.join(different)}; set model.arch and model.patch_size to "
            f"what the file has, or give another file"
        )


def _blocks_dropped(path: Path, source: Encoder, target: Encoder, arguments: Mapping[str, Any]) -> list[int]:
    """Numbers of the blocks that the file has and the recipe replaces, at most one."""
    given, needed = len(source.backbone.blocks), len(target.backbone.blocks)
    replaces = arguments["readout"] in WITH_SLOTS and not arguments.get("after_last_block", False)
    allowed = [needed, needed + 1] if replaces and source.readout is None else [needed]
    if given not in allowed:
        more = f", or {needed + 1} of a plain ViT, whose last one it replaces" if replaces else ""
        raise UserError(
            f"init {path} holds {given} blocks, but this recipe builds {needed} with read-out "
            f"{arguments['readout']}; expected {needed}{more}, so change model.arch or give another file"
        )
    return list(range(needed, given))


def _same_readout(stored: StoredEncoder, arguments: Mapping[str, Any]) -> bool:
    """Whether the file's read-out is of the recipe's kind.

    Raises:
        UserError: it is, but with other sizes or choices.
    """
    theirs, ours = (
        {
            key: value
            for key, value in given.items()
            if key not in NOT_READOUT and value is not None and SAME_AS_LEFT_OUT.get(key) != value
        }
        for given in (stored.arguments, arguments)
    )
    if theirs["readout"] != ours["readout"]:
        return False
    different = [
        f"{key} {theirs.get(key, SAME_AS_LEFT_OUT.get(key))} "
        f"(the recipe has {ours.get(key, SAME_AS_LEFT_OUT.get(key))})"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if different:
        raise UserError(
            f"init {stored.path} holds a read-out {theirs['readout']} with {', '.join(different)}; set "
            f"model.readout to what the file has, or give another file"
        )
    return True


def _head(
    beside: Mapping[str, Any], model: DinoModel, *, same_readout: bool, norm_last_layer: bool
) -> tuple[dict[str, Tensor], str]:
    """The head of a file by the names of a DinoModel; or none, and why."""
    bare = {name.removeprefix("head."): value for name, value in beside.items() if name.startswith("head.")}
    given = {OLD_NAMES.get(name, name): value for name, value in bare.items()}
    if not any(name.startswith(("mlp.", "last_layer.")) for name in given):
        return {}, "the file has none"
    if not same_readout:
        return {}, "the file's reads another encoding"
    listed = misfits(given, model.head.state_dict())
    if listed:
        return {}, f"the file's does not fit: {listed}"
    if norm_last_layer and (given[LENGTHS] - 1).abs().max() > LENGTH_TOLERANCE:
        return {}, "the prototypes of the file's are not of length 1, as head.norm_last_layer wants"
    return {f"head.{name}": value for name, value in given.items()}, ""
