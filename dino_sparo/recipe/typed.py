"""Values by dotted key -> a dataclass of options, with checks of types and ranges; YAML without surprises.

Numbers must be finite, and above 0 unless the field has another range (one of the types below).
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
    """The allowed values of a number, as text and as a predicate."""

    words: str
    holds: Callable[[float], bool]


def up_to(most: int, least: int = 1) -> Range:
    """A range from 0 or 1 to an upper bound that only excludes absurd values."""
    return Range(f"from {least} to {most:,}", lambda number: least <= number <= most)


BY_NAME = "by name"  # key in the metadata of a field whose section class depends on its `name`
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

# YAML reads numbers such as 1e-6, without a dot or a sign in the exponent, as text.
EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
SEPARATED = re.compile(r"""[^\s,"'\[\]]+""")  # the values of a list
MOST_TEXT = 100_000  # bytes of a YAML file; the shipped recipes have 4,000
MOST_NESTED = 20


# Words of other programs, first those of the official DINO code -> the key here, the first one that there is.
ELSEWHERE = {
    "momentum_teacher": "optim.teacher_momentum",
    "out_dim": "head.num_prototypes",
    "use_fp16": "machine.precision precision",
    "weight_decay_end": "optim.final_weight_decay",
    "clip_grad": "optim.clip_norm",
    "freeze_last_layer": "optim.freeze_last_layer_epochs",
    "min_lr": "optim.final_lr",
    "global_crops_scale": "views.global_scale",
    "local_crops_scale": "views.local_scale",
    "local_crops_number": "views.num_local_crops",
    "saveckp_freq": "log.checkpoint_every_epochs",
    "nb_knn": "k",
    "n_last_blocks": "num_blocks",
    "pretrained_weights": "run init",
    "dump_features": "cache",
    **dict.fromkeys(("output_dir", "out_dir", "out", "output", "save_dir", "logdir"), "run_dir out"),
    **dict.fromkeys(("data", "data_path", "data_dir", "dataset", "train_dir", "root"), "data.path source"),
    **dict.fromkeys(("lr", "learning_rate", "base_lr", "blr"), "optim.lr_per_256 learning_rates"),
    **dict.fromkeys(("bs", "batch", "batch_size"), "optim.global_batch_size batch_size"),
    **dict.fromkeys(("gpus", "num_gpus", "ngpus", "devices", "nproc_per_node", "world_size"), "nproc gpu"),
    **dict.fromkeys(("wd", "weight_decay"), "optim.weight_decay"),
    **dict.fromkeys(("max_epochs", "num_epochs", "epochs"), "optim.epochs epochs"),
    **dict.fromkeys(("workers", "j"), "machine.num_workers num_workers"),
    **dict.fromkeys(("amp", "fp16", "bf16", "mixed_precision"), "machine.precision precision"),
    **dict.fromkeys(("pretrained", "weights", "checkpoint", "ckpt", "model_path"), "init run"),
    **dict.fromkeys(("img_size", "image_size", "crop_size", "input_size"), "views.global_size short_side"),
}


class MissingError(UserError):
    """Required values are missing; `keys` are their dotted keys."""

    def __init__(self, keys: list[str]) -> None:
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        super().__init__(f"missing: {', '.join(keys[:6])}{more}")
        self.keys = keys


def build(options_class: type, values: Mapping[str, Any], origin: Mapping[str, str] | None = None) -> Any:
    """Build a dataclass of options, whose fields may be dataclasses too.

    Args:
        values: dotted key -> value from YAML, or text; all keys must be in `leaf_keys`.
        origin: dotted key -> its file, for messages.

    Raises:
        UserError: a value has a wrong type or is out of range, or values do not fit together.
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
    """The section class for `key.name`. Raises UserError for fields that it lacks, unless they are null."""
    name = values.get(f"{key}.name")
    if not isinstance(name, str) or name not in sections:  # `build` raises for it
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
    """Convert a value to the type of its field: text is parsed as YAML unless the field is text.

    In a text field a leading ~/ is the user's home folder.

    Raises:
        UserError: it has a wrong type or is out of range.
    """
    # An empty path, such as from an unset shell variable, would be the current folder.
    if value == "" or (value in ("[]", []) and kind != list[str]):
        raise UserError(f"{key} is empty; give at least one value or leave the option out")
    try:
        return _converted(value, kind)
    except (ValueError, OverflowError):
        raise UserError(f"{key} is {shown(value)}; expected {expected(kind)}") from None


def _converted(value: Any, kind: Any) -> Any:
    """`value_of` without the message. Raises ValueError, OverflowError."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        for one in sorted(inner, key=lambda one: one is not NoneType):
            with suppress(ValueError, OverflowError):
                return _converted(value, one)
    elif (kind is str and isinstance(value, str)) or (origin is Literal and value in inner):
        return os.path.expanduser(value) if str(value).startswith("~/") else value
    elif isinstance(value, str) and kind is not str and origin is not Literal:
        if origin in (list, tuple) and inner[0] is not str:
            parsed: Any = SEPARATED.findall(value)  # `0 5`, `0,5`, or `[0, 5]`
        else:
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


def expected(kind: Any) -> str:  # noqa: PLR0911 one return per kind of type
    """A type as text, for messages."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    numbers = {int: "a whole number", float: "a number"}
    if is_dataclass(kind):
        return f"a section with {', '.join(field.name for field in fields(kind))}"
    if origin is Annotated:
        return f"{numbers[inner[0]]} {inner[1].words}"
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        each = list(map(expected, inner))
        same = len(set(each)) == 1
        return f"a list of {len(each)}, each {each[0]}" if same else f"a list [{', '.join(each)}]"
    if origin is list:
        return f"a list, each {expected(inner[0])}"
    if kind in numbers:
        return f"{numbers[kind]} {POSITIVE.words}"
    words = {str: "text", bool: "true or false", NoneType: "null"}.get(kind) or list(map(expected, inner))
    return words if isinstance(words, str) else (", or " if ", " in words[0] else " or ").join(words)


def section_of(kind: Any) -> type | None:
    """The dataclass in the type of a field, or None."""
    kinds = (kind, *typing.get_args(kind))
    return next((one for one in kinds if isinstance(one, type) and is_dataclass(one)), None)


def leaf_keys(options_class: type) -> dict[str, Any]:
    """The type of every option by dotted key."""
    return {key: field.type for key, (field, _) in leaves(options_class).items()}


def leaves(options_class: type, prefix: str = "") -> dict[str, tuple[Field[Any], type]]:
    """Every option by dotted key: its field and the dataclass of this field."""
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
    """The error for an unknown key. It suggests the key for this word of another program, or else the key
    with the most similar whole name or last part."""
    key = key[:100]
    word = key.rpartition(".")[2].lower()
    near = [known for known in ELSEWHERE.get(word, "").split() if known in keys]
    near = near or [known for known in keys if known.startswith(f"{key}.")]
    named = {known.rpartition(".")[2]: known for known in keys} | {known: known for known in keys}
    near = near or [named[match] for match in difflib.get_close_matches(key, named, n=1)]
    near = near or [named[match] for match in difflib.get_close_matches(word, named, n=1)]
    hint = f"did you mean {near[0]!r}?" if near else "see --help for all keys"
    return UserError(f"{shown(what)} is unknown; {hint}")


def flattened(config: Mapping[str, Any], *, without: Collection[str] = ()) -> dict[str, Any]:
    """Fields of a nested recipe by dotted key, without the given fields and sections."""

    def walk(prefix: str, section: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in section.items():
            if f"{prefix}{name}" in without:
                continue
            if isinstance(value, Mapping):
                yield from walk(f"{prefix}{name}.", value)
            else:
                yield f"{prefix}{name}", value

    return dict(walk("", config))


def read_yaml(path: Path) -> Any:
    """Read a YAML file. Raises UserError as `load_yaml`, and OSError."""
    from dino_sparo.files import read_small  # not needed for --help

    try:
        text = read_small(path, MOST_TEXT).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid YAML: it is not UTF-8 text") from error
    return load_yaml(text, str(path))


def with_sections_read(values: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """The values, those that are a section as text, such as `{width: 64, depth: 3}`, as dictionaries."""
    found = dict(values)
    for key, value in values.items():
        if section_of(keys.get(key)) and isinstance(value, str) and value.startswith("{"):
            with suppress(UserError):  # the text is then refused with what was expected
                found[key] = load_yaml(value, key)
    return found


def load_yaml(text: str, name: str) -> Any:
    """Parse YAML text into plain values, lists, and mappings with unique keys.

    Numbers are decimal: `010`, `0x10`, `1_000`, `1:30` and dates stay text.

    Raises:
        UserError: it is not valid YAML, has aliases or tags, or is nested too deeply; the message begins with
            `name`.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader without aliases, tags, and surprising conversions."""

    yaml_implicit_resolvers = {  # noqa: RUF012 as in the base class
        first: [one for one in resolvers if one[0].rpartition(":")[2] in ("null", "bool", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        wrong = None
        if isinstance(event, yaml.AliasEvent):
            wrong = f"*{event.anchor} is an alias; write the value instead"
        elif getattr(event, "tag", None) not in (None, "!"):
            wrong = f"{event.tag!r} is a tag; remove it"
        elif self.depth == MOST_NESTED:
            wrong = f"more than {MOST_NESTED} nested sections or lists"
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
                break  # the base class raises an error that names the line
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
