"""What only a terminal gets: progress bars and colours; a file that gets standard error has plain lines."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

ESCAPES = {"red": "31", "yellow": "33"}


def shows_bars() -> bool:
    """Whether progress bars are drawn: on a terminal, by the process that speaks, and without `--quiet`."""
    return sys.stderr.isatty() and logging.getLogger("dino_sparo").level <= logging.INFO


def coloured(text: str, colour: Literal["red", "yellow"]) -> str:
    """Text for standard error; plain where that is no terminal, or NO_COLOR (no-color.org) is set."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[{ESCAPES[colour]}m{text}\033[0m"


class Lines(logging.Formatter):
    """Log entries as they are, warnings in colour."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return coloured(text, "yellow") if record.levelno >= logging.WARNING else text


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
