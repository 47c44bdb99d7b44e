"""Arguments as people write them, to arguments as the parser takes them. Needs no torch."""

import json
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from dino_sparo.cli.commands import POSITIONAL, POSITIONALS
from dino_sparo.config import FLAGS


def without_flags(arguments: list[str]) -> tuple[list[str], set[str]]:
    """The arguments without the flags of the program, and those: `quiet`, `dry_run`.

    They hold for every command and are no part of an experiment.
    """
    flags = {argument: argument.removeprefix("--").replace("-", "_") for argument in arguments}
    given = {argument: flag for argument, flag in flags.items() if argument[:2] == "--" and flag in FLAGS}
    return [argument for argument in arguments if argument not in given], set(given.values())


def complete(name: str, arguments: list[str]) -> list[str]:
    """Fill in what a command can tell by itself: the recipe of an existing run, the demo's, knn's RUN."""
    given = {argument.split("=")[0] for argument in arguments}
    if given & {"-h", "--help"}:
        return ["--help"]
    unnamed = [argument for argument in arguments if not argument.startswith("-")]
    if name in POSITIONALS and unnamed:
        named = [argument for argument in arguments if argument.startswith("-")]
        return [f"{POSITIONALS[name]}={json.dumps(unnamed)}", *named]
    if name in POSITIONAL and unnamed:
        at = arguments.index(unnamed[0])
        return [*arguments[:at], f"{POSITIONAL[name]}={unnamed[0]}", *arguments[at + 1 :]]
    if name == "pretrain" and "--config" not in given and "--run_dir" in given:
        stored = Path(value_of(arguments, "--run_dir")) / "config.yaml"
        return ["--config", str(stored), *arguments] if stored.is_file() else arguments
    if name == "demo":
        config = [] if "--config" in given else ["--config", "demo"]
        data = Path(value_of(arguments, "--data.path")).resolve().name if "--data.path" in given else ""
        run_dir = [] if "--run_dir" in given else ["--run_dir", f"runs/demo-{data}" if data else "runs/demo"]
        return [*config, *run_dir, *arguments]
    return arguments


def written_out(options: type, arguments: list[str]) -> list[str]:
    """Arguments as the parser takes them: `--train-fraction V` as `--train_fraction=V`, a flag alone as true,
    and all values of an option for several texts, `--test A=x B=y`, as one list."""
    kinds = {"--config": str, **dict(_kinds("", options))}
    written: list[str] = []
    lists: dict[str, list[str]] = {}
    rest = list(arguments)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if not option.startswith("--"):
            written.append(option + equals + value)
            continue
        option = option.replace("-", "_").replace("__", "--", 1)
        is_flag = kinds.get(option) is bool
        if is_flag and not equals and (not rest or rest[0].lower() not in ("true", "false", "yes", "no")):
            equals, value = "=", "true"
        elif kinds.get(option) == list[str] and not value.startswith("["):
            values = lists.setdefault(option, [])
            values += [value] if equals else []
            while rest and not rest[0].startswith("-"):
                values.append(rest.pop(0))
            continue
        elif option in kinds and not equals and rest and not rest[0].startswith("--"):
            equals, value = "=", rest.pop(0)
        written.append(option + equals + value)
    return [*written, *(f"{option}={json.dumps(values)}" for option, values in lists.items())]


def _kinds(prefix: str, options: type) -> Iterator[tuple[str, Any]]:
    """Types of all options by `--section.key`."""
    for field, kind in get_type_hints(options).items():
        if isinstance(kind, type) and is_dataclass(kind):
            yield from _kinds(f"{prefix}{field}.", kind)
        else:
            yield f"--{prefix}{field}", kind


def value_of(arguments: list[str], option: str) -> str:
    """The value of an option given as `--option value` or `--option=value`; empty if it has none."""
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
        if argument == option and position + 1 < len(arguments):
            return arguments[position + 1]
    return ""


def without(arguments: list[str], option: str) -> list[str]:
    """The arguments without an option and its value."""
    kept, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == option:
            rest.pop(0)
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept
