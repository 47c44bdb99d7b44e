"""The command line: `dino-sparo COMMAND …`, also `python -m dino_sparo COMMAND …`."""

import importlib
import importlib.metadata
import logging
import os
import platform
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dino_sparo import __version__
from dino_sparo.cli.commands import COMMANDS, DISTRIBUTED, POSITIONAL, Command
from dino_sparo.cli.parsing import command_line, given_values, options_of, without_flags
from dino_sparo.errors import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    StoppedError,
    StuckError,
    UserError,
    files_told,
)
from dino_sparo.parallel.processes import end_at_once, end_with_launcher, first_to_fail, leave_note
from dino_sparo.terminal import coloured, set_up_log

RANK = int(os.environ.get("RANK", "0"))  # as torchrun sets it
GOING_ON = (
    "pretrain",
    "sweep",
    "study",
    "demo",
    "prepare",
    "shard",
    "knn",
    "linear",
)  # after an interruption


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status, one of EXIT_STATUSES."""
    try:
        with safe_path():
            status = answer(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        readers = select.poll()
        readers.register(sys.stdout.fileno(), 0)
        if not readers.poll(0):
            raise
        # Who read has had enough, as `head`; Python would flush at its end again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@contextmanager
def safe_path() -> Iterator[None]:
    """Within it, processes that are started import nothing from the working directory."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def answer(arguments: list[str] | None) -> int:
    """What `main` does, for a standard output that is read to its end."""
    arguments, flags = without_flags(list(sys.argv[1:] if arguments is None else arguments))
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or "--version" in arguments or arguments[0] in ("-h", "--help"):
        print(version() if "--version" in arguments else _overview())
        return 0
    if "RANK" in os.environ:
        end_with_launcher()
    try:
        name, rest = command_and_rest(arguments)
        with files_told():
            status = run_command(name, rest, flags)
        if RANK == 0:
            leave_note("done", status == 0)
        return status
    except UserError as error:
        report(error)
        return leave(EXIT_USER_ERROR, at_once=isinstance(error, StuckError))
    except StoppedError as stopped:
        if RANK == 0:
            print(f"dino-sparo: {stopped}; the same command goes on from there", file=sys.stderr)
            leave_note("stopped", str(stopped))
        return leave(EXIT_STOPPED, at_once=True)
    except KeyboardInterrupt:
        hint = "; the same command goes on where it stopped" if arguments[0] in GOING_ON else ""
        if RANK == 0:
            print(f"dino-sparo: interrupted{hint}", file=sys.stderr)
        return leave(EXIT_INTERRUPTED)
    except Exception:
        if speaks_for_all():
            raise
        return leave(EXIT_USER_ERROR)  # what this process saw was only the end of another one


def _overview() -> str:
    from dino_sparo.cli.helptext import overview  # needs what only pages of help need

    return overview()


def version() -> str:
    """One line for reports of defects; nothing is imported for it."""
    return (
        f"dino-sparo {__version__} (torch {importlib.metadata.version('torch')}, "
        f"Python {platform.python_version()})"
    )


def report(error: UserError) -> None:
    """Show what ends the run; of torchrun's processes one does."""
    if "torch" in sys.modules:
        from dino_sparo.parallel import distributed

        distributed.report(error)
    elif speaks_for_all():
        print(coloured(f"dino-sparo: error: {error}", "red"), file=sys.stderr)


def speaks_for_all() -> bool:
    """Whether this process shows the traceback of what ends the run."""
    if "torch" in sys.modules:
        from dino_sparo.parallel import distributed

        return distributed.speaks_for_all()
    return first_to_fail()


def leave(status: int, *, at_once: bool = False) -> int:
    """The exit status; a process that would wait for others, of the run or its own, ends here.

    An open connection may not let one of several processes go, nor a data worker whose disk hangs.
    """
    if "RANK" in os.environ or at_once:
        end_at_once(status)
    return status


def command_and_rest(arguments: list[str]) -> tuple[str, list[str]]:
    """The command, one word or two of them (`slots maps`), and what follows it."""
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    return " ".join(arguments[:words]), arguments[words:]


def run_command(name: str, arguments: list[str], flags: set[str]) -> int:
    """Parse the command's options, then import it (and torch with it) and run it; returns the exit status."""
    command = find_command(name, arguments)
    if command is None:
        return 0
    if {"-h", "--help"} & set(arguments):
        from dino_sparo.cli.helptext import page  # needs what only pages of help need

        print(page(name), end="")
        return 0
    given = given_values(arguments, command.options, usage=command.usage, positional=POSITIONAL.get(name))
    complete(name, given)
    options = options_of(command.options, given)
    set_up_log(logging.ERROR if RANK > 0 else logging.WARNING if "quiet" in flags else logging.INFO)
    if "dry_run" in flags or command.function == command.plan:
        only_one_process("--dry-run" if "dry_run" in flags else name)
        if command.plan is None:
            planned = ", ".join(each for each, command in COMMANDS.items() if command.plan)
            raise UserError(f"--dry-run is for {planned}, not for {name}; leave it out")
        return imported(command.plan)(options, given.get("config")) or 0
    if name not in DISTRIBUTED:
        only_one_process(name)
    num_processes = getattr(options, "nproc", 1)
    if num_processes > 1 and name != "check":  # which only tells what so many processes would do
        if name not in DISTRIBUTED:
            raise UserError(f"--nproc is {num_processes}, but {name} runs in one process; leave it out")
        if "RANK" in os.environ:
            raise UserError(
                f"--nproc {num_processes} under torchrun would start processes twice; leave it out"
            )
        from dino_sparo.parallel.launch import launch

        quiet = ["--quiet"] if "quiet" in flags else []
        return launch(num_processes, [*name.split(), *command_line(given | {"nproc": 1}), *quiet])
    return imported(command.function)(options) or 0


def complete(name: str, given: dict[str, Any]) -> None:
    """Fill in what a command can tell by itself: the recipe of an existing run, and what the demo is of."""
    if name == "pretrain" and "config" not in given and "run_dir" in given:
        stored = Path(given["run_dir"]) / "config.yaml"
        if stored.is_file():
            given["config"] = str(stored)
    elif name == "demo":
        data = Path(given["data.path"]).resolve().name if "data.path" in given else ""
        given.setdefault("config", "demo")
        given.setdefault("run_dir", f"runs/demo-{data}" if data else "runs/demo")


def find_command(name: str, arguments: list[str]) -> Command | None:
    """The command of this name; None if it is the first word of several, which have been listed.

    Raises:
        UserError: there is none.
    """
    if name in COMMANDS:
        return COMMANDS[name]
    group = [other for other in COMMANDS if other.startswith(f"{name} ")]
    if group and (not arguments or arguments[0] in ("-h", "--help")):
        from dino_sparo.cli.helptext import overview_of

        print(overview_of(group))
        return None
    name = " ".join([name, *arguments[:1]]) if group else name
    raise UserError(f"unknown command {name!r}; expected one of {', '.join(group or COMMANDS)}")


def only_one_process(what: str) -> None:
    """Refuse to run in several processes that torchrun has started.

    Raises:
        UserError: it has.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{what} runs in one process, torchrun has started several; start it without torchrun"
        )


def imported(place: str) -> Callable[..., int | None]:
    """The function at `module:name`."""
    module, function = place.split(":")
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    sys.exit(main())
