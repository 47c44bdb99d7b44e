"""ViT weights of the official DINO code: a bare backbone, or a full checkpoint with student and teacher."""

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
BACKBONE = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
NEEDED = ("cls_token", "pos_embed", "patch_embed.proj.weight")
SHOWN_KEYS = 5


def read_official(
    content: Any, path: Path, which: str, arch: str | Mapping[str, int] | None = None
) -> StoredEncoder:
    """The backbone in an official file, with the normalised CLS token as its encoding; heads are left out.

    Patch size, width, depth and image size are read from the weights. The number of heads is not in them:
    it is that of `arch`, else one head for 64 numbers of width.

    Args:
        content: what the file holds.
        path: for messages.
        which: teacher or student; a bare backbone counts as the teacher.
        arch: named size, or width, depth and num_heads; it must fit the weights.

    Raises:
        UserError: there is no such backbone in the file.
    """
    weights = _backbone_weights(_state_dict(content, path, which), path)
    missing = [name for name in NEEDED if name not in weights]
    if missing:
        raise UserError(
            f"{path} holds only a part of a ViT backbone: {', '.join(missing)} missing of its {len(weights)} "
            f"parameters; give a whole state dict"
        )
    width, patch_size, image_size = _sizes(weights, path)
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    depth = 1 + max((int(block) for block in blocks if block.isdecimal()), default=-1)
    return StoredEncoder(
        path=path,
        arguments={
            "arch": _arch(width, depth, arch, path),
            "patch_size": patch_size,
            "image_size": image_size,
            "readout": "cls",
        },
        seed=0,
        which=which,
        weights={f"backbone.{name}": value for name, value in weights.items()},
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


def _backbone_weights(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The parameters of the backbone by their bare names, and whatever else is no head."""
    weights: dict[str, Any] = {}
    for key, value in state.items():
        name = str(key)
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if name.startswith("head."):
            continue
        if name in weights:
            raise UserError(f"{path} holds {name!r} twice, once as {str(key)!r}; give one state dict")
        weights[name] = value
    if not any(name.startswith(BACKBONE) for name in weights):
        held = ", ".join(repr(str(key)) for key in list(state)[:SHOWN_KEYS])
        more = ", ..." if len(state) > SHOWN_KEYS else ""
        raise UserError(
            f"{path} holds no parameter of a ViT backbone, but {len(state)} entries: {held or 'none'}{more}; "
            f"expected names such as 'cls_token' and 'blocks.0.norm1.weight', maybe after 'backbone.'"
        )
    return weights


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


def _arch(width: int, depth: int, arch: str | Mapping[str, int] | None, path: Path) -> dict[str, int]:
    """Width, depth and number of heads of the weights."""
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
            f"arch is {arch!r} ({in_words(named)}), but {path} holds width {width} and {depth} blocks; leave "
            f"arch out, or give the weights of that architecture"
        )
    return dict(named)
