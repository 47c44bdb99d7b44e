"""The command line: `dino-sparo COMMAND …`, also `python -m dino_sparo COMMAND …`."""

import importlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

from dino_sparo import options as opt
from dino_sparo.config import parse_options, recipes
from dino_sparo.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One program: its options, where its function lives, and how it is called."""

    options: type
    function: str
    usage: str
    summary: str


COMMANDS = {
    "pretrain": Command(
        opt.PretrainOptions,
        "dino_sparo.training.pretrain:pretrain",
        "dino-sparo pretrain --config RECIPE --data.path DIR --run_dir DIR [--section.key VALUE ...]",
        "pretrain an encoder, or go on with an existing run",
    ),
    "knn": Command(
        opt.KnnOptions,
        "dino_sparo.evaluation.knn:run",
        "dino-sparo knn RUN --data.path DIR [--key VALUE ...]",
        "k-NN accuracy of a trained encoder",
    ),
    "demo": Command(
        opt.PretrainOptions,
        "dino_sparo.demo:demo",
        "dino-sparo demo [--data.path DIR] [--section.key VALUE ...]",
        "five minutes on a laptop: train, watch k-NN rise, look at slots",
    ),
    "bench": Command(
        opt.BenchOptions,
        "dino_sparo.bench:bench",
        "dino-sparo bench [--key VALUE ...]",
        "time and memory of SPARO against its direct form and a ViT block",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 2 the user's mistake, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    try:
        run_command(arguments[0], arguments[1:])
    except UserError as error:
        print(f"dino-sparo: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        goes_on = arguments[0] in ("pretrain", "demo")
        hint = "; the same command goes on from the last checkpoint" if goes_on else ""
        print(f"dino-sparo: interrupted{hint}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def overview() -> str:
    """The help text of the program as a whole."""
    commands = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
    return (
        f"usage: dino-sparo COMMAND [--config RECIPE] [--section.key VALUE ...]\n\n"
        f"commands (each with --help):\n{commands}\n\nshipped recipes: {', '.join(recipes())}"
    )


def run_command(name: str, arguments: list[str]) -> None:
    """Parse the command's options, then import it (and torch with it) and run it."""
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; expected one of {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    options = parse_options(command.options, complete(name, arguments), usage=command.usage)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    module, function = command.function.split(":")
    getattr(importlib.import_module(module), function)(options)


def complete(name: str, arguments: list[str]) -> list[str]:
    """Fill in what a command can tell by itself: the recipe of an existing run, the demo's, knn's RUN."""
    given = {argument.split("=")[0] for argument in arguments}
    if given & {"-h", "--help"}:
        return ["--help"]
    if name == "knn" and arguments and not arguments[0].startswith("-"):
        return ["--run", *arguments]
    if name == "pretrain" and "--config" not in given and "--run_dir" in given:
        stored = Path(_value(arguments, "--run_dir")) / "config.yaml"
        return ["--config", str(stored), *arguments] if stored.is_file() else arguments
    if name == "demo":
        config = [] if "--config" in given else ["--config", "demo"]
        data = Path(_value(arguments, "--data.path")).resolve().name if "--data.path" in given else ""
        run_dir = [] if "--run_dir" in given else ["--run_dir", f"runs/demo-{data}" if data else "runs/demo"]
        return [*config, *run_dir, *arguments]
    return arguments


def _value(arguments: list[str], option: str) -> str:
    """The value of an option given as `--option value` or `--option=value`; empty if it has none."""
    for position, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
        if argument == option and position + 1 < len(arguments):
            return arguments[position + 1]
    return ""


if __name__ == "__main__":
    sys.exit(main())
