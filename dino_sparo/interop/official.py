"""ViT weights by the names of the official DINO code: a backbone, or a full checkpoint of both networks.

A plain VisionTransformer of timm has the same names. Beside the backbone there may be a SPARO read-out.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dino_sparo.errors import UserError
from dino_sparo.interop.stored import StoredEncoder, architecture, in_words

HEAD_DIM = 64  # numbers an attention head, in every ViT of the official code
MODELS = ("teacher", "student")
WRAPPERS = ("state_dict", "model")  # keys under which other programs keep a single state dict
PREFIXES = ("module.", "backbone.")  # of data-parallel training, and of the wrapper around backbone and head
HEADS = ("head.", "fc_norm.")  # of DINO, and of a classifier
BACKBONE = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
READOUT = "readout."
NEEDED = ("cls_token", "pos_embed", "patch_embed.proj.weight")
READOUT_NEEDED = ("readout.query", "readout.key_proj.weight", "readout.value_proj.weight")
NUM_HEADS = "num_heads"  # beside student and teacher, where `interop.to_official` has written the file
SHOWN_KEYS = 5


def read_official(
    content: Any,
    path: Path,
    which: str,
    arch: str | Mapping[str, int] | None = None,
    *,
    num_heads: int | None = None,
) -> StoredEncoder:
    """The encoder in an official file: with its SPARO read-out, else with the normalised CLS token.

    All sizes are read from the weights, but for the number of attention heads, which is not in them: it is
    that of `arch`, else NUM_HEADS of the file, else `num_heads`, else one head for 64 numbers of width. With
    a read-out the depth is that of the plain ViT, one block more than there are.

    Args:
        content: what the file holds.
        path: for messages.
        which: teacher or student; a bare backbone counts as the teacher.
        arch: named size, or width, depth and num_heads; it must fit the weights.
        num_heads: attention heads if they are known from elsewhere.

    Raises:
        UserError: there is no such backbone in the file.
    """
    weights, beside = _split(_state_dict(content, path, which), path)
    missing = [name for name in NEEDED if name not in weights]
    if missing:
        raise UserError(
            f"{path} holds only a part of a ViT backbone: {', '.join(missing)} missing of its {len(weights)} "
            f"parameters; give a whole state dict"
        )
    width, patch_size, image_size = _sizes(weights, path)
    if isinstance(content.get(NUM_HEADS), int):
        num_heads = content[NUM_HEADS]
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    depth = 1 + max((int(block) for block in blocks if block.isdecimal()), default=-1)
    readout = _readout(weights, path)
    return StoredEncoder(
        path=path,
        arguments={
            "arch": _arch(width, depth + bool(readout), arch, num_heads, path),
            "patch_size": patch_size,
            "image_size": image_size,
            **(readout or {"readout": "cls"}),
        },
        seed=0,
        which=which,
        weights={
            name if name.startswith(READOUT) else f"backbone.{name}": value for name, value in weights.items()
        },
        beside=beside,
    )


def _state_dict(content: Any, path: Path, which: str) -> Mapping[str, Any]:
    """The one state dict that is asked for."""
    models = [name for name in MODELS if isinstance(content, Mapping) and name in content]
    if models and which not in models:
        raise UserError(f"{path} holds the {models[0]} only; ask for which={models[0]!r}")
    if models:
        content = content[which]
    elif which != "teacher":
        raise UserError(
            f"{path} holds one set of weights, no {which} beside a teacher; leave out which={which!r}"
        )
    elif isinstance(content, Mapping):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} holds a {type(content).__name__}; expected parameters by name (a state dict)"
        )
    return content


def _split(state: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """By bare names: the parameters of backbone and read-out and whatever else is no head, then heads."""
    weights: dict[str, Any] = {}
    beside: dict[str, Any] = {}
    for key, value in state.items():
        name = str(key)
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        place = beside if name.startswith(HEADS) else weights
        if name in place:
            raise UserError(f"{path} holds {name!r} twice, once as {str(key)!r}; give one state dict")
        place[name] = value
    if not any(name.startswith(BACKBONE) for name in weights):
        held = ", ".join(repr(str(key)) for key in list(state)[:SHOWN_KEYS])
        more = ", ..." if len(state) > SHOWN_KEYS else ""
        raise UserError(
            f"{path} holds no parameter of a ViT backbone, but {len(state)} entries: {held or 'none'}{more}; "
            f"expected names such as 'cls_token' and 'blocks.0.norm1.weight', maybe after 'backbone.'"
        )
    return weights, beside


def _readout(weights: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of `build_encoder` for the SPARO read-out beside the backbone; none without one."""
    if not any(name.startswith(READOUT) for name in weights):
        return {}
    shapes = {name: _shape(weights.get(name)) for name in READOUT_NEEDED}
    wrong = [f"{name} is {shape}" for name, shape in shapes.items() if len(shape) != 2 or 0 in shape]
    if wrong:
        raise UserError(f"{path} holds a part of a read-out: {', '.join(wrong)}; expected SPARO's matrices")
    (slots, key_dim), (rows, _), (slot_dim, _) = shapes.values()
    if rows > slots * key_dim or slots * key_dim % rows or rows % key_dim:
        raise UserError(
            f"{path}: readout.key_proj.weight has {rows} rows; expected {slots} slots x {key_dim} (that is "
            f"readout.query), or as many divided by the slots that share a key projection"
        )
    sizes = {"num_slots": slots, "slot_dim": slot_dim, "key_dim": key_dim}
    return {"readout": "sparo", **sizes, "group_size": slots * key_dim // rows}


def _sizes(weights: Mapping[str, Any], path: Path) -> tuple[int, int, int]:
    """Width, patch size and native image size, both in pixels."""
    patch_shape = _shape(weights["patch_embed.proj.weight"])
    if len(patch_shape) != 4 or patch_shape[2] != patch_shape[3] or 0 in patch_shape:
        raise UserError(f"{path}: patch_embed.proj.weight is {patch_shape}; expected (width, 3, side, side)")
    position_shape = _shape(weights["pos_embed"])
    num_patches = position_shape[1] - 1 if len(position_shape) == 3 else 0
    grid = math.isqrt(max(0, num_patches))
    if grid < 1 or grid**2 != num_patches:
        raise UserError(
            f"{path}: pos_embed is {position_shape}; expected (1, 1 + a square number of patches, width)"
        )
    return patch_shape[0], patch_shape[2], grid * patch_shape[2]


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of a tensor; none of anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _arch(
    width: int, depth: int, arch: str | Mapping[str, int] | None, num_heads: int | None, path: Path
) -> dict[str, int]:
    """Width, depth and number of heads of the weights."""
    if arch is None and num_heads is not None:
        return {"width": width, "depth": depth, "num_heads": num_heads}
    if arch is None:
        if width < HEAD_DIM or width % HEAD_DIM:
            raise UserError(
                f"{path} is of width {width}, no multiple of {HEAD_DIM}, so its number of heads cannot be "
                f"told; give arch"
            )
        return {"width": width, "depth": depth, "num_heads": width // HEAD_DIM}
    named = architecture(arch)
    if (named["width"], named["depth"]) != (width, depth):
        raise UserError(
            f"arch is {arch!r} ({in_words(named)}), but {path} holds width {width} and depth {depth}; leave "
            f"arch out, or give the weights of that architecture"
        )
    return dict(named)
