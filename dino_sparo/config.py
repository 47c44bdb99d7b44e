"""Recipe and command line -> checked options. Imported before torch, so that mistakes answer at once."""

import difflib
import re
import typing
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from dino_sparo.checks import check_options
from dino_sparo.errors import UserError, UserFileNotFoundError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

Page = Callable[[ArgumentParser, Mapping[str, Any], Collection[str]], None]

FLAGS = ("quiet", "dry_run")  # of the program, not of a command; taken off before unless they have a value
SHOWN_KEYS = 6  # of many that are missing
NOT_IN_RECIPES = {"run_dir", "run", "data.path", "out", "source"}


def parse_options(options_class: type, arguments: list[str], *, usage: str, page: Page | None = None) -> Any:
    """Options of a command from its arguments: `--config RECIPE`, then `--section.key VALUE` over it.

    Args:
        page: makes the page of `--help` of the parser, the keys, and those that a recipe does not give.

    Raises:
        UserError: one sentence naming the key, the value, what was expected and the remedy.
        SystemExit: after `--help` or `--print_config`.
    """
    keys = leaf_keys(options_class)
    arguments = _resolve_config(_check_arguments(arguments, keys, usage), keys)
    parser = _parser(options_class, keys, usage, page)
    try:
        options = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        raise UserError(_one_sentence(str(error), keys)) from error
    options = options_class(**{field.name: getattr(options, field.name) for field in fields(options_class)})
    check_options(options)
    return options


def _parser(options_class: type, keys: dict[str, Any], usage: str, page: Page | None) -> ArgumentParser:
    of_run = any(key.startswith("optim.") for key in keys)
    parser = ArgumentParser(prog="dino-sparo", usage=usage, exit_on_error=False)
    what = "Recipe: a YAML file or the name of a shipped one." if of_run else "YAML file of these options."
    if "config" not in keys:  # it is an option of a command that only looks at a recipe
        parser.add_argument("--config", action="config", help=what)
    parser.add_class_arguments(options_class, None)
    if page is not None:
        page(parser, keys, NOT_IN_RECIPES if of_run else keys)
    return parser


def recipes() -> dict[str, Path]:
    """Shipped recipes by name, from the installed package or the checkout."""
    here = Path(__file__).parent
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


def leaf_keys(options_class: type) -> dict[str, Any]:
    """Dotted key -> type of every option."""
    keys: dict[str, Any] = {}
    for field in fields(options_class):
        kinds = [field.type, *typing.get_args(field.type)]
        nested = [kind for kind in kinds if is_dataclass(kind)]
        if field.type not in nested:
            keys[field.name] = field.type
        for kind in nested:
            keys |= {
                f"{field.name}.{key}": inner for key, inner in leaf_keys(typing.cast(type, kind)).items()
            }
    return keys


def _check_arguments(arguments: list[str], keys: dict[str, Any], usage: str) -> list[str]:
    """Arguments as `--key=value` in their order; unknown, repeated and valueless ones are refused."""
    checked, seen, rest = [], set(), list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help", "--model.arch.help") or argument.split("=")[0] == "--print_config":
            checked.append(argument)
            continue
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument!r}; expected: {usage}")
        key, equals, value = argument[2:].partition("=")
        if key in FLAGS:
            raise UserError(f"option --{key} takes no value; give --{key} alone, or leave it out")
        if key not in keys and key != "config":
            raise UserError(_unknown(f"option --{key}", key, keys))
        if key in seen:
            raise UserError(f"option --{key} is given twice; give it once")
        seen.add(key)
        if not equals and keys.get(key) is bool and (not rest or rest[0].startswith("--")):
            value = "true"
        elif not equals:
            if not rest:
                raise UserError(f"option --{key} has no value; give it as --{key} VALUE")
            value = rest.pop(0)
        checked.append(f"--{key}={value}")
    return checked


def _resolve_config(arguments: list[str], keys: dict[str, Any]) -> list[str]:
    """Replace the recipe's name by its path after checking its keys; the recipe comes first."""
    recipe, others = [], []
    for argument in arguments:
        if argument.startswith("--config=") and "config" not in keys:
            path = find_recipe(argument.removeprefix("--config="))
            _check_recipe(path, keys)
            recipe.append(f"--config={path}")
        else:
            others.append(argument)
    return recipe + others


def _check_recipe(path: Path, keys: dict[str, Any]) -> None:
    try:
        content = _load_unique(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no valid YAML: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected sections with keys, as in the shipped recipes")

    seen = set()

    def walk(prefix: str, value: Any) -> None:
        for name, inner in value.items():
            key = f"{prefix}{name}"
            if key in seen:  # once in its section and once with a dot
                raise UserError(f"{path}: key {key!r} is given twice; give it once")
            seen.add(key)
            inside = [known for known in keys if known.startswith(f"{key}.")]
            if key not in keys and not inside:
                raise UserError(_unknown(f"{path}: key {key!r}", key, keys))
            if isinstance(inner, dict):
                if not inside:
                    raise UserError(f"{path}: key {key!r} is a section here; expected {_expected(keys[key])}")
                walk(f"{key}.", inner)
            elif key not in keys:
                raise UserError(f"{path}: key {key!r} is {inner!r}; expected a section with {_names(inside)}")

    walk("", content)


def _unknown(what: str, key: str, keys: dict[str, Any]) -> str:
    """`what` is unknown, and the nearest valid key to it: by its whole name or by its last part."""
    inside = [known for known in keys if known.startswith(f"{key}.")]
    near = difflib.get_close_matches(key, [*keys, *FLAGS], n=1, cutoff=0.6) or inside[:1]
    if not near:
        last = {known.rpartition(".")[2]: known for known in keys}
        near = [last[match] for match in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)]
    hint = f"did you mean {near[0]!r}?" if near else "see --help for all keys"
    return f"{what} is unknown; {hint}"


def _one_sentence(message: str, keys: dict[str, Any]) -> str:
    """The parser's message as one sentence with key, value and what was expected."""
    missing = re.search(r"the following arguments are required: (.*)", message)
    if missing:
        # The parser leaves out the section for fields of a section in a union (model.arch).
        names = [
            next((key for key in keys if f".{key}".endswith(f".{name}")), name)
            for name in missing[1].split(", ")
        ]
        if NOT_IN_RECIPES.issuperset(names):
            return f"missing: {', '.join(names)}; give {' '.join(f'--{name} VALUE' for name in names)}"
        names.sort(key=lambda name: name not in NOT_IN_RECIPES)
        more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
        return (
            f"missing: {', '.join(names[:SHOWN_KEYS])}{more}; an experiment has no defaults, so start from a "
            f"recipe (--config NAME, one of {', '.join(recipes())}) and give what it leaves open as "
            f"--section.key VALUE"
        )
    wrong = re.search(r'[Kk]ey "([^"]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if wrong and value and wrong[1] in keys:
        return f"{wrong[1]} is {value[1].strip()}; expected {_expected(keys[wrong[1]])}"
    return " ".join(message.split())


def _expected(kind: Any) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if kind in words:
        return words[kind]
    if is_dataclass(kind):
        return f"a section with {_names([field.name for field in fields(kind)])}"
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(inner)}: {', '.join(map(_expected, inner))}"
    if typing.get_origin(kind) is list:
        return f"a list, each {_expected(inner[0])}"
    return " or ".join(map(_expected, inner))


def _names(keys: list[str]) -> str:
    return ", ".join(key.rpartition(".")[2] for key in keys)


def _load_unique(path: Path) -> Any:
    with open(path) as file:  # an open file, so that messages name it
        return yaml.load(file, Loader=_UniqueKeyLoader)


def flattened(config: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """Fields of a nested recipe by dotted key, leaving out these fields and sections."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if name in without:
            continue
        if isinstance(value, Mapping):
            inner = [key.removeprefix(f"{name}.") for key in without if key.startswith(f"{name}.")]
            flat |= {f"{name}.{key}": field for key, field in flattened(value, without=inner).items()}
        else:
            flat[name] = value
    return flat


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error instead of a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                break  # the base class names the line
            if key in seen:
                mark = key_node.start_mark
                raise UserError(
                    f"{mark.name}, line {mark.line + 1}: key {key!r} is given twice; give it once"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
