"""Arguments as people write them -> the options of a command. Needs no torch."""

import json
from collections.abc import Mapping
from typing import Any

from dino_sparo.errors import UserError
from dino_sparo.recipe.files import find_recipe, merged, recipes, values_of_file
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import MissingError, build, leaf_keys, unknown

FLAGS = ("quiet", "dry_run")  # of the program, not of a command
SHOWN_KEYS = 6  # of many that are missing
NOT_IN_RECIPES = {"run_dir", "data.path"}


def without_flags(arguments: list[str]) -> tuple[list[str], set[str]]:
    """The arguments without the flags of the program, and those: `quiet`, `dry_run`."""
    flags = {argument: argument.removeprefix("--").replace("-", "_") for argument in arguments}
    given = {argument: flag for argument, flag in flags.items() if argument[:2] == "--" and flag in FLAGS}
    return [argument for argument in arguments if argument not in given], set(given.values())


def given_values(  # noqa: PLR0912 one branch for each way to write an option
    arguments: list[str], options_class: type, *, usage: str, positional: str | None = None
) -> dict[str, Any]:
    """Arguments as values by key: `--train-fraction V` and `--train_fraction=V` alike, a flag alone as true,
    all values of an option for several texts, `--test A=x B=y`, as one list.

    Args:
        positional: the option that an argument without a name stands for.

    Raises:
        UserError: an option is unknown, given twice or without a value.
    """
    keys = leaf_keys(options_class)
    kinds = {"config": str} | keys
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") and positional is not None and argument:
            if kinds[positional] == list[str] | None:
                values[positional] = [*values.get(positional, []), argument]
                continue
            if positional not in values:
                values[positional] = argument
                continue
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument!r}; expected: {usage}")
        name, equals, value = argument[2:].partition("=")
        key = name.replace("-", "_")
        if key in FLAGS:
            raise UserError(f"option --{key} takes no value; give --{key} alone, or leave it out")
        if key not in kinds:
            raise unknown(f"option --{name}", key, [*keys, *FLAGS])
        if kinds[key] == list[str] and not (value or rest[:1] or ["["])[0].startswith("["):
            texts = [value] if equals else []
            while rest and not rest[0].startswith("-"):
                texts.append(rest.pop(0))
            values[key] = [*values.get(key, []), *texts]
            continue
        if key in values:
            raise UserError(f"option --{key} is given twice; give it once")
        alone = not rest or rest[0].lower() not in ("true", "false", "yes", "no")
        if equals:
            values[key] = value
        elif kinds[key] is bool and alone:
            values[key] = True
        elif not rest or rest[0].startswith("--"):
            raise UserError(f"option --{key} has no value; give it as --{key} VALUE")
        else:
            values[key] = rest.pop(0)
    return values


def options_of(options_class: type, given: Mapping[str, Any]) -> Any:
    """The options of a command: `config` names a YAML file of them, which for a run is the recipe.

    Raises:
        UserError: one sentence naming the key, the value, what was expected and the remedy.
    """
    keys = leaf_keys(options_class)
    values, origin = dict(given), {}
    if "config" in given and "config" not in keys:  # it is an option of a command that looks at a recipe
        path = find_recipe(values.pop("config"))
        of_file = values_of_file(path, keys)
        origin = dict.fromkeys(of_file.keys() - given, str(path))
        values = merged(of_file, values)
    try:
        return build(options_class, values, origin)
    except MissingError as error:
        raise UserError(_missing(error.keys, issubclass(options_class, Recipe))) from error


def command_line(given: Mapping[str, Any]) -> list[str]:
    """Values by key as arguments again."""
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()
    ]


def _missing(names: list[str], of_run: bool) -> str:
    """What is missing and how to give it."""
    if not of_run or NOT_IN_RECIPES.issuperset(names):
        return f"missing: {', '.join(names)}; give {' '.join(f'--{name} VALUE' for name in names)}"
    names = sorted(names, key=lambda name: name not in NOT_IN_RECIPES)
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return (
        f"missing: {', '.join(names[:SHOWN_KEYS])}{more}; an experiment has no defaults, so start from a "
        f"recipe (--config NAME, one of {', '.join(recipes())}) and give what it leaves open as "
        f"--section.key VALUE"
    )
