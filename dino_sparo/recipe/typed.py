"""Values by dotted key -> a dataclass of options: types, ranges, and one sentence about what is wrong.

A number is finite and above 0 unless the type of its field says otherwise, by one of the types below.
"""

import difflib
import math
import os
import re
import typing
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal

import yaml

from dino_sparo.errors import UserError
from dino_sparo.terminal import shown


@dataclass(frozen=True)
class Range:
    """What a number may be, in words and as a test."""

    words: str
    holds: Callable[[float], bool]


def up_to(most: int, least: int = 1) -> Range:
    """The range of a size or number from 0 or 1: far more than anybody uses, and no danger."""
    words = "of at least 0" if least == 0 else "above 0"
    return Range(f"{words} and at most {most:,}", lambda number: least <= number <= most)


BY_NAME = "by name"  # in the metadata of a field: the sections among which the one's `name` chooses
POSITIVE = Range("above 0", lambda number: number > 0)
AT_LEAST_0 = Range("of at least 0", lambda number: number >= 0)
Count = Annotated[int, AT_LEAST_0]
Amount = Annotated[float, AT_LEAST_0]
Share = Annotated[float, Range("from 0 to 1", lambda number: 0 <= number <= 1)]
Batch = Annotated[int, up_to(1_048_576)]
Epochs = Annotated[int, up_to(100_000)]
Processes = Annotated[int, up_to(256)]
Workers = Annotated[int, up_to(1_024, least=0)]
Heads = Annotated[int, up_to(1_024)]
Width = Annotated[int, up_to(65_536)]
BelowOne = Annotated[float, Range("of at least 0 and below 1", lambda number: 0 <= number < 1)]
Seed = Annotated[int, Range("from 0 to 2**63 - 1", lambda number: 0 <= number < 2**63)]


# YAML takes numbers such as 1e-6 for text, since they have no dot or no sign behind the e.
EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
MOST_TEXT = 100_000  # bytes of a YAML file; the shipped recipes have 4,000
MOST_NESTED = 20


class MissingError(UserError):
    """Required values are missing; the message lists their keys.

    Attributes:
        keys: the dotted keys.
    """

    def __init__(self, keys: list[str]) -> None:
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        super().__init__(f"missing: {', '.join(keys[:6])}{more}")
        self.keys = keys


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

    def section_at(section: type, prefix: str) -> Any:
        arguments = {}
        for field in fields(section):
            key, inner = f"{prefix}{field.name}", section_of(field.type)
            if BY_NAME in field.metadata:
                inner = _section_by_name(key, values, field.metadata[BY_NAME])
            inside = [name for name in values if name.startswith(f"{key}.")]
            if inner and key in values and inside and not is_dataclass(field.type):
                raise UserError(
                    f"{key} is {shown(values[key])}, but {inside[0]} is given too; give either {key} alone, "
                    f"or all of {', '.join(f'{key}.{one.name}' for one in fields(inner))}"
                )
            if inner and (is_dataclass(field.type) or inside):
                arguments[field.name] = section_at(inner, f"{key}.")
            elif key in values:
                where = f"{origin[key]}: " if origin and key in origin else ""
                arguments[field.name] = value_of(f"{where}{key}", values[key], field.type)
            elif field.default is MISSING and field.default_factory is MISSING:
                missing.append(key)
        return None if missing else section(**arguments)

    built = section_at(options_class, "")
    if missing:
        raise MissingError(missing)
    return built


def _section_by_name(key: str, values: Mapping[str, Any], sections: Mapping[str, type]) -> type:
    """The section that `key.name` chooses; fields that only others have are refused, unless they are null."""
    name = values.get(f"{key}.name")
    if not isinstance(name, str) or name not in sections:  # missing, or refused with what was expected
        return next(iter(sections.values()))
    own = {f"{key}.{field.name}" for field in fields(sections[name])}
    wrong = {
        given: value
        for given, value in values.items()
        if given.startswith(f"{key}.") and given not in own and value not in (None, "null")
    }
    if wrong:
        given = ", ".join(f"{one} is {value}" for one, value in wrong.items())
        raise UserError(f"{given}, but {key}.name is {name!r}, which has no such field; set it to null")
    return sections[name]


def value_of(key: str, value: Any, kind: Any) -> Any:
    """A value as the type of its field has it: text is read as YAML unless the field is text.

    Text of a field that begins with ~/ is a path below the user's home.

    Raises:
        UserError: it is of another type or out of range.
    """
    # An unset variable of the shell would mean the current folder.
    if value == "" or (value in ("[]", []) and kind != list[str]):
        raise UserError(f"{key} is empty; give at least one value or leave the option out")
    try:
        return _converted(value, kind)
    except (ValueError, OverflowError):
        raise UserError(f"{key} is {shown(value)}; expected {expected(kind)}") from None


def _converted(value: Any, kind: Any) -> Any:
    """As `value_of`, without a message. Raises ValueError, OverflowError."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        for one in sorted(inner, key=lambda one: one is not NoneType):
            with suppress(ValueError, OverflowError):
                return _converted(value, one)
    elif (kind is str and isinstance(value, str)) or (origin is Literal and value in inner):
        return os.path.expanduser(value) if str(value).startswith("~/") else value
    elif isinstance(value, str) and kind is not str and origin is not Literal:
        parsed = float(value) if EXPONENT.fullmatch(value) else load_yaml(value, "text")
        if isinstance(parsed, str):
            raise ValueError
        return _converted(parsed, kind)
    elif origin in (list, tuple) and isinstance(value, list | tuple) and (value or kind == list[str]):
        kinds = inner if origin is tuple else inner * len(value)
        return origin(_converted(*each) for each in zip(value, kinds, strict=True))
    elif kind in (bool, NoneType) and type(value) is kind:
        return value
    else:
        number_kind, allowed = inner if origin is Annotated else (kind, POSITIVE)
        if number_kind is float and type(value) is int:
            value = float(value)
        if type(value) is number_kind and abs(value) < math.inf and allowed.holds(value):
            return value
    raise ValueError


def expected(kind: Any) -> str:  # noqa: PLR0911 one for each kind of type
    """A type in words."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    numbers = {int: "a whole number", float: "a number"}
    if is_dataclass(kind):
        return f"a section with {', '.join(field.name for field in fields(kind))}"
    if origin is Annotated:
        return f"{numbers[inner[0]]} {inner[1].words}"
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a list [{', '.join(map(expected, inner))}]"
    if origin is list:
        return f"a list, each {expected(inner[0])}"
    if kind in numbers:
        return f"{numbers[kind]} {POSITIVE.words}"
    return {str: "text", bool: "true or false", NoneType: "null"}.get(kind) or " or ".join(
        map(expected, inner)
    )


def section_of(kind: Any) -> type | None:
    """The dataclass that a field is, or may be."""
    kinds = (kind, *typing.get_args(kind))
    return next((one for one in kinds if isinstance(one, type) and is_dataclass(one)), None)


def leaf_keys(options_class: type) -> dict[str, Any]:
    """Dotted key -> type of every option."""
    return {key: field.type for key, (field, _) in leaves(options_class).items()}


def leaves(options_class: type, prefix: str = "") -> dict[str, tuple[Field[Any], type]]:
    """Every option by dotted key: its field, and the dataclass that has the field."""
    found: dict[str, tuple[Field[Any], type]] = {}
    for field in fields(options_class):
        section = section_of(field.type)
        if section is not field.type:
            found[f"{prefix}{field.name}"] = field, options_class
        for one in filter(None, field.metadata.get(BY_NAME, {"": section}).values()):
            for key, leaf in leaves(one, f"{prefix}{field.name}.").items():
                found.setdefault(key, leaf)
    return found


def unknown(what: str, key: str, keys: Collection[str]) -> UserError:
    """`what` is unknown, and the nearest valid key to it: by its whole name or by its last part."""
    key = key[:100]
    inside = [known for known in keys if known.startswith(f"{key}.")]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6) or inside[:1]
    if not near:
        last = {known.rpartition(".")[2]: known for known in keys}
        near = [last[match] for match in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)]
    hint = f"did you mean {near[0]!r}?" if near else "see --help for all keys"
    return UserError(f"{shown(what)} is unknown; {hint}")


def flattened(config: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """Fields of a nested recipe by dotted key, leaving out these fields and sections."""

    def walk(prefix: str, section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            if f"{prefix}{name}" in without:
                continue
            if isinstance(value, Mapping):
                yield from walk(f"{prefix}{name}.", value)
            else:
                yield f"{prefix}{name}", value

    return dict(walk("", config))


# --- YAML


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises UserError as `load_yaml`, and OSError."""
    from dino_sparo.files import read_small  # which pages of help do not need

    try:
        text = read_small(path, MOST_TEXT).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no valid YAML: it is no UTF-8 text") from error
    return load_yaml(text, str(path))


def load_yaml(text: str, name: str) -> Any:
    """What YAML text holds: plain values, lists, and mappings whose keys are there once.

    Numbers are decimal: `010`, `0x10`, `1_000` and `1:30` stay text, as dates do.

    Raises:
        UserError: it is no YAML, or has aliases, tags, or too much; the message begins with `name`.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the second for !!int and dates
        raise UserError(f"{name} is no valid YAML: {' '.join(str(error).split())}") from error


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader without what makes a short text large or a value something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012 as the base class has it
        first: [one for one in resolvers if one[0].rpartition(":")[2] in ("null", "bool", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        wrong = None
        if isinstance(event, yaml.AliasEvent):
            wrong = f"*{event.anchor} is an alias; write the value itself there"
        elif getattr(event, "tag", None) not in (None, "!"):
            wrong = f"{event.tag!r} is a tag; leave it out"
        elif self.depth == MOST_NESTED:
            wrong = f"more than {MOST_NESTED} sections or lists within each other"
        if wrong:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: {wrong}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                break  # the base class names the line
            if key in seen:
                line = f"line {key_node.start_mark.line + 1}"
                raise yaml.YAMLError(f"{line}: key {key!r} is given twice; give it once")
            seen.add(key)
        return super().construct_mapping(node, deep)


_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]{0,18})$"), list("-+0123456789")
)
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?$|[-+]?\.inf$|\.nan$"),
    list("-+0123456789."),
)
