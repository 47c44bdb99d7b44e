"""Arguments as people write them -> the options of a command. Needs no torch."""

import os
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from dino_sparo.errors import UserError, UserFileNotFoundError
from dino_sparo.files import did_you_mean
from dino_sparo.recipe.files import CONFIG_FILE, checked_keys, named_recipe, read_sections, recipes
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import (
    MissingError,
    build,
    leaf_keys,
    unknown,
    value_of,
    with_sections_read,
)
from dino_sparo.terminal import log

FLAGS = {"quiet": bool, "dry_run": bool}  # of the program, not of a command
NOT_IN_RECIPES = {"run_dir", "data.path"}


def given_values(
    arguments: list[str], options_class: type, *, usage: str, positional: str | None = None
) -> dict[str, Any]:
    """Arguments as values by key: `--train-fraction V` and `--train_fraction=V` alike, a flag alone as true,
    the values of a list alike as `0 5`, `0,5`, or `[0, 5]`.

    Args:
        positional: the option that an argument without a name stands for.

    Raises:
        UserError: an option is unknown, given twice or without a value.
    """
    kinds = FLAGS | {"config": str} | leaf_keys(options_class)
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if positional is not None and argument[:1] not in ("", "-"):
            argument = f"--{positional}={argument}"
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument!r}; expected: {usage}")
        name, equals, value = argument[2:].partition("=")
        key = name.replace("-", "_")
        if key not in kinds:
            raise unknown(f"option --{name}", key, kinds)
        item, texts = _item_of(kinds[key]), [value] if equals else []
        is_flag = kinds[key] is bool and (rest or [""])[0].lower() not in ("true", "false", "yes", "no")
        if not equals and not is_flag:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"option --{key} has no value; give it as --{key} VALUE")
            texts.append(rest.pop(0))
        while item is not None and rest and not rest[0].startswith("--") and _can_be(rest[0], item):
            texts.append(rest.pop(0))
        if item is str:
            values[key] = values.get(key, []) + _texts(key, texts)
        elif key in values:
            raise UserError(f"option --{key} is given twice; give it once")
        else:
            values[key] = " ".join(texts) if texts else True
    return values


def _item_of(kind: Any) -> Any:
    """The type of the values of a list; None for other types."""
    lists = (one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) in (list, tuple))
    return next((typing.get_args(one)[0] for one in lists), None)


def _can_be(text: str, item: Any) -> bool:
    """Whether an argument is one more value of the list before it, and not RUN."""
    if item is str:
        return not text.startswith("-")
    with suppress(UserError):
        return bool(value_of("", text, list[item]))
    return False


def _texts(key: str, given: list[str]) -> list[str]:
    """Strings in brackets, separated by commas, or one by one; a path or NAME=VALUE may contain commas."""
    if given[0].startswith("["):
        return value_of(key, " ".join(given), list[str])
    return [one for text in given for one in ([text] if {*"/="} & {*text} else text.split(","))]


def with_recipe(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a command, with the recipe that it uses by default: that of the run, or the demo's."""
    if name == "check" and given.get("num_images", "null") != "null":
        return dict(given) | {"data.path": "shapes"}  # stands in, since no images are read
    if name == "demo":
        data = Path(given["data.path"]).resolve().name if "data.path" in given else ""
        return {"config": "demo", "run_dir": f"runs/demo-{data}" if data else "runs/demo"} | dict(given)
    stored = Path(os.path.expanduser(given.get("run_dir", ""))) / CONFIG_FILE
    own = {"config": str(stored)} if name == "pretrain" and "run_dir" in given and stored.is_file() else {}
    return own | dict(given)


def with_images(options_class: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a command; if it needs images and none are given, those that the run was trained on.

    Raises:
        UserError: there is no such run, or its recipe cannot be read.
    """
    needed = any(
        field.name == "data" and field.default is field.default_factory for field in fields(options_class)
    )
    if not needed or "run" not in given or "data.path" in given:
        return dict(given)
    run = Path(os.path.expanduser(given["run"]))
    if not run.exists() and not given["run"].startswith("timm:"):
        raise UserFileNotFoundError(f"there is no run {given['run']!r}{did_you_mean(run)}; give its folder")
    stored = read_sections(run / CONFIG_FILE) if (run / CONFIG_FILE).exists() else {}
    own = checked_keys({"data": stored.get("data", {})}, leaf_keys(Recipe), f"{run / CONFIG_FILE}: key")
    own = {key: own[key] for key in leaf_keys(options_class).keys() & own.keys() if own[key] is not None}
    if "data.path" not in own:
        raise UserError(
            f"{given['run']} is not a run folder, so its images are unknown; give a run folder, "
            "or --data.path DIR"
        )
    log.info("images: those of the run, %s; use --data.path for others", own["data.path"])
    return own | dict(given)


def options_of(options_class: type, given: Mapping[str, Any]) -> Any:
    """The options of a command: `config` names a YAML file of them, which for a run is the recipe.

    Raises:
        UserError: one sentence naming the key, the value, what was expected and the remedy.
    """
    keys = leaf_keys(options_class)
    values = with_sections_read(given, keys)
    for key in given:
        if isinstance(values[key], dict):
            values |= checked_keys({key: values.pop(key)}, keys, "option")
    try:
        if "config" in keys or "config" not in given:  # `bench` only looks at a recipe
            return build(options_class, values)
        return named_recipe(values.pop("config"), values, options_class)
    except MissingError as error:
        remedy = f"give {' '.join(f'--{key} VALUE' for key in error.keys[:6])}"
        begun = {key.rpartition(".")[0] for key in given} - {""}  # sections that were given in part
        in_begun = all(key.rpartition(".")[0] in begun for key in error.keys)
        if issubclass(options_class, Recipe) and not (NOT_IN_RECIPES.issuperset(error.keys) or in_begun):
            remedy = f"start from a recipe that has them: --config NAME, one of {', '.join(recipes())}"
            if run := given.get("run_dir"):
                remedy = f"{run} contains no run to resume{did_you_mean(Path(run))}; {remedy}"
        raise UserError(f"{error}; {remedy}") from error
