"""What `--help` shows: the overview of all commands, and the page of one. Needs no torch."""

import re
import textwrap
import typing
from argparse import SUPPRESS, Action
from collections.abc import Collection, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from dino_sparo.cli.commands import COMMANDS, GROUPS
from dino_sparo.config import Page, recipes
from dino_sparo.errors import EXIT_STATUSES
from dino_sparo.terminal import table, width_of_terminal

PROGRAM_OPTIONS = {  # of every command; they are no part of an experiment
    "--quiet": "Show warnings, errors and results only: no progress.",
    "--dry-run": "pretrain and sweep: print the plan, train and write nothing.",
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


class PageFormatter(DefaultHelpFormatter):
    """The page of one command: options by section, each with its values in a word and its default."""

    from_recipe: Collection[str] = ()
    """Keys that a recipe gives."""

    def __init__(self, prog: str) -> None:
        super().__init__(
            prog, max_help_position=34 if width_of_terminal() > 100 else 26, width=width_of_terminal()
        )

    def _format_usage(self, usage: str | None, *args: object, **kwargs: object) -> str:
        filled = textwrap.fill(
            re.sub(r"\[[^\]]*\]", lambda part: part[0].replace(" ", "\0"), f"usage: {usage}"),
            self._width,
            subsequent_indent=" " * 11,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return filled.replace("\0", " ") + "\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text  # the description is in lines already

    def _format_action_invocation(self, action: Action) -> str:
        if action.dest == "help":
            return ", ".join(action.option_strings)
        values = "RECIPE" if action.dest == "config" else values_in_a_word(getattr(action, "_typehint", None))
        return f"{action.option_strings[0]} {values}".rstrip()

    def _get_help_string(self, action: Action) -> str:
        text = (action.help or "").replace("%", "%%")
        if action.required:
            return f"{text} ({'from the recipe' if action.dest in self.from_recipe else 'required'})"
        if action.default in (None, SUPPRESS) or not hasattr(action, "_typehint"):
            return text
        default = str(action.default).lower() if isinstance(action.default, bool) else action.default
        return text if default == [] else f"{text} (default: {str(default).replace('%', '%%')})"


def page_of(name: str) -> Page:
    """What makes the page of `--help` of a command from its parser."""

    def prepare(parser: ArgumentParser, keys: Mapping[str, object], required: Collection[str]) -> None:
        parser.description = description(name)
        prepare_page(parser, keys, required)

    return prepare


def prepare_page(parser: ArgumentParser, keys: Mapping[str, object], required: Collection[str]) -> None:
    """Headings by section, and options that can be given alone; what is not required a recipe gives."""

    class OfCommand(PageFormatter):
        from_recipe = keys.keys() - required

    parser.formatter_class = OfCommand
    for action in parser._actions:  # a section cannot be given as a whole, so --help does not list it
        if any(key.startswith(f"{action.dest}.") for key in keys) and action.dest not in keys:
            action.help = SUPPRESS
        elif action.dest == "print_config":
            action.help = "Print all options, as YAML, and end."
        elif action.dest == "help":
            action.help = "Show this and end."
    of_all: list[Action] = []
    for group in parser._action_groups:
        group._group_actions = [shown for action in group._group_actions for shown in _with_fields(action)]
        sections = {key.rpartition(".")[0] for key in (a.dest for a in group._group_actions) if key in keys}
        if "" in sections or not sections:  # one list of what is in no section
            of_all += group._group_actions
            group._group_actions = []
        else:
            title = f"{min(sections, key=len)}, {str(group.title)[0].lower()}{str(group.title)[1:]}"
            group.title = textwrap.fill(title, width_of_terminal() - 1)
    parser._optionals._group_actions = of_all


def _with_fields(action: Action) -> list[Action]:
    """An option of a page; for a section that may also be null or a name its fields follow."""
    if action.dest.endswith(".help"):
        return []
    shown = [action]
    for kind in filter(is_dataclass, typing.get_args(getattr(action, "_typehint", None))):
        fields_only = ArgumentParser()
        fields_only.add_class_arguments(typing.cast(type, kind), action.dest)
        shown += [field for field in fields_only._actions if field.dest.startswith(f"{action.dest}.")]
    for field in shown[1:]:
        field.required = False  # for only one of the two is given
    return shown


def values_in_a_word(kind: typing.Any) -> str:
    """What an option of this type takes: N a whole number, X a number, TEXT, or a choice."""
    words = {int: "N", float: "X", str: "TEXT", bool: "[true|false]", type(None): "null"}
    if kind in words:
        return words[kind]
    inner = typing.get_args(kind)
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
