"""Values by dotted key -> a dataclass of options: types, ranges, and one sentence about what is wrong.

A number is finite and above 0 unless the type of its field says otherwise, by one of the types below.
"""

import difflib
import math
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from dino_sparo.errors import UserError


@dataclass(frozen=True)
class Range:
    """What a number may be, from `low` to `high`, with or without the ends, and that in words."""

    words: str
    low: float = 0
    high: float = math.inf
    with_low: bool = True
    with_high: bool = True

    def has(self, number: float) -> bool:
        """Whether a number is finite and within the range."""
        above = number > self.low or (self.with_low and number == self.low)
        below = number < self.high or (self.with_high and number == self.high)
        return math.isfinite(number) and above and below


BY_NAME = "by name"  # in the metadata of a field: the sections among which the one's `name` chooses
POSITIVE = Range("above 0", with_low=False)
Count = Annotated[int, Range("of at least 0")]
Amount = Annotated[float, Range("of at least 0")]
Share = Annotated[float, Range("from 0 to 1", high=1)]
BelowOne = Annotated[float, Range("of at least 0 and below 1", high=1, with_high=False)]
Seed = Annotated[int, Range("from 0 to 2**63 - 1", high=2**63, with_high=False)]


def build(options_class: type, values: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> Any:
    """An instance of a dataclass, whose fields may be dataclasses too.

    Args:
        values: dotted key -> value as YAML gives it, or as text; all keys are among `leaf_keys`.
        origin: dotted key -> the file that it stands in, for messages.

    Raises:
        UserError: a value is of another type or out of its range, or fields do not fit together.
        MissingError: values are missing.
    """
    missing: list[str] = []
    built = _build(options_class, _with_sections(options_class, values), origin or {}, "", missing)
    if missing:
        raise MissingError(missing)
    return built


def _with_sections(options_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with a section that is given as text, such as `{width: 64, depth: 3}`, as its fields."""
    keys, expanded = leaf_keys(options_class), dict(values)
    for key, value in values.items():
        if section_of(keys[key]) is not None and isinstance(value, str) and value.startswith("{"):
            with suppress(yaml.YAMLError):
                for name, inner in yaml.safe_load(value).items():
                    if f"{key}.{name}" not in keys:
                        raise unknown(f"option --{key}.{name}", f"{key}.{name}", keys)
                    expanded[f"{key}.{name}"] = inner
                del expanded[key]
    return expanded


class MissingError(UserError):
    """Required values are missing.

    Attributes:
        keys: the dotted keys.
    """

    def __init__(self, keys: list[str]) -> None:
        super().__init__(f"missing: {', '.join(keys)}")
        self.keys = keys


def _build(
    options_class: type, values: Mapping[str, Any], origin: Mapping[str, str], prefix: str, missing: list[str]
) -> Any:
    arguments = {}
    for field in fields(options_class):
        key, section = f"{prefix}{field.name}", section_of(field.type)
        if BY_NAME in field.metadata:
            section = _section_by_name(key, values, field.metadata[BY_NAME])
        given = any(name.startswith(f"{key}.") for name in values)
        if section is not None and (given or is_dataclass(field.type)):
            arguments[field.name] = _build(section, values, origin, f"{key}.", missing)
        elif key in values:
            where = f"{origin[key]}: " if key in origin else ""
            arguments[field.name] = value_of(f"{where}{key}", values[key], field.type)
        elif field.default is MISSING and field.default_factory is MISSING:
            missing.append(key)
    return None if missing else options_class(**arguments)


def _section_by_name(key: str, values: Mapping[str, Any], sections: Mapping[str, type]) -> type:
    """The section that `key.name` chooses; fields that only others have are refused, unless they are null."""
    name = values.get(f"{key}.name")
    if not isinstance(name, str) or name not in sections:  # missing, or refused with what was expected
        return next(iter(sections.values()))
    own = [field.name for field in fields(sections[name]) if field.name != "name"]
    others = [
        given.removeprefix(f"{key}.")
        for given, value in values.items()
        if given.startswith(f"{key}.") and value not in (None, "null")
    ]
    if wrong := [field for field in others if field not in [*own, "name"]]:
        given = ", ".join(f"{key}.{field} is {values[f'{key}.{field}']}" for field in wrong)
        raise UserError(
            f"{given}, but {key}.name is {name!r}, which has {', '.join(own) or 'no further fields'}; set "
            f"{'it' if len(wrong) == 1 else 'them'} to null"
        )
    return sections[name]


def value_of(key: str, value: Any, kind: Any) -> Any:
    """A value as the type of its field has it: text is read as YAML unless the field is text.

    Raises:
        UserError: it is of another type or out of range.
    """
    if value == "":  # an unset variable of the shell would mean the current folder
        raise UserError(f"{key} is empty; give a value or leave the option out")
    try:
        converted = _converter(kind).parse_object({"value": value}).value
    except ArgumentError:
        converted = MISSING
    if converted == [] and kind != list[str]:
        raise UserError(f"{key} is empty; give at least one value or leave the option out")
    wrong = converted is MISSING or (converted is None and type(None) not in _alternatives(kind))
    if wrong or not all(allowed.has(number) for number, allowed in _numbers(converted, kind)):
        raise UserError(f"{key} is {value}; expected {expected(kind)}")
    return converted


@cache
def _converter(kind: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--value", type=_without_sections(kind))
    return parser


def _without_sections(kind: Any) -> Any:
    """The type without dataclasses, whose fields are built by themselves."""
    kinds = [one for one in _alternatives(kind) if not is_dataclass(one)]
    return typing.Union[tuple(kinds)] if len(kinds) > 1 else kinds[0]  # noqa: UP007 of a list


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, UnionType) else (kind,)


def _numbers(value: Any, kind: Any) -> Iterator[tuple[float, Range]]:
    """All numbers of a value with what each may be."""
    if isinstance(value, bool) or not isinstance(value, int | float | list | tuple):
        return
    for one in _alternatives(kind):
        inner = typing.get_args(one)
        if isinstance(value, list | tuple) and typing.get_origin(one) in (list, tuple):
            kinds = inner if len(inner) == len(value) else inner[:1] * len(value)
            for number, of_number in zip(value, kinds, strict=True):
                yield from _numbers(number, of_number)
        elif isinstance(value, int | float) and typing.get_origin(one) is Annotated:
            yield value, inner[1]
        elif isinstance(value, int | float) and one in (int, float):
            yield value, POSITIVE


def expected(kind: Any) -> str:  # noqa: PLR0911 one for each kind of type
    """A type in words."""
    words = {str: "text", bool: "true or false", type(None): "null"}
    numbers = {int: "a whole number", float: "a number"}
    inner = typing.get_args(kind)
    if kind in words:
        return words[kind]
    if kind in numbers:
        return f"{numbers[kind]} {POSITIVE.words}"
    if is_dataclass(kind):
        return f"a section with {', '.join(field.name for field in fields(kind))}"
    if typing.get_origin(kind) is Annotated:
        return f"{numbers[inner[0]]} {inner[1].words}"
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(inner)}: {', '.join(map(expected, inner))}"
    if typing.get_origin(kind) is list:
        return f"a list, each {expected(inner[0])}"
    return " or ".join(map(expected, inner))


def section_of(kind: Any) -> type | None:
    """The dataclass that a field is, or may be."""
    kinds = (kind, *typing.get_args(kind))
    return next((one for one in kinds if isinstance(one, type) and is_dataclass(one)), None)


def leaf_keys(options_class: type) -> dict[str, Any]:
    """Dotted key -> type of every option."""
    return {key: field.type for key, field, _ in leaves(options_class)}


def leaves(options_class: type, prefix: str = "") -> Iterator[tuple[str, Field[Any], type]]:
    """Every option: its dotted key, its field, and the dataclass that has the field."""
    for field in fields(options_class):
        section = section_of(field.type)
        if section is not field.type:
            yield f"{prefix}{field.name}", field, options_class
        sections = field.metadata.get(BY_NAME, {"": section} if section else {}).values()
        seen = set()
        for leaf in (leaf for one in sections for leaf in leaves(one, f"{prefix}{field.name}.")):
            if leaf[0] not in seen:
                seen.add(leaf[0])
                yield leaf


def unknown(what: str, key: str, keys: Collection[str]) -> UserError:
    """`what` is unknown, and the nearest valid key to it: by its whole name or by its last part."""
    inside = [known for known in keys if known.startswith(f"{key}.")]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6) or inside[:1]
    if not near:
        last = {known.rpartition(".")[2]: known for known in keys}
        near = [last[match] for match in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)]
    hint = f"did you mean {near[0]!r}?" if near else "see --help for all keys"
    return UserError(f"{what} is unknown; {hint}")


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
