"""Arguments as people write them -> the options of a command. Needs no torch."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from dino_sparo.errors import UserError
from dino_sparo.recipe.files import checked_keys, named_recipe, recipes
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import MissingError, build, leaf_keys, load_yaml, section_of, unknown, value_of

FLAGS = {"quiet": bool, "dry_run": bool}  # of the program, not of a command
NOT_IN_RECIPES = {"run_dir", "data.path"}


def given_values(
    arguments: list[str], options_class: type, *, usage: str, positional: str | None = None
) -> dict[str, Any]:
    """Arguments as values by key: `--train-fraction V` and `--train_fraction=V` alike, a flag alone as true,
    all values of an option for several texts, `--test A=x B=y`, as one list.

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
        if kinds[key] in (list[str], list[str] | None) and (equals or (rest and not rest[0].startswith("-"))):
            texts = [value] if equals else []
            while rest and not rest[0].startswith("-"):
                texts.append(rest.pop(0))
            for text in texts:
                more = value_of(key, text, list[str]) if text.startswith("[") else [text]
                values[key] = values.get(key, []) + more
        elif key in values:
            raise UserError(f"option --{key} is given twice; give it once")
        elif equals:
            values[key] = value
        elif kinds[key] is bool and (rest or [""])[0].lower() not in ("true", "false", "yes", "no"):
            values[key] = True
        elif rest and not rest[0].startswith("--"):
            values[key] = rest.pop(0)
        else:
            raise UserError(f"option --{key} has no value; give it as --{key} VALUE")
    return values


def options_of(options_class: type, given: Mapping[str, Any]) -> Any:
    """The options of a command: `config` names a YAML file of them, which for a run is the recipe.

    Raises:
        UserError: one sentence naming the key, the value, what was expected and the remedy.
    """
    keys = leaf_keys(options_class)
    values = dict(given)
    for key, value in given.items():  # a section as text, `{width: 64, depth: 3}`
        if section_of(keys.get(key)) and isinstance(value, str) and value.startswith("{"):
            with suppress(UserError):  # the text is then refused with what was expected
                values[key] = load_yaml(value, key)
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
        raise UserError(f"{error}; {remedy}") from error
