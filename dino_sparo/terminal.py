"""Output for a terminal: log lines, colors, progress bars, tables, and escaping of untrusted text."""

import io
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

log = logging.getLogger("dino_sparo")

LAST_COLUMN = 120  # longer lines are hard to read
ESCAPES = {"red": "31", "yellow": "33"}
MOST_SHOWN = 200  # characters of a name, a key or a value
MOST_OF_MESSAGE = 4000


class _Unfailing(io.FileIO):
    """A file that ignores what it cannot write."""

    def write(self, data: Any) -> int:
        written = None  # as `write` returns for a full pipe that does not wait
        with suppress(OSError):
            written = super().write(data)
        return len(data) if written is None else written


def open_outputs() -> None:
    """Prepare the standard streams.

    Closed ones are opened on /dev/null, since the next file would get their number. Characters that an
    encoding lacks are escaped. What standard error cannot write is dropped: a run does not end because its
    terminal or `tee` was closed, or because the disk of its log is full.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # os.open returns the lowest free number, which is this one
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    if sys.stderr is sys.__stderr__ and isinstance(sys.stderr, io.TextIOWrapper):
        buffer = io.BufferedWriter(_Unfailing(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(buffer, sys.stderr.encoding, line_buffering=True, write_through=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def shows_bars() -> bool:
    """Whether to draw progress bars: on a terminal or in a notebook, in the first process, and without
    `--quiet`."""
    visible = sys.stderr.isatty() or "ipykernel" in sys.modules
    return visible and log.level <= logging.INFO


def program(name: str) -> str:
    """The command for a program of this installation: its name if it is on the PATH, else its path."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not beside.exists() or (found and os.path.samefile(found, beside)):
        return name
    return str(beside.relative_to(Path.cwd()) if beside.is_relative_to(Path.cwd()) else beside)


def colored(text: str, color: Literal["red", "yellow"]) -> str:
    """Colored text for standard error; plain if it is not a terminal or NO_COLOR (no-color.org) is set."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[{ESCAPES[color]}m{text}\033[0m"


def shown(text: object, most: int = MOST_SHOWN) -> str:
    """Untrusted text, cut to `most` characters, with every unprintable one escaped (such as `\\n`)."""
    text = str(text)
    text = text if len(text) <= most else f"{text[:most]}..."
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def sentence(text: object) -> str:
    """A whole message that may contain untrusted text, escaped by `shown`."""
    return shown(text, MOST_OF_MESSAGE)


def counted(number: float, what: str, plural: str = "s") -> str:
    """A number, a fraction with four digits, with a noun in singular or plural."""
    written = f"{number:.4g}" if isinstance(number, float) and number % 1 else f"{int(number):,}"
    return f"{written} {what}{'' if number == 1 else plural}"


def few(names: Sequence[object], most: int = 3) -> str:
    """The first few names, escaped by `shown`, and `...` if there are more."""
    return ", ".join(map(shown, names[:most])) + (", ..." if len(names) > most else "")


def error_line(error: Exception) -> str:
    """The line on standard error with which a program ends."""
    return colored(f"dino-sparo: error: {sentence(error)}", "red")


class Lines(logging.Formatter):
    """Formats log records: arguments escaped by `shown`, warnings in color."""

    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):
            texts = (str, Path, Exception, list, tuple)
            args = (sentence(one) if isinstance(one, texts) else one for one in record.args)
            record = logging.makeLogRecord({**vars(record), "args": tuple(args)})
        text = "\n".join(sentence(line) for line in super().format(record).split("\n"))
        return colored(text, "yellow") if record.levelno >= logging.WARNING else text


def set_up_log(level: int) -> None:
    """Send log records of at least this level to standard error; above INFO there are no bars either."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines("%(message)s"))
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler])  # of other packages
    log.setLevel(level)


@contextmanager
def only_warnings() -> Iterator[None]:
    """Show only warnings, and no progress bars, inside the block."""
    level = log.level
    log.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        log.setLevel(level)


def table(rows: Mapping[str, str], name_width: int, indent: str = "  ") -> str:
    """Two columns of text; the second is wrapped to the width of the terminal."""
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


def aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal, whose columns are aligned."""
    lines = [[shown(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([aligned[0], "  ".join("-" * width for width in widths), *aligned[1:]])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [[shown(cell).replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [cells[0], ["-" * width for width in widths], *cells[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def width_of_terminal() -> int:
    """Largest length of a line in characters."""
    return min(LAST_COLUMN, shutil.get_terminal_size().columns) - 1
