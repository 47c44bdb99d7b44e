"""How timm is told of an encoder: its architecture by name, the arguments that differ, data and names.

Encoders whose encoding timm's own ViT gives (`cls` and `gap`) are written as that, so that reading them needs
no import of ours; all others as the models that `interop.timm_models` registers.
"""

import math
from collections.abc import Mapping
from typing import Any

from timm.models import PretrainedCfg
from torch import Tensor

from dino_sparo.interop.stored import architecture
from dino_sparo.models.encoder import ARCHITECTURES

PLAIN_POOLING: dict[str, dict[str, Any]] = {
    "cls": {},
    "gap": {"global_pool": "avg", "fc_norm": False},  # the mean of tokens that are normalised already
}
SPARO_SIZES = {"num_slots": 64, "slot_dim": 64, "key_dim": 64, "group_size": 1}
PREFIX = "backbone."  # of all parameters of an encoder without slots; timm's own ViT has none


def is_plain(arguments: Mapping[str, Any]) -> bool:
    """Whether timm's own ViT gives the encoding of the encoder that these `build_encoder` arguments build."""
    return arguments["readout"] in list(PLAIN_POOLING)  # not hashed: a file may say anything


def is_plain_sparo(arguments: Mapping[str, Any]) -> bool:
    """Whether the read-out is SPARO as in equation 1, in place of the last block, described by four sizes."""
    return arguments["readout"] == "sparo" and _options(arguments).keys() <= SPARO_SIZES.keys()


def timm_config(arguments: Mapping[str, Any], num_features: int) -> dict[str, Any]:
    """What timm reads in the `config.json` of a model on the Hugging Face hub.

    Args:
        arguments: those of `build_encoder`, plain values.
        num_features: width D of the tokens.
    """
    plain = is_plain(arguments)
    asked = architecture(arguments["arch"])
    name = next((name for name, sizes in ARCHITECTURES.items() if sizes == asked), "vit_small")
    named = {"img_size": 224, "patch_size": 16, **_sizes(ARCHITECTURES[name])}
    sizes = {
        "img_size": arguments["image_size"],
        "patch_size": arguments["patch_size"],
        **_sizes(asked),
    }
    different = {key: value for key, value in sizes.items() if value != named[key]}
    pooling = PLAIN_POOLING[arguments["readout"]] if plain else _readout_arguments(arguments)
    return {
        "architecture": f"{name}_patch16_224" if plain else f"{name}_patch16_sparo_224",
        "num_classes": 0,
        "num_features": num_features,
        "global_pool": pooling.get("global_pool", "token") if plain else "readout",
        "model_args": different | pooling,
        "pretrained_cfg": pretrained_config(arguments["image_size"], plain=plain),
    }


def pretrained_config(image_size: int, *, plain: bool = False) -> dict[str, Any]:
    """timm's `pretrained_cfg`: the official evaluation crop, ImageNet's mean and deviation, names of layers.

    timm's ViT takes one image size only, our encoder all.
    """
    return PretrainedCfg(
        tag="dino",
        input_size=(3, image_size, image_size),
        fixed_input_size=plain,
        interpolation="bicubic",
        crop_pct=_crop_share(image_size),
        num_classes=0,
        first_conv="patch_embed.proj" if plain else f"{PREFIX}patch_embed.proj",
        classifier="head",
    ).to_dict(remove_source=True)


def to_timm_names(weights: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of an Encoder by the names that timm's model has."""
    cut = PREFIX if is_plain(arguments) else ""
    return {name.removeprefix(cut): value for name, value in weights.items()}


def from_timm_names(weights: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `to_timm_names`; names of an Encoder stay as they are."""
    if not is_plain(arguments):
        return dict(weights)
    return {f"{PREFIX}{name.removeprefix(PREFIX)}": value for name, value in weights.items()}


def _sizes(arch: Mapping[str, int]) -> dict[str, int]:
    return {"embed_dim": arch["width"], "depth": arch["depth"], "num_heads": arch["num_heads"]}


def _readout_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """SPARO by its four sizes as far as they differ; anything else by its name and all that it takes."""
    if is_plain_sparo(arguments):
        return {key: value for key, value in _options(arguments).items() if value != SPARO_SIZES[key]}
    return {"readout": {"name": arguments["readout"], **_options(arguments)}}


def _options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the read-out takes."""
    return {k: v for k, v in arguments.items() if k not in ("arch", "patch_size", "image_size", "readout")}


def _crop_share(image_size: int) -> float:
    """Share of the resized short side that the crop keeps, 0.875 for 224, such that timm resizes as we do.

    We round the short side to resize to, timm cuts its fraction off: hence rounded down, to four digits.
    """
    return math.floor(10_000 * image_size / round(image_size * 256 / 224)) / 10_000
