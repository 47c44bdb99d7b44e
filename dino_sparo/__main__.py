"""The command line: `dino-sparo COMMAND …`, also `python -m dino_sparo COMMAND …`."""

import importlib.metadata
import json
import logging
import os
import platform
import select
import sys
from contextlib import suppress
from typing import Any

from dino_sparo import __version__
from dino_sparo.cli.commands import COMMANDS, usage
from dino_sparo.cli.parsing import FLAGS, given_values, options_of, with_images, with_recipe
from dino_sparo.errors import (
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    StoppedError,
    StuckError,
    UserError,
    errors_for_user,
)
from dino_sparo.files import can_build_c
from dino_sparo.parallel.processes import (
    check_environment,
    end_at_once,
    end_with_launcher,
    env_int,
    leave_note,
    report,
    speaks_for_all,
)
from dino_sparo.recipe.typed import value_of
from dino_sparo.terminal import open_outputs, sentence, set_up_log

BEFORE = ("--quiet", "--dry-run", "--dry_run")  # flags that may stand before the command


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status, one of EXIT_STATUSES."""
    open_outputs()
    os.environ["PYTHONSAFEPATH"] = "1"  # child processes import nothing from the working directory
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # a thread of torch that waits leaves its core to others
    if not can_build_c():
        os.environ.setdefault("TORCH_DISABLE_NATIVE_JIT", "1")  # else torch fails within a step on a GPU
    try:
        status = answer(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        readers = select.poll()
        readers.register(sys.stdout.fileno(), 0)
        if not readers.poll(0):
            raise
        # The reader, such as `head`, is closed; Python would flush again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def answer(arguments: list[str]) -> int:
    """What `main` does, if standard output is not closed early."""
    if "#" in arguments:  # an interactive zsh passes the words of a comment
        arguments = arguments[: arguments.index("#")]
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    arguments = flags_last(arguments)
    if "--version" in arguments:
        torch = importlib.metadata.version("torch")
        print(f"dino-sparo {__version__} (torch {torch}, Python {platform.python_version()})")
        return 0
    end_with_launcher()
    try:
        with errors_for_user():
            status = run_command(arguments)
        if env_int("RANK") == 0:
            leave_note("done", status == 0)
        return status
    except UserError as error:
        report(error)
        return leave(EXIT_USER_ERROR, at_once=isinstance(error, StuckError))
    except StoppedError as stopped:
        if env_int("RANK") == 0:
            print(
                f"dino-sparo: {sentence(stopped)}; the same command resumes from there",
                file=sys.stderr,
            )
            leave_note("stopped", str(stopped))
        return leave(EXIT_STOPPED, at_once=True)
    except KeyboardInterrupt:
        if env_int("RANK") == 0:
            print("dino-sparo: interrupted; the same command resumes from what is on disk", file=sys.stderr)
        return leave(EXIT_INTERRUPTED)
    except Exception:
        if speaks_for_all():
            raise
        return leave(EXIT_USER_ERROR)  # this error was caused by the end of another process


def flags_last(arguments: list[str]) -> list[str]:
    """The command first: flags of the program may also stand before it, or between its two words."""
    rest, flags = list(arguments), []
    while rest and (rest[0] in BEFORE or (rest[0] not in COMMANDS and rest[1:2] and rest[1] in BEFORE)):
        flags.append(rest.pop(0 if rest[0] in BEFORE else 1))
    return [*rest, *flags]


def leave(status: int, *, at_once: bool = False) -> int:
    """Return the exit status; end at once if the process would wait for other processes or data workers.

    An open connection to other processes, or a data worker whose disk hangs, may block a normal exit.
    """
    if env_int("WORLD_SIZE", 1) > 1 or at_once:
        end_at_once(status)
    return status


def command_and_rest(arguments: list[str]) -> tuple[str, list[str]]:
    """The command of one or two words (`slots maps`), and the other arguments."""
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    return " ".join(arguments[:words]), arguments[words:]


def run_command(arguments: list[str]) -> int:
    """Show help, or parse the options of a command and run it, which imports torch."""
    asked = [one for one in arguments if one not in ("-h", "--help")]
    name, rest = command_and_rest(asked)
    group = [other for other in COMMANDS if other.startswith(f"{name} ".lstrip())]
    if name not in COMMANDS and (rest or not group):
        unknown = " ".join([name, *rest[:1]]) if group else name
        raise UserError(f"unknown command {unknown!r}; expected one of {', '.join(group or COMMANDS)}")
    if name not in COMMANDS or len(asked) < len(arguments):
        from dino_sparo.cli.helptext import overview, page  # imports what only help needs

        if name not in COMMANDS:
            print(overview(group))
            return 0
        given: dict[str, Any] = {}
        with suppress(UserError):
            given = given_of(name, rest)
        print(page(name, with_recipe(name, given)))
        return 0
    command = COMMANDS[name]
    check_environment()
    given = with_recipe(name, given_of(name, rest))
    quiet, dry_run = (value_of(flag, given.get(flag, False), bool) for flag in FLAGS)
    set_up_log(logging.ERROR if env_int("RANK") else logging.WARNING if quiet else logging.INFO)
    if sys.stderr.isatty():  # importing torch takes a while
        logging.getLogger("dino_sparo").info("dino-sparo %s ...", name)
    given = with_images(command.options, given)
    options = options_of(command.options, given)
    if dry_run or command.function == command.plan:
        only_one_process("--dry-run" if dry_run else name)
        if command.plan is None:
            planned = ", ".join(each for each, other in COMMANDS.items() if other.plan)
            raise UserError(f"--dry-run is for {planned}, not for {name}; leave it out")
        check_images(options)
        return command.plan(options, given.get("config"))
    if not command.distributed:
        only_one_process(name)
    num_processes = getattr(options, "nproc", 1)
    if num_processes > 1:
        if not command.distributed:
            raise UserError(f"--nproc is {num_processes}, but {name} runs in one process; leave it out")
        if env_int("WORLD_SIZE", 1) > 1:
            raise UserError(
                f"--nproc {num_processes} under torchrun would start processes twice; leave it out"
            )
    check_images(options)
    if num_processes > 1:
        from dino_sparo.parallel.launch import launch

        texts = {key: one if isinstance(one, str) else json.dumps(one) for key, one in given.items()}
        values = [f"--{key}={text}" for key, text in (texts | {"nproc": "1"}).items()]
        return launch(num_processes, [*name.split(), *values])
    return command.function(options) or 0


def given_of(name: str, arguments: list[str]) -> dict[str, Any]:
    """The values given to a command, by dotted key."""
    command = COMMANDS[name]
    return given_values(arguments, command.options, usage=usage(name), positional=command.positional)


def check_images(options: Any) -> None:
    """Raises UserError: `data.path` does not exist; said here, before torch is imported."""
    data = getattr(options, "data", None)
    if data is not None and env_int("WORLD_SIZE", 1) == 1:  # several processes agree on errors later
        from dino_sparo.data.sources import check_exists

        check_exists(data.path)


def only_one_process(what: str) -> None:
    """Raises UserError: torchrun has started several processes."""
    if env_int("WORLD_SIZE", 1) > 1:
        raise UserError(
            f"{what} runs in one process, but torchrun has started several; start it without torchrun"
        )


if __name__ == "__main__":
    sys.exit(main())
