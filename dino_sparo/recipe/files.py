"""Recipes in files: the shipped ones, YAML, and what older versions wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.recipe.sections import EncoderOptions, Recipe
from dino_sparo.recipe.typed import MissingError, build, expected, leaf_keys, read_yaml, unknown
from dino_sparo.terminal import shown

SIZES = {"num_slots": 64, "slot_dim": 64}


def recipes() -> dict[str, Path]:
    """Shipped recipes by name, from the installed package or the checkout."""
    here = Path(__file__).parent.parent
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe by its path, or by its name among the shipped ones.

    Raises:
        UserFileNotFoundError: there is neither.
    """
    path, shipped = Path(name), recipes()
    if path.is_file():
        return path
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    if stem in shipped and str(path.parent) in (".", "configs"):  # a mistyped folder is no shipped recipe
        return shipped[stem]
    raise UserFileNotFoundError(
        f"config {name!r} does not exist; give a YAML file or one of the shipped recipes: "
        f"{', '.join(shipped)}"
    )


def checked_keys(content: Mapping[str, Any], keys: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Nested values by dotted key; `what` stands before a key in messages.

    Raises:
        UserError: a key is unknown or given twice, or a section is none.
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
            elif key in values:  # once in its section and once with a dot
                raise UserError(f"{what} {key!r} is given twice; give it once")
            elif isinstance(value, dict) or key not in keys:
                wanted = expected(keys[key]) if key in keys else f"a section with {', '.join(inside)}"
                raise UserError(f"{what} {key!r} is {shown(repr(value))}; expected {wanted}")
            else:  # older files may have views by tensors on a CPU
                values[key] = "pil" if (key, value) == ("machine.views", "tensor") else value

    walk("", content)
    return values


def comparable(content: Mapping[str, Any]) -> dict[str, Any]:
    """A stored recipe as plain nested values, without the read-out fields that are null."""
    model = content.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("readout"), Mapping):
        return dict(content)
    readout = {name: value for name, value in model["readout"].items() if value is not None}
    return {**content, "model": {**model, "readout": readout}}


def merged(values: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key with others over them; a section replaces a value in its place, and reverse."""
    kept = {
        key: value
        for key, value in values.items()
        if not any(key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in over)
    }
    return {**kept, **over}


def stored_recipe(content: Mapping[str, Any], where: str) -> Recipe:
    """The recipe that a run folder or a checkpoint of any version holds.

    Args:
        content: plain nested values.
        where: what holds them, for messages.

    Raises:
        UserError: it is no recipe.
    """
    values = checked_keys(content, leaf_keys(Recipe), f"{where}: key")
    try:
        return cast(Recipe, build(Recipe, values, dict.fromkeys(values, where)))
    except MissingError as error:
        raise UserError(f"{where}: {error}") from error


def checked_encoder(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `build_encoder` that a file holds, by the rules for those of a recipe.

    Raises:
        UserError: one is missing, unknown or out of its range, or some do not fit together.
    """
    readout = {"image_size": 224, "patch_size": 16} | dict(arguments)
    values: dict[str, Any] = {"image_size": readout.pop("image_size"), "model": {"drop_path_rate": 0.0}}
    values["model"] |= {key: readout.pop(key) for key in ("arch", "patch_size") if key in readout}
    name = readout.pop("readout", None)
    # What `build_encoder` and timm take for sizes that are left out.
    sizes = {"sparo": SIZES | {"key_dim": 64}, "pooler": SIZES}.get(str(name), {})
    one = {"group_size": 1} if name == "sparo" and readout.get("heads") != "multi" else {}
    values["model"]["readout"] = {"name": name, **sizes, **one, **readout}
    options = build(EncoderOptions, checked_keys(values, leaf_keys(EncoderOptions), "key"))
    return options.model.encoder_arguments(options.image_size)


def named_recipe(name: str, over: Mapping[str, Any], options_class: type = Recipe) -> Any:
    """A shipped recipe or that of a file, with these values by dotted key over its own.

    Args:
        options_class: what the file holds, if it is not a recipe alone.

    Raises:
        UserError: there is none, it is no YAML, or a key or value is wrong or missing.
    """
    path = find_recipe(name)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections with keys, as in the shipped recipes")
    values = checked_keys(content, leaf_keys(options_class), f"{path}: key")
    return build(options_class, merged(values, over), dict.fromkeys(values.keys() - over, str(path)))
