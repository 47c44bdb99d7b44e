"""Recipe files: the shipped ones, YAML, and those of older versions."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.recipe.sections import EncoderOptions, Recipe
from dino_sparo.recipe.typed import MissingError, build, expected, leaf_keys, read_yaml, unknown
from dino_sparo.terminal import shown

CONFIG_FILE = "config.yaml"  # the recipe in a run folder
SIZES = {"num_slots": 64, "slot_dim": 64}


def recipes() -> dict[str, Path]:
    """Paths of the shipped recipes by name, in the installed package or the checkout."""
    here = Path(__file__).parent.parent
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Path of a recipe, given that path or the name of a shipped recipe.

    Raises:
        UserFileNotFoundError: there is no such file or shipped recipe.
    """
    path, shipped = Path(os.path.expanduser(name)), recipes()
    if path.is_file():
        return path
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    if stem in shipped and str(path.parent) in (".", "configs"):
        return shipped[stem]
    raise UserFileNotFoundError(
        f"config {name!r} does not exist; give a YAML file or one of the shipped recipes: "
        f"{', '.join(shipped)}"
    )


def checked_keys(content: Mapping[str, Any], keys: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Nested values -> values by dotted key; `what` precedes the key in messages.

    Raises:
        UserError: a key is unknown or given twice, or a section is not a mapping.
    """
    values: dict[str, Any] = {}

    def walk(prefix: str, section: Mapping[Any, Any]) -> None:
        for name, value in section.items():
            key = f"{prefix}{name}"
            inside = [known.rpartition(".")[2] for known in keys if known.startswith(f"{key}.")]
            if key not in keys and not inside:
                raise unknown(f"{what} {key!r}", key, keys)
            if isinstance(value, dict) and inside:
                walk(f"{key}.", value)
            elif key in values:  # in a section, and as a dotted key
                raise UserError(f"{what} {key!r} is given twice; give it once")
            elif isinstance(value, dict) or key not in keys:
                wanted = expected(keys[key]) if key in keys else f"a section with {', '.join(inside)}"
                raise UserError(f"{what} {key!r} is {shown(repr(value))}; expected {wanted}")
            else:  # machine.views of older files may be `tensor`
                values[key] = "pil" if (key, value) == ("machine.views", "tensor") else value

    walk("", content)
    return values


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, overridden by `over`, where a section also replaces a value and vice versa."""
    kept = {
        key: value
        for key, value in values.items()
        if not any(key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in over)
    }
    return {**kept, **over}


def stored_recipe(content: Mapping[str, Any], where: str) -> Recipe:
    """The recipe in a run folder or checkpoint of any version.

    Args:
        content: plain nested values.
        where: their file, for messages.

    Raises:
        UserError: a key or value is wrong or missing.
    """
    values = checked_keys(content, leaf_keys(Recipe), f"{where}: key")
    try:
        return cast(Recipe, build(Recipe, values, dict.fromkeys(values, where)))
    except MissingError as error:
        raise UserError(f"{where}: {error}") from error


def checked_encoder(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Check arguments of `build_encoder` from a file by the rules for recipes.

    Raises:
        UserError: a value is missing, unknown or out of range, or values do not fit together.
    """
    readout = {"image_size": 224, "patch_size": 16} | dict(arguments)
    values: dict[str, Any] = {"image_size": readout.pop("image_size"), "model": {"drop_path_rate": 0.0}}
    values["model"] |= {key: readout.pop(key) for key in ("arch", "patch_size") if key in readout}
    name = readout.pop("readout", None)
    # Defaults of `build_encoder` and timm.
    sizes = {"sparo": SIZES | {"key_dim": 64}, "pooler": SIZES}.get(str(name), {})
    one = {"group_size": 1} if name == "sparo" and readout.get("heads") != "multi" else {}
    values["model"]["readout"] = {"name": name, **sizes, **one, **readout}
    options = build(EncoderOptions, checked_keys(values, leaf_keys(EncoderOptions), "key"))
    return options.model.encoder_arguments(options.image_size)


def read_sections(path: Path) -> dict[str, Any]:
    """Read a YAML file of sections. Raises UserError: it is not YAML, or has no sections; OSError."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} has no sections; expected sections with keys, as in the shipped recipes")
    return content


def named_recipe(name: str, over: Mapping[str, Any], options_class: type = Recipe) -> Any:
    """Read a recipe by path or shipped name, with values by dotted key that override its own.

    Args:
        options_class: dataclass of the options in the file, if there are more than those of a recipe.

    Raises:
        UserError: there is no such recipe, it is not YAML, or a key or value is wrong or missing.
    """
    path = find_recipe(name)
    values = checked_keys(read_sections(path), leaf_keys(options_class), f"{path}: key")
    return build(options_class, merged(values, over), dict.fromkeys(values.keys() - over, str(path)))
