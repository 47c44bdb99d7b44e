"""What `--help` shows: the overview of all commands, and the page of one. Needs no torch."""

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import docstring_parser

from dino_sparo.cli.commands import COMMANDS, Command, usage
from dino_sparo.cli.parsing import NOT_IN_RECIPES
from dino_sparo.errors import EXIT_STATUSES
from dino_sparo.recipe.files import checked_keys, find_recipe, merged, recipes
from dino_sparo.recipe.typed import expected, leaf_keys, leaves, read_yaml, section_of
from dino_sparo.terminal import table, width_of_terminal

TITLES = {  # above the first command of each group
    **{"demo": "train", "knn": "evaluate", "slots maps": "slots", "prepare": "data"},
    **{"export": "weights", "bench": "measure"},
}
PROGRAM_OPTIONS = {  # of every command; they are no part of an experiment
    "--quiet": "Print only warnings, errors, and results.",
    "--dry-run": "For pretrain, check, and study: print the plan; train and write nothing.",
    "--help": "Print this help, or that of the command, and exit.",
    "--version": "Print the version and exit.",
}
EXAMPLES = [COMMANDS[name].examples[0] for name in ("pretrain", "knn", "linear", "slots report", "demo")]
READ_ON = (
    "A recipe is a YAML file; --section.key VALUE changes a value of it. A list is written as 1 2 or 1,2. In "
    "names of options, - and _ mean the same. All options of a command: dino-sparo COMMAND --help. "
    "README.md, in the source of the project, lists all guides."
)


def overview(names: Sequence[str]) -> str:
    """The help text of the program as a whole, or of those of its commands whose first word is the same."""
    width = max(map(len, names)) + 2
    lines = []
    for name in names:
        lines += [f"\n{TITLES[name]}:"] if name in TITLES and len(names) == len(COMMANDS) else []
        lines.append(table({name: COMMANDS[name].summary}, width))
    commands = "\n".join(lines)
    if len(names) < len(COMMANDS):
        return f"usage: dino-sparo {names[0].split()[0]} COMMAND RUN [--key VALUE ...]\n\n{commands}"
    first = sorted(recipes().items(), key=lambda recipe: recipe[0] != "demo")
    summaries = {name: summary_of_recipe(path) for name, path in first}
    parts = [
        f"usage: dino-sparo COMMAND [--config RECIPE] [--section.key VALUE ...]\n{commands}",
        "for every command:\n" + table(PROGRAM_OPTIONS, width),
        "examples:\n" + copyable(EXAMPLES),
        "shipped recipes:\n" + table(summaries, max(map(len, summaries)) + 2),
        "exit status:\n" + table({str(status): text for status, text in EXIT_STATUSES.items()}, 5),
        textwrap.fill(READ_ON, width_of_terminal(), break_on_hyphens=False),
    ]
    return "\n\n".join(parts)


def copyable(examples: Sequence[str]) -> str:
    """Command lines, each below what it is for, over several lines of a shell if they are wider than it."""
    lines = []
    for example in examples:
        command, _, comment = example.partition("  # ")
        parts = textwrap.wrap(
            f"dino-sparo {command}",
            width_of_terminal() - 4,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [f"  # {comment}"] * bool(comment) + [" \\\n".join(f"  {part}" for part in parts)]
    return "\n".join(lines)


def summary_of_recipe(path: Path) -> str:
    """The first sentence of the comment that a recipe opens with."""
    comment = []
    for line in path.read_text().splitlines():
        if not line.startswith("#") or line.startswith("# Source:"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).split(". ")[0].rstrip(".")


def page(name: str, given: Mapping[str, Any]) -> str:
    """The `--help` of a command: its purpose, examples, and its options by section, with the values that the
    recipe and the command line give."""
    command, width = COMMANDS[name], width_of_terminal()
    values = dict(given)
    if command.of_run and "config" in values:
        stored = read_yaml(find_recipe(values["config"]))
        values = merged(checked_keys(stored, leaf_keys(command.options), "key"), values)
    parser = argparse.ArgumentParser(
        add_help=False,
        usage=textwrap.fill(usage(name), width - 8, subsequent_indent="    ", break_on_hyphens=False),
        description=f"{textwrap.fill(command.summary, width)}\n\nexamples:\n{copyable(command.examples)}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34 if width > 100 else 26, width=width
        ),
    )
    groups = {"": parser.add_argument_group("options")}
    keys = leaves(command.options)
    if "config" not in keys:
        what = "recipe, a file or the name of a shipped one" if command.of_run else "file of these options"
        groups[""].add_argument("--config", metavar="FILE", help=f"YAML {what}.")
    for field in fields(command.options):
        if section := section_of(field.type):
            title = f"{field.name}: {' '.join((section.__doc__ or '').split()).rstrip('.')}"
            groups[field.name] = parser.add_argument_group(textwrap.fill(title, width - 1))
    for key, (field, owner) in keys.items():
        group = groups[key.partition(".")[0] if "." in key or key in groups else ""]
        text = f"{docstrings(owner)[field.name]} ({_values(key, field, command, values)})"
        group.add_argument(
            f"--{key}",
            nargs="?" if field.type is bool else None,  # a flag may stand alone
            metavar="VALUE",
            help=" ".join(text.split()).replace("%", "%%"),
        )
    return parser.format_help().rstrip("\n")


def _values(key: str, field: Field[Any], command: Command, values: Mapping[str, Any]) -> str:
    """The type of an option, and its current value, its default, or where the value comes from."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if key in values:
        told = f"now: {values[key] if isinstance(values[key], str) else json.dumps(values[key])}"
    elif default is MISSING:
        told = "not in this recipe" if "config" in values else "from the recipe"
        told = told if command.of_run and key not in NOT_IN_RECIPES else "required"
        told = "default: that of the run" if command.takes_from_run(key) else told
        section = next(one for one in fields(command.options) if one.name == key.partition(".")[0])
        if told == "required" and "." in key and section.default is None:
            told = f"required if {section.name} is given"
    else:
        told = f"default: {default if isinstance(default, str) else json.dumps(default)}"
    return f"{expected(field.type)}; {told}"


@cache
def docstrings(options_class: type) -> dict[str, str]:
    """The text under every field of a dataclass, and of those that it extends."""
    parameters = docstring_parser.parse_from_object(options_class).params
    texts = {one.arg_name: one.description or "" for one in parameters}
    for base in options_class.__bases__:
        texts = (docstrings(base) if is_dataclass(base) else {}) | texts
    return texts
