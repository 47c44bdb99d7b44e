"""Help and version: quick, whole, and as wide as the terminal."""

import resource
import shlex
import subprocess
import sys

import pytest

import dino_sparo
from dino_sparo.__main__ import command_and_rest, given_of, main
from dino_sparo.cli.commands import COMMANDS
from dino_sparo.cli.helptext import TITLES
from dino_sparo.cli.parsing import options_of, with_recipe
from dino_sparo.errors import EXIT_STATUSES
from dino_sparo.recipe.files import recipes
from dino_sparo.runs.rundir import start_run_dir
from tests.running import finished
from tests.tiny import tiny_options

WITHOUT_TORCH = """
import sys
from dino_sparo.__main__ import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules and "torchvision" not in sys.modules
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--help"], 0, "shipped recipes:\n  demo "),
        (["pretrain", "--help"], 0, "--optim.global_batch_size"),
        (["pretrain", "--config", "demo", "--optim.epoch", "3"], 2, "did you mean 'optim.epochs'?"),
        (["knn", "RUN", "--data.path", "nowhere"], 2, "data.path 'nowhere' does not exist"),
    ],
)
def test_help_and_mistakes_answer_in_under_a_second_without_torch(arguments, status, expected):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = finished([sys.executable, "-c", WITHOUT_TORCH, *arguments])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == status, done.stderr
    assert expected in done.stdout + done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # the machine may be busy


@pytest.mark.parametrize("arguments", [[], ["-h"], ["help"]])
def test_overview_names_commands_recipes_statuses_and_where_to_read_on(arguments, capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in [*COMMANDS, *recipes()])
    assert all(f"\n{title}:\n" in shown for title in TITLES.values())
    assert all(f"\n  {status:<5}{meaning[:30]}" in shown for status, meaning in EXIT_STATUSES.items())
    assert "--dry-run" in shown and "--quiet" in shown and "README.md" in shown


@pytest.mark.parametrize("columns", [72, 120])
def test_help_fits_the_terminal_and_examples_can_be_copied(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in ([], *(name.split() for name in COMMANDS)):
        main([*arguments, "--help"])
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) < columns
        examples = shown.partition("examples:\n")[2].partition("\n\n")[0]
        lines = [shlex.split(line, comments=True) for line in examples.replace("\\\n", "").splitlines()]
        assert any(lines) and all(words[0] == "dino-sparo" for words in lines if words)


def test_a_key_is_required_only_with_its_section(capsys):
    main(["slots", "report", "--help"])
    assert "required if data is given" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("example", [*(line for command in COMMANDS.values() for line in command.examples)])
def test_examples_of_help_parse(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "photos"
    run.mkdir(parents=True)
    start_run_dir(run, tiny_options(tmp_path, run), {})
    name, arguments = command_and_rest(shlex.split(example, comments=True))
    assert options_of(COMMANDS[name].options, with_recipe(name, given_of(name, arguments)))


@pytest.mark.parametrize(
    ("arguments", "shown", "not_shown"),
    [
        (["pretrain", "--config", "imagenet_vits16_sparo"], ["now: 100)", "required)"], ["from the recipe"]),
        (["pretrain", "--config=photos_sparo", "--seed", "17"], ["now: 17)"], []),
        (["pretrain"], ["from the recipe"], ["now: "]),
        (["knn"], ["usage: dino-sparo knn RUN [--key", "default: that of the run"], []),
        (["slots", "report"], ["text; required"], []),
        (["demo"], ["now: runs/demo)", "now: shapes)"], ["required", "from the recipe"]),
    ],
)
def test_help_shows_the_values_of_a_recipe_and_what_is_required(arguments, shown, not_shown, capsys):
    assert main([*arguments, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(one in text for one in shown) and not any(one in text for one in not_shown)


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["--version"], f"dino-sparo {dino_sparo.__version__} (torch "),
        (["help", "knn"], "usage: dino-sparo knn RUN"),
        (["--help", "#", "of", "all"], "usage: dino-sparo COMMAND"),  # a comment in an interactive zsh
        (["slots"], "usage: dino-sparo slots COMMAND"),
    ],
)
def test_help_and_version_wherever_they_stand(arguments, beginning, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(beginning)


def test_who_has_read_enough_sees_no_traceback():
    program = subprocess.Popen(
        [sys.executable, "-m", "dino_sparo", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert program.stdout is not None and program.stderr is not None
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() == 0
