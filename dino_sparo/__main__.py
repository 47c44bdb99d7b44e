"""The command line: `dino-sparo COMMAND …`, also `python -m dino_sparo COMMAND …`."""

import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from dino_sparo.commands import COMMANDS, DISTRIBUTED, POSITIONAL, POSITIONALS
from dino_sparo.config import parse_options, recipes
from dino_sparo.errors import EXIT_STOPPED, EXIT_USER_ERROR, StoppedError, StuckError, UserError
from dino_sparo.processes import end_at_once, end_with_launcher, leave_note

EXIT_INTERRUPTED = 130
RANK = int(os.environ.get("RANK", "0"))  # as torchrun sets it


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0 done, 1 `check` has found a problem, 2 the user's mistake, 75 told to stop by a signal and all is saved
    (the same command goes on), 130 interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if "RANK" in os.environ:
        end_with_launcher()
    try:
        name, rest = command_and_rest(arguments)
        status = run_command(name, rest)
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
        goes_on = arguments[0] in ("pretrain", "sweep", "demo", "prepare", "shard", "knn", "linear")
        hint = "; the same command goes on where it stopped" if goes_on else ""
        if RANK == 0:
            print(f"dino-sparo: interrupted{hint}", file=sys.stderr)
        return leave(EXIT_INTERRUPTED)
    except Exception:
        if speaks_for_all():
            raise
        return leave(EXIT_USER_ERROR)  # what this process saw was only the end of another one


def overview(names: Sequence[str] = tuple(COMMANDS)) -> str:
    """The help text of the program as a whole, or of some of its commands."""
    width = max(map(len, names)) + 2
    commands = "\n".join(f"  {name:<{width}}{COMMANDS[name].summary}" for name in names)
    return (
        f"usage: dino-sparo COMMAND [--config RECIPE] [--section.key VALUE ...]\n\n"
        f"commands (each with --help):\n{commands}\n\nshipped recipes: {', '.join(recipes())}"
    )


def report(error: UserError) -> None:
    """Show what ends the run; of torchrun's processes one does."""
    if "torch" in sys.modules:
        from dino_sparo import distributed

        distributed.report(error)
    elif speaks_for_all():
        print(f"dino-sparo: error: {error}", file=sys.stderr)


def speaks_for_all() -> bool:
    """Whether this process shows the traceback of what ends the run."""
    if "torch" in sys.modules:
        from dino_sparo import distributed

        return distributed.speaks_for_all()
    if RANK > 0:
        time.sleep(3)  # the launcher ends all as soon as one ends, and the first must have spoken
    return RANK == 0


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


def run_command(name: str, arguments: list[str]) -> int:
    """Parse the command's options, then import it (and torch with it) and run it; returns the exit status."""
    if name not in COMMANDS:
        group = [other for other in COMMANDS if other.startswith(f"{name} ")]
        if group and (not arguments or arguments[0] in ("-h", "--help")):
            print(overview(group))
            return 0
        name = " ".join([name, *arguments[:1]]) if group else name
        raise UserError(f"unknown command {name!r}; expected one of {', '.join(group or COMMANDS)}")
    command = COMMANDS[name]
    arguments = written_out(command.options, arguments)
    options = parse_options(command.options, complete(name, arguments), usage=command.usage)
    if name not in DISTRIBUTED and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"{name} runs in one process, torchrun has started several; start it without torchrun"
        )
    num_processes = getattr(options, "nproc", 1)
    if num_processes > 1 and name != "check":  # which only tells what so many processes would do
        if name not in DISTRIBUTED:
            raise UserError(f"--nproc is {num_processes}, but {name} runs in one process; leave it out")
        if "RANK" in os.environ:
            raise UserError(
                f"--nproc {num_processes} under torchrun would start processes twice; leave it out"
            )
        from dino_sparo.launch import launch

        return launch(num_processes, [name, *_without(arguments, "--nproc"), "--nproc=1"])
    level = logging.INFO if RANK == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    module, function = command.function.split(":")
    return getattr(importlib.import_module(module), function)(options) or 0


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
        stored = Path(_value(arguments, "--run_dir")) / "config.yaml"
        return ["--config", str(stored), *arguments] if stored.is_file() else arguments
    if name == "demo":
        config = [] if "--config" in given else ["--config", "demo"]
        data = Path(_value(arguments, "--data.path")).resolve().name if "--data.path" in given else ""
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


def _value(arguments: list[str], option: str) -> str:
    """The value of an option given as `--option value` or `--option=value`; empty if it has none."""
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
        if argument == option and position + 1 < len(arguments):
            return arguments[position + 1]
    return ""


def _without(arguments: list[str], option: str) -> list[str]:
    """The arguments without an option and its value."""
    kept, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == option:
            rest.pop(0)
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept


if __name__ == "__main__":
    sys.exit(main())
