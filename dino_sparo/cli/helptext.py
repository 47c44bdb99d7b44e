"""What `--help` shows: the overview of all commands, and the page of one. Needs no torch."""

import argparse
import dataclasses
import re
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path

import docstring_parser

from dino_sparo.cli.commands import COMMANDS, GROUPS
from dino_sparo.cli.parsing import NOT_IN_RECIPES
from dino_sparo.errors import EXIT_STATUSES
from dino_sparo.recipe.files import recipes
from dino_sparo.recipe.sections import Recipe
from dino_sparo.recipe.typed import leaf_keys, leaves
from dino_sparo.terminal import table, width_of_terminal

PROGRAM_OPTIONS = {  # of every command; they are no part of an experiment
    "--quiet": "Show warnings, errors and results only: no progress.",
    "--dry-run": "pretrain, check and study: print the plan, train and write nothing.",
    "--help": "Show this and end; before or after the command.",
    "--version": "Show the version and end.",
}
EXAMPLES = {
    "pretrain, here on a few thousand photographs": (
        "dino-sparo pretrain --config photos_sparo --data.path photos --run_dir runs/photos"
    ),
    "k-NN evaluation": "dino-sparo knn runs/photos --data.path photos",
    "the linear probe": "dino-sparo linear runs/photos --data.path photos",
    "see and use the slots": "dino-sparo slots report runs/photos --data.path photos",
    "what a run would be, before it starts": (
        "dino-sparo pretrain --config photos_sparo --data.path photos --run_dir runs/photos --dry-run"
    ),
    "all of it in five minutes, on generated pictures": "dino-sparo demo",
}
READ_ON = (
    "Recipes are YAML files; --section.key VALUE behind one changes it, and - and _ in names of options "
    "mean the same. All options of a command: dino-sparo COMMAND --help. A guide is README.md; protocols and "
    "measured numbers are in eval/, both in the source of the project."
)


def overview() -> str:
    """The help text of the program as a whole."""
    width = width_of_terminal()
    parts = ["usage: dino-sparo COMMAND [--config RECIPE] [--section.key VALUE ...]"]
    name_width = max(map(len, COMMANDS)) + 2
    parts += [f"{title}:\n{_commands(names, name_width)}" for title, names in GROUPS.items()]
    parts.append("for every command:\n" + table(PROGRAM_OPTIONS, name_width))
    shown = "\n".join(f"  # {what}\n{copyable(line, width)}" for what, line in EXAMPLES.items())
    parts.append(f"examples:\n{shown}")
    summaries = {name: summary_of_recipe(path) for name, path in recipes().items()}
    parts.append("shipped recipes:\n" + table(summaries, max(map(len, summaries)) + 2))
    statuses = {str(status): meaning for status, meaning in EXIT_STATUSES.items()}
    parts.append("exit status:\n" + table(statuses, 5))
    parts.append(textwrap.fill(READ_ON, width, break_on_hyphens=False))
    return "\n\n".join(parts)


def overview_of(group: Sequence[str]) -> str:
    """The help text of commands of two words whose first is the same."""
    first = group[0].split()[0]
    commands = _commands(group, max(map(len, group)) + 2)
    return (
        f"usage: dino-sparo {first} COMMAND RUN [--key VALUE ...]\n\ncommands (each with --help):\n{commands}"
    )


def description(name: str) -> str:
    """What the page of a command says before its options: what it is for, and examples."""
    command, width = COMMANDS[name], width_of_terminal()
    text = (
        command.summary
        if command.summary.startswith("k-NN")
        else f"{command.summary[0].upper()}{command.summary[1:]}"
    )
    lines = []
    for example in command.examples:
        line, _, comment = example.partition("  # ")
        lines += [f"  # {comment}"] if comment else []
        lines.append(copyable(f"dino-sparo {line}", width))
    return f"{textwrap.fill(text.rstrip('.') + '.', width)}\n\nexamples:\n" + "\n".join(lines)


def copyable(line: str, width: int) -> str:
    """A command line, indented, over several lines of a shell if it is wider than so many columns."""
    together = re.sub(r"(--\S+) (?=[^-\s])", r"\1\0", line)  # an option and its value
    lines = textwrap.wrap(
        together, width - 4, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return " \\\n".join(f"  {part}" for part in lines).replace("\0", " ")


def summary_of_recipe(path: Path) -> str:
    """The first sentence of the comment that a recipe opens with."""
    comment = []
    for line in path.read_text().splitlines():
        if not line.startswith("#") or line.startswith("# Source:"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).split(". ")[0].rstrip(".")


def page(name: str) -> str:
    """The page of `--help` of a command: what it is for, examples, and its options by section."""
    command, width = COMMANDS[name], width_of_terminal()
    parser = argparse.ArgumentParser(
        add_help=False,
        usage=_usage(command.usage, width),
        description=description(name),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=34 if width > 100 else 26, width=width
        ),
    )
    of_run = issubclass(command.options, Recipe)
    groups = {"": parser.add_argument_group("options")}
    groups[""].add_argument("--help", action="store_true", help="Show this and end.")
    keys = leaf_keys(command.options)
    if "config" not in keys:  # it is an option of a command that only looks at a recipe
        what = (
            "Recipe: a YAML file or the name of a shipped one." if of_run else "YAML file of these options."
        )
        groups[""].add_argument("--config", metavar="RECIPE" if of_run else "FILE", help=what)
    titles = section_titles(command.options)
    for key, field, owner in leaves(command.options):
        section = next(
            (one for one in sorted(titles, key=len, reverse=True) if key.startswith(f"{one}.")), ""
        )
        if section not in groups:
            groups[section] = parser.add_argument_group(
                textwrap.fill(f"{section}, {titles[section]}", width - 1)
            )
        text = docstrings(owner)[field.name]
        groups[section].add_argument(
            f"--{key}", metavar=values_in_a_word(field.type), help=_with_default(text, key, field, of_run)
        )
    return parser.format_help()


def _with_default(text: str, key: str, field: dataclasses.Field[typing.Any], of_run: bool) -> str:
    """A text of help with the default, or where the value comes from; as argparse takes it."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if key.startswith("model.arch."):  # only one of the two is given
        told = ""
    elif default is dataclasses.MISSING:
        told = " (from the recipe)" if of_run and key not in NOT_IN_RECIPES else " (required)"
    else:
        shown = str(default).lower() if isinstance(default, bool) else default
        told = "" if default in (None, []) else f" (default: {shown})"
    return f"{' '.join(text.split())}{told}".replace("%", "%%")


def section_titles(options_class: type) -> dict[str, str]:
    """What each section of options is, by its name; sections within sections belong to the outer one."""
    return {
        field.name: docstrings(options_class)[field.name].rstrip(".")
        for field in dataclasses.fields(options_class)
        if dataclasses.is_dataclass(field.type)
    }


def docstrings(options_class: type) -> dict[str, str]:
    """The text under every field of a dataclass, and of those that it extends."""
    parameters = docstring_parser.parse_from_object(options_class).params
    texts = {one.arg_name: one.description or "" for one in parameters}
    for base in options_class.__bases__:
        texts = (docstrings(base) if dataclasses.is_dataclass(base) else {}) | texts
    return texts


def _usage(usage: str, width: int) -> str:
    """The usage line, broken between options only."""
    whole = re.sub(r"\[[^\]]*\]", lambda part: part[0].replace(" ", "\0"), usage)
    return textwrap.fill(
        whole, width - 8, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False
    ).replace("\0", " ")


def values_in_a_word(kind: typing.Any) -> str:
    """What an option of this type takes: N a whole number, X a number, TEXT, or a choice."""
    words = {int: "N", float: "X", str: "TEXT", bool: "[true|false]", type(None): "null"}
    if kind in words:
        return words[kind]
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Annotated:
        return words[inner[0]]
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, inner))
    if typing.get_origin(kind) is tuple:
        return f"[{','.join(map(values_in_a_word, inner))}]"
    if typing.get_origin(kind) is list:
        return (
            f"{values_in_a_word(inner[0])} ..." if inner[0] is str else f"[{values_in_a_word(inner[0])},...]"
        )
    return "|".join(values_in_a_word(one) for one in inner if not is_dataclass(one))


def _commands(names: Sequence[str], width: int) -> str:
    return table({name: COMMANDS[name].summary for name in names}, width)
