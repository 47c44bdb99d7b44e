"""Weights with the names of the official DINO code: a backbone, or student and teacher with their heads.

A plain VisionTransformer of timm has the same names. SPARO, which the official code does not have, is
`readout.*` beside the backbone. Old and new names of the head's weight norm are read; the old ones are
written, since the official code reads no others.
"""

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_sparo.errors import UserError
from dino_sparo.files import write_file
from dino_sparo.interop.stored import MODELS, StoredEncoder
from dino_sparo.interop.timm_folder import is_plain_sparo
from dino_sparo.models.encoder import architecture
from dino_sparo.models.head import OLD_NAMES
from dino_sparo.terminal import few, shown

SUFFIX = ".pth"
HEAD_DIM = 64  # dimensions per attention head, in every ViT of the official code
NUM_HEADS = "num_heads"  # key beside student and teacher in files that we write; weights do not contain it
OUR_NAMES = {f"head.{old}": f"head.{new}" for old, new in OLD_NAMES.items()}
OFFICIAL_NAMES = {ours: official for official, ours in OUR_NAMES.items()}
WRAPPERS = ("model_state_dict", "state_dict", "model")  # keys under which other programs store a network
MOST_WRAPPED = 4  # levels of wrappers; a dict may contain itself
WRAPPING = (
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
)  # parts of names, from compiled or parallel modules
PREFIXES = ("backbone.", "encoder.", "model.")  # of the ViT in a model with a head
BESIDE = ("head.", "fc_norm.", "masked_embed", "decoder")  # heads, iBOT's mask token, MAE's decoder
MASK_TOKEN = "mask_token"  # MAE's belongs to its decoder
BACKBONE = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
BLOCK = re.compile(r"blocks\.([0-9]{1,3})\.")
READOUT = "readout."
NEEDED = ("cls_token", "pos_embed", "patch_embed.proj.weight")
READOUT_NEEDED = ("readout.query", "readout.key_proj.weight", "readout.value_proj.weight")
SHOWN_KEYS = 5
HEADS_OF_HUGE = dict.fromkeys((1280, 1408, 1664), 16)  # by width of ViT-H, g, and G: more than 64 dimensions
FOREIGN = {  # parts that a plain ViT does not have, by their names
    r"(register_tokens|reg_token|storage_tokens)$": "register tokens, as in DINOv2 and DINOv3",
    r"blocks\..*\.(ls[12]\.gamma|gamma_[12]|gamma1|gamma2)$": "LayerScale, as in DINOv2, DeiT III, and BEiT",
    r"blocks\..*\.mlp\.w(1|2|3|12)\.": "SwiGLU, as in DINOv2 ViT-g",
    r"blocks\.[0-9]+\.[0-9]+\.": "blocks in chunks, as in training of DINOv2",
    r"dist_token$": "a distillation token, as in distilled DeiT",
    r"fc_norm\.": "a norm after the mean of the tokens, as in fine-tuned MAE",
    r"(blocks\..*\.)?(rel_pos|relative_position|rope)": "relative positions, as in BEiT and DINOv3",
    r"norm_pre\.": "a norm before the blocks, as in CLIP",
}
PLAIN = "give a plain ViT, such as timm:vit_small_patch16_224.dino, which timm downloads"


# --- Reading


def read_official(
    content: Any, path: Path, arch: str | Mapping[str, int] | None = None
) -> dict[str, StoredEncoder]:
    """The encoders in an official file, by teacher and student; a single state dict counts as the teacher.

    Files of iBOT, MAE, and DeiT contain plain ViTs too; the rest of them is not used. The encoding is that of
    the SPARO read-out if there is one, else the normalized CLS token. All sizes are inferred from the weights
    except the number of attention heads: NUM_HEADS of the file, else that of `arch` if it has this width,
    else 16 for ViT-H and larger, else one per 64 dimensions. With a read-out, the depth is that of the plain
    ViT, one more than the number of blocks.

    Args:
        content: content of the file.
        path: for messages.
        arch: named size, or width, depth and num_heads.

    Raises:
        UserError: there is no backbone in the file, only a part of one, or another kind of ViT.
    """
    num_heads = content.get(NUM_HEADS) if isinstance(content, Mapping) else None
    networks = _unwrapped(content, MOST_WRAPPED)
    return {which: _encoder(state, path, which, arch, num_heads) for which, state in networks.items()}


def _unwrapped(content: Any, deep: int) -> dict[str, Any]:
    """The state dicts in a file, by teacher and student, from at most `deep` levels of wrappers."""
    held = content if isinstance(content, Mapping) and deep else {}
    if networks := {name: held[name] for name in MODELS if name in held}:
        return {name: next(iter(_unwrapped(inner, deep - 1).values())) for name, inner in networks.items()}
    wrapped = next((held[key] for key in WRAPPERS if isinstance(held.get(key), Mapping)), None)
    return {"teacher": content} if wrapped is None else _unwrapped(wrapped, deep - 1)


def without_wrapping(key: Any) -> str:
    """The name of a parameter without the parts that compiled and parallel modules add."""
    return ".".join(part for part in str(key).split(".") if part not in WRAPPING)


def _encoder(
    state: Any, path: Path, which: str, arch: str | Mapping[str, int] | None, num_heads: Any
) -> StoredEncoder:
    """The encoder of one network; `num_heads` is that of the file, or None."""
    if not isinstance(state, Mapping):
        raise UserError(
            f"{path} contains a {type(state).__name__}; expected a state dict (parameters by name)"
        )
    weights, beside = _split(state, path)
    _check_plain(weights, beside, path)
    missing = [name for name in NEEDED if name not in weights]
    if missing:
        raise UserError(
            f"{path} contains only a part of a ViT backbone, without {', '.join(missing)}; give a "
            f"complete state dict"
        )
    width, patch_size, image_size = _sizes(weights, path)
    if num_heads is None:
        num_heads = _num_heads(width, arch, path)
    blocks = [BLOCK.match(name) for name in weights]  # names of other parameters do not fit
    depth = 1 + max((int(found[1]) for found in blocks if found), default=-1)
    readout = _readout(weights, path)
    return StoredEncoder(
        path=path,
        arguments={
            "arch": {"width": width, "depth": depth + bool(readout), "num_heads": num_heads},
            "patch_size": patch_size,
            "image_size": image_size,
            **(readout or {"readout": "cls"}),
        },
        seed=0,
        which=which,
        weights={k if k.startswith(READOUT) else f"backbone.{k}": value for k, value in weights.items()},
        beside={OUR_NAMES.get(name, name): value for name, value in beside.items()},
    )


def _split(state: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters without prefixes: those of backbone and read-out and unknown ones, then those in BESIDE."""
    weights: dict[str, Any] = {}
    beside: dict[str, Any] = {}
    for key, value in state.items():
        name = without_wrapping(key)
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        place = beside if name.startswith(BESIDE) else weights
        if name in place:
            raise UserError(
                f"{path} contains {shown(name)!r} twice, once as {shown(key)!r}; give one state dict"
            )
        place[name] = value
    if not any(name.startswith(BACKBONE) for name in weights):
        held = few([repr(shown(key)) for key in state], SHOWN_KEYS)
        raise UserError(
            f"{path} contains no parameter of a ViT backbone, but {len(state)} entries: "
            f"{held or 'none'}; expected names such as 'cls_token' and 'blocks.0.norm1.weight', with or "
            f"without the prefix 'backbone.'; {PLAIN}"
        )
    if MASK_TOKEN in weights and any(name.startswith("decoder") for name in beside):
        beside[MASK_TOKEN] = weights.pop(MASK_TOKEN)
    return weights, beside


def _check_plain(weights: Mapping[str, Any], beside: Mapping[str, Any], path: Path) -> None:
    """Raises UserError: the weights are those of another kind of ViT, which the message names."""
    names = [*weights, *(beside if "norm.weight" not in weights else ())]
    found = {what: [name for name in names if re.match(part, name)] for part, what in FOREIGN.items()}
    if any(found.values()):
        listed = ", and ".join(
            f"{what}: {len(some)} unexpected ({shown(some[0])}{', ...' * (len(some) > 1)})"
            for what, some in found.items()
            if some
        )
        raise UserError(f"{path} does not contain a plain ViT, but one with {listed}; {PLAIN}")


def _num_heads(width: int, arch: str | Mapping[str, int] | None, path: Path) -> int:
    """Number of attention heads of a file that does not contain it."""
    given = {} if arch is None else architecture(arch)
    if given.get("width") == width:
        return given["num_heads"]
    if width in HEADS_OF_HUGE:
        return HEADS_OF_HUGE[width]
    if width % HEAD_DIM:
        raise UserError(
            f"{path} has width {width}, which is not a multiple of {HEAD_DIM}, so its number of heads cannot "
            f"be inferred; give an arch of this width"
        )
    return width // HEAD_DIM


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
            f"{path}: pos_embed is {position_shape}; expected (1, 1 + a square number of patches, width); "
            f"{PLAIN}"
        )
    return patch_shape[0], patch_shape[2], grid * patch_shape[2]


def _readout(weights: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of `build_encoder` for the SPARO read-out beside the backbone; empty if there is none."""
    if not any(name.startswith(READOUT) for name in weights):
        return {}
    shapes = {name: _shape(weights.get(name)) for name in READOUT_NEEDED}
    wrong = [f"{name} is {shape}" for name, shape in shapes.items() if len(shape) != 2 or 0 in shape]
    if wrong:
        raise UserError(
            f"{path} contains only a part of a read-out: {', '.join(wrong)}; expected SPARO's matrices"
        )
    (slots, key_dim), (rows, _), (slot_dim, _) = shapes.values()
    if rows > slots * key_dim or slots * key_dim % rows or rows % key_dim:
        raise UserError(
            f"{path}: readout.key_proj.weight has {rows} rows; expected {slots} slots x {key_dim} (the size "
            f"of readout.query), divided by the number of slots that share a key projection"
        )
    sizes = {"num_slots": slots, "slot_dim": slot_dim, "key_dim": key_dim}
    return {"readout": "sparo", **sizes, "group_size": slots * key_dim // rows}


def _shape(value: Any) -> tuple[int, ...]:
    """The shape of a tensor; () for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) and not value.is_nested else ()


# --- Writing


def write_official(stored: StoredEncoder, networks: Mapping[str, StoredEncoder], out: Path) -> str:
    """Write a run's student and teacher with heads; of weights from elsewhere, only the encoder.

    Args:
        stored: the encoder; of a run it must be the teacher, since the file contains both networks.
        networks: all networks of its file, by teacher and student.
        out: new file, NAME.pth.

    Returns:
        What was written, in words.

    Raises:
        UserError: the official format does not have this read-out, the weights do not fit, or `out` exists
            or has another ending.
    """
    if out.suffix != SUFFIX:
        raise UserError(f"out is {out}, but the official format needs a file; give NAME{SUFFIX}")
    if out.exists():
        raise UserError(f"out: {out} already exists; give another path or remove it")
    readout = stored.arguments["readout"]
    if readout != "cls" and not is_plain_sparo(stored.arguments):
        options = " with options of its own" if readout == "sparo" else ""
        raise UserError(
            f"{stored.path} has the read-out {readout!r}{options}, but the official format has only cls and "
            f"plain sparo; export it with format timm"
        )
    content: dict[str, Any]
    if stored.epochs is None:
        what, content = f"the {stored.which}'s encoder", _bare_content(stored)
    elif stored.which == "teacher":
        what, content = "student and teacher with heads", _full_content(**networks)
    else:
        raise UserError(
            f"which is {stored.which!r}, but {out} will contain student and teacher; leave it out"
        )
    buffer = io.BytesIO()
    torch.save(content, buffer)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, buffer.getvalue())
    return what


def _full_content(student: StoredEncoder, teacher: StoredEncoder) -> dict[str, Any]:
    """Student (with the prefix `module.` of a data-parallel wrapper), teacher, and epochs."""

    def named(stored: StoredEncoder, prefix: str) -> dict[str, Any]:
        stored.build()  # raises an error if it does not fit
        both = stored.weights | stored.beside
        return {prefix + OFFICIAL_NAMES.get(name, name): value for name, value in both.items()}

    return {
        "student": named(student, "module."),
        "teacher": named(teacher, ""),
        "epoch": teacher.epochs,
        NUM_HEADS: architecture(teacher.arguments["arch"])["num_heads"],
    }


def _bare_content(stored: StoredEncoder) -> dict[str, Tensor]:
    """The backbone without prefix, as in `dino_deitsmall16_pretrain.pth`, and `readout.*` of SPARO."""
    arch = architecture(stored.arguments["arch"])
    if arch["width"] != HEAD_DIM * arch["num_heads"]:
        raise UserError(
            f"{stored.path} has {arch['num_heads']} attention heads at width {arch['width']}, but readers of "
            f"an official file without heads assume one per {HEAD_DIM} dimensions; export it with format timm"
        )
    return {name.removeprefix("backbone."): value for name, value in stored.build().state_dict().items()}
