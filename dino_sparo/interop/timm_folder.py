"""Write and read an encoder as a folder in timm's layout for the Hugging Face hub.

`model.safetensors` contains one set of weights, with the names of timm's model; `config.json` is read by timm
to build the model, and contains under a key of ours how to build the Encoder and whose weights they are;
`README.md` is the model card. No file needs pickle.

timm builds the models that `interop.timm_models` registers, which compute our encoding at any image size.
Weights of `cls` and `gap` have the names of timm's own ViT, which loads them too, for their own image size.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors.torch import load_file, save
from timm.models import PretrainedCfg
from torch import Tensor

from dino_sparo.data.images import IMAGENET_MEAN, IMAGENET_STD
from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.files import parsed_json, read_as, read_small, write_file
from dino_sparo.interop.stored import MODELS, StoredEncoder
from dino_sparo.models import Encoder
from dino_sparo.models.encoder import ARCHITECTURES, architecture
from dino_sparo.recipe.readouts import READOUTS
from dino_sparo.recipe.sections import ValueRange, check_value_range
from dino_sparo.recipe.typed import Seed, value_of
from dino_sparo.terminal import log, shown

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"
OUR_KEY = "dino_sparo"  # in config.json, beside timm's keys
FORMAT = 2
READABLE = (1, FORMAT)  # format 1 had only what is now under OUR_KEY
MOST_JSON = 1_000_000  # bytes of config.json; ours has 1,500
KINDS = {"format": int, "weights": str, "seed": int, "encoder": dict}  # types of the values under OUR_KEY

TIMM_POOLING: dict[str, dict[str, Any]] = {  # arguments of timm's own ViT by read-out
    "cls": {},
    "gap": {"global_pool": "avg", "fc_norm": False},  # mean of tokens that are already normalized
}
SPARO_SIZES = {"num_slots": 64, "slot_dim": 64, "key_dim": 64, "group_size": 1}
NOT_READOUT = ("arch", "patch_size", "image_size", "readout")
PREFIX = "backbone."  # of all parameters of an encoder without slots; omitted in files, as in timm

CARD = """\
---
library_name: timm
{license}pipeline_tag: image-feature-extraction
tags:
- image-feature-extraction
- timm
- dino
{tags}---
# {name}

Vision transformer for image features, {origin}{readout}.

- ViT: {vit}, images of {image_size} pixels
- encoding: {encoding}
- preprocessing: {preprocessing}
{trained}
## Use

`FOLDER` is the folder of this file; with a model on the Hugging Face hub, replace `local-dir:FOLDER` with
`hf-hub:USER/NAME`.

```python
import timm
import dino_sparo.interop.timm_models  # registers the model with timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
encoding = model(transform(Image.open("IMAGE").convert("RGB"))[None])  # (1, {length})
```

`dino_sparo.load_encoder("FOLDER")` returns the encoder itself.{deep}{timms_own}
"""
DEEP = """ Images of more than 8 bits need its own transform:
`encoder(encoder.transform("IMAGE")[None])`."""
TIMMS_OWN = """ Without dino_sparo, timm's own
`timm.create_model({own})` loads the weights too, for images of
{image_size} pixels only: it resizes the position embedding differently from the DINO code."""


def write_exported(
    stored: StoredEncoder,
    folder: Path,
    *,
    name: str,
    measured: Sequence[str] = (),
    license: str | None = None,
) -> None:
    """Write the files into a new or empty folder.

    Args:
        name: of the model, for its card.
        measured: lines for the card, one per result.
        license: of the weights, by its name on the hub.

    Raises:
        UserError: the folder is not empty, or the weights do not fit.
        OSError: it cannot be written.
    """
    encoder = stored.build()
    cut = PREFIX if _is_plain(stored.arguments) else ""
    weights = {key.removeprefix(cut): value for key, value in encoder.state_dict().items()}
    ours = {"format": FORMAT, "weights": stored.which, "seed": stored.seed, "encoder": stored.arguments}
    if stored.value_range:
        ours["value_range"] = stored.value_range
    config = _timm_config(stored.arguments) | {OUR_KEY: ours}
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"out: {folder} is not empty; give another folder or empty it")
    write_file(folder / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
    write_file(folder / CARD_FILE, _model_card(stored, encoder, name, measured, license))
    # Last, so that a folder with it is complete.
    write_file(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


# --- Reading


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The content of a `.safetensors` file. Raises UserError, UserFileNotFoundError."""
    if not path.is_file():
        raise UserFileNotFoundError(f"{path} does not exist; give a file of weights, or a folder with one")
    with read_as(f"{path} cannot be read as a safetensors file, or is incomplete", "copy it again"):
        return load_file(path)


def read_exported(weights: Mapping[str, Tensor], path: Path) -> StoredEncoder | int | None:
    """The encoder of these weights, from the config.json beside them.

    Of weights of timm's own ViT it is the number of attention heads, or None if it is not known.

    Raises:
        UserFileNotFoundError: there is no config.json, and the weights do not have timm's names.
        UserError: config.json is damaged.
    """
    path_of_config = path.with_name(CONFIG_FILE)
    if not path_of_config.exists():
        if "cls_token" in weights:
            return None
        raise UserFileNotFoundError(
            f"{path_of_config} does not exist; an exported encoder is a folder with {WEIGHTS_FILE} and "
            f"{CONFIG_FILE}"
        )
    with read_as(f"{path_of_config} cannot be read as JSON", "copy it again"):
        config = parsed_json(read_small(path_of_config, MOST_JSON))
    config = config if isinstance(config, dict) else {}
    ours = config.get(OUR_KEY, config)
    if ours is config and "sparo" not in str(config.get("architecture", "sparo")):
        warn_of_normalization(config.get("pretrained_cfg", config), str(path))  # config: of older timm
        given = config.get("model_args")
        heads = given.get("num_heads") if isinstance(given, dict) else None
        return heads if type(heads) is int and heads > 0 else None
    if (
        not isinstance(ours, dict)
        or not all(isinstance(ours.get(key), kind) for key, kind in KINDS.items())
        or ours["format"] not in READABLE
        or not {"arch", "readout"} <= ours["encoder"].keys()
    ):
        raise UserError(
            f"{path_of_config} does not describe an exported encoder of format {FORMAT}; expected a file "
            f"written by dino-sparo export"
        )
    if _is_plain(ours["encoder"]):  # with format 1 they have the prefix
        weights = {f"{PREFIX}{name.removeprefix(PREFIX)}": value for name, value in weights.items()}
    seed, which, value_range = (
        value_of(f"{path_of_config}: {key}", ours.get(key), kind)
        for key, kind in (("seed", Seed), ("weights", Literal[MODELS]), ("value_range", ValueRange | None))
    )
    check_value_range(value_range, f"{path_of_config}: value_range")
    return StoredEncoder(path, ours["encoder"], seed, which, dict(weights), value_range=value_range)


def warn_of_normalization(timms_config: Any, what: str) -> None:
    """Warn if timm's configuration of pretrained weights, which may be anything, has another mean or standard
    deviation than ImageNet's."""
    told = timms_config if isinstance(timms_config, dict) else {}
    expected = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    others = [
        f"{key} {told[key]}"
        for key, value in expected.items()
        if told.get(key, value) not in (value, [*value])
    ]
    if others:
        log.warning(
            "WARNING: %s was trained on images normalized with %s, but here with those of ImageNet",
            *(what, shown(" and ".join(others))),
        )


# --- Configuration for timm


def is_plain_sparo(arguments: Mapping[str, Any]) -> bool:
    """Whether the read-out is SPARO as in equation 1, in place of the last block, described by four sizes."""
    return arguments["readout"] == "sparo" and _options(arguments).keys() <= SPARO_SIZES.keys()


def pretrained_config(image_size: int) -> dict[str, Any]:
    """timm's `pretrained_cfg`: the official evaluation crop, ImageNet's mean and deviation, names."""
    # timm rounds the resized short side down, we round to nearest; so this is rounded down, to four digits.
    crop_pct = math.floor(10_000 * image_size / round(image_size * 256 / 224)) / 10_000
    return PretrainedCfg(
        tag="dino",
        input_size=(3, image_size, image_size),
        fixed_input_size=False,
        interpolation="bicubic",
        crop_pct=crop_pct,
        num_classes=0,
        first_conv=f"{PREFIX}patch_embed.proj",
        classifier="head",
    ).to_dict(remove_source=True)


def _timm_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """timm's part of `config.json`: name of the model, arguments that differ from it, preprocessing."""
    sizes = architecture(arguments["arch"])
    name = next((name for name, named in ARCHITECTURES.items() if named == sizes), "vit_small")
    named = {"img_size": 224, "patch_size": 16, **ARCHITECTURES[name], **SPARO_SIZES}
    asked = {"img_size": arguments["image_size"], "patch_size": arguments["patch_size"], **sizes}
    if is_plain_sparo(arguments):
        pooling, asked = {}, asked | _options(arguments)
    else:
        pooling = {"readout": {"name": arguments["readout"], **_options(arguments)}}
    different = {
        "embed_dim" if key == "width" else key: value for key, value in asked.items() if value != named[key]
    }
    return {
        "architecture": f"{name}_patch16_sparo_224",
        "num_classes": 0,
        "num_features": sizes["width"],
        "global_pool": "readout",
        "model_args": different | pooling,
        "pretrained_cfg": pretrained_config(arguments["image_size"]),
    }


def _timms_own(arguments: Mapping[str, Any]) -> str:
    """The arguments for timm's own ViT to load the weights of an encoder without slots."""
    config = _timm_config(arguments)
    asked = {key: value for key, value in config["model_args"].items() if key != "readout"}
    asked = {"num_classes": 0} | asked | TIMM_POOLING[arguments["readout"]]
    name = config["architecture"].replace("_sparo", "")
    told = (f"{key}={value!r}" for key, value in asked.items())
    return ", ".join([f'"{name}"', 'checkpoint_path="FOLDER/model.safetensors"', *told])


def _is_plain(arguments: Mapping[str, Any]) -> bool:
    """Whether timm's own ViT computes the encoding of the encoder with these `build_encoder` arguments."""
    return arguments["readout"] in list(TIMM_POOLING)  # a list, since the value in a file may be unhashable


def _options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the read-out."""
    return {key: value for key, value in arguments.items() if key not in NOT_READOUT}


def _model_card(
    stored: StoredEncoder, encoder: Encoder, name: str, measured: Sequence[str], license: str | None
) -> str:
    """The text of README.md, which the hub shows."""
    encoding = f"{encoder.embed_dim} dimensions"
    if encoder.num_slots:
        width = encoder.embed_dim // encoder.num_slots
        encoding += f", {encoder.num_slots} slots of {width} concatenated"
    size, facts = stored.arguments["image_size"], stored.facts(license, measured)
    told = ("data", "epochs", "license")
    text = CARD.format(
        tags="- sparo\n" if encoder.readout_name == "sparo" else "",
        name=shown(name),
        license=yaml.safe_dump({"license": license}) if license else "",
        origin=f"the {stored.which} of a DINO pretraining run (arXiv 2104.14294), " if stored.trained else "",
        trained="".join(f"- {key}: {value}\n" for key, value in facts.items() if key in told),
        readout=READOUTS[encoder.readout_name].words,
        vit=facts["vit"],
        preprocessing=facts["preprocessing"],
        image_size=size,
        encoding=encoding,
        length=encoder.embed_dim,
        deep=DEEP if stored.value_range else "",
        timms_own=TIMMS_OWN.format(own=_timms_own(stored.arguments), image_size=size)
        if _is_plain(stored.arguments)
        else "",
    )
    if stored.trained:
        recipe = yaml.safe_dump(json.loads(facts["recipe"]), sort_keys=False)
        text += f"\n## Recipe\n\n```yaml\n{recipe}```\n"
    return text + ("\n## Measured\n\n" + "".join(f"- {line}\n" for line in measured) if measured else "")
