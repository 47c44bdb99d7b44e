"""What a person reads in a terminal: progress bars and colors, which a file does not get, and tables."""

import io
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

LAST_COLUMN = 120  # longer lines are hard to read
ESCAPES = {"red": "31", "yellow": "33"}
MOST_SHOWN = 200  # characters of a name, a key or a value
MOST_OF_MESSAGE = 4000


def open_outputs() -> None:
    """Let standard streams be there that were closed, so that no other file gets their numbers, and let
    characters that an output does not have be escaped."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # the lowest number that is free is this one
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def shows_bars() -> bool:
    """Whether progress bars are drawn: on a terminal, by the process that speaks, and without `--quiet`."""
    return sys.stderr.isatty() and logging.getLogger("dino_sparo").level <= logging.INFO


def program(name: str) -> str:
    """How a shell here finds a program of this installation: by its name, or by its path."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not beside.exists() or (found and os.path.samefile(found, beside)):
        return name
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def colored(text: str, color: Literal["red", "yellow"]) -> str:
    """Text for standard error; plain where that is no terminal, or NO_COLOR (no-color.org) is set."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[{ESCAPES[color]}m{text}\033[0m"


def shown(text: object, most: int = MOST_SHOWN) -> str:
    """Text of files, folders and recipes for a person: at most so long, and nothing that moves the cursor,
    changes a color or begins a line: what cannot be printed is escaped, as the end of a line is (`\\n`)."""
    text = str(text)
    text = text if len(text) <= most else f"{text[:most]}..."
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def sentence(text: object) -> str:
    """A whole message, in which foreign text may stand, as `shown` shows it."""
    return shown(text, MOST_OF_MESSAGE)


def error_line(error: Exception) -> str:
    """What ends a program, for standard error."""
    return colored(f"dino-sparo: error: {sentence(error)}", "red")


class Lines(logging.Formatter):
    """Log entries, what is put into them escaped by `shown`, and warnings in color."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            texts = (str, Path, Exception, list, tuple)
            args = (sentence(one) if isinstance(one, texts) else one for one in record.args)
            record = logging.makeLogRecord({**vars(record), "args": tuple(args)})
        text = "\n".join(sentence(line) for line in super().format(record).split("\n"))
        return colored(text, "yellow") if record.levelno >= logging.WARNING else text


def set_up_log(level: int) -> None:
    """Send the log to standard error as lines; what is below the level, and bars with it, is not shown."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("dino_sparo").setLevel(level)


@contextmanager
def only_warnings() -> Iterator[None]:
    """Within it, what is below a warning is not shown, nor are bars: for work that has a line of its own."""
    logger = logging.getLogger("dino_sparo")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


def table(rows: Mapping[str, str], name_width: int, indent: str = "  ") -> str:
    """Two columns, the second over several lines if it must be."""
    return "\n".join(
        textwrap.fill(
            text,
            width_of_terminal(),
            initial_indent=f"{indent}{name:<{name_width}}",
            subsequent_indent=" " * (name_width + len(indent)),
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in rows.items()
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned, so that it reads well in a terminal too."""
    cells = [[shown(cell).replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def width_of_terminal() -> int:
    """Characters that a line may have."""
    return min(LAST_COLUMN, shutil.get_terminal_size().columns) - 1
