"""Help and version: quick, whole, and as wide as the terminal."""

import resource
import shlex
import subprocess
import sys
from contextlib import suppress

import pytest

import dino_sparo
from dino_sparo.__main__ import command_and_rest, complete, main
from dino_sparo.cli.commands import COMMANDS, GROUPS, POSITIONAL
from dino_sparo.cli.helptext import EXAMPLES
from dino_sparo.cli.parsing import given_values, options_of, without_flags
from dino_sparo.errors import EXIT_STATUSES
from dino_sparo.recipe.files import recipes
from dino_sparo.runs.rundir import start_run_dir
from tests.tiny import tiny_options

WITHOUT_TORCH = """
import sys
from dino_sparo.__main__ import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
assert "torch" not in sys.modules and "torchvision" not in sys.modules
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--help"], 0, "shipped recipes:\n  demo "),
        (["pretrain", "--help"], 0, "--optim.global_batch_size"),
        (["pretrain", "--config", "demo", "--optim.epoch", "3"], 2, "did you mean 'optim.epochs'?"),
    ],
)
def test_help_and_mistakes_answer_in_under_a_second_without_torch(arguments, status, expected):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == status, done.stderr
    assert expected in done.stdout + done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # the machine may be busy


def test_overview_lists_commands_and_recipes(capsys):
    for arguments in ([], ["--help"], ["help"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown for name in COMMANDS)
        assert all(name in shown for name in recipes())


def test_overview_names_the_groups_the_statuses_and_where_to_read_on(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)
    assert all(f"\n{title}:\n" in shown for title in GROUPS)
    assert all(f"\n  {status:<5}{meaning[:30]}" in shown for status, meaning in EXIT_STATUSES.items())
    assert "--dry-run" in shown and "--quiet" in shown and "README.md" in shown
    assert "the control of imagenet_vits16_sparo" in " ".join(shown.split())


@pytest.mark.parametrize("columns", [72, 80, 120])
def test_help_fits_the_terminal_and_examples_can_be_copied(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in ([], *(name.split() for name in COMMANDS)):
        with suppress(SystemExit):
            main([*arguments, "--help"])
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) < columns
        examples = shown.partition("examples:\n")[2].partition("\n\n")[0]
        lines = [shlex.split(line, comments=True) for line in examples.replace("\\\n", "").splitlines()]
        assert any(lines) and all(words[0] == "dino-sparo" for words in lines if words)


def example_lines() -> list[list[str]]:
    lines = [f"dino-sparo {example}" for command in COMMANDS.values() for example in command.examples]
    return [shlex.split(line, comments=True)[1:] for line in [*lines, *EXAMPLES.values()]]


@pytest.mark.parametrize("arguments", example_lines(), ids=" ".join)
def test_examples_of_help_parse(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "photos"
    run.mkdir(parents=True)
    start_run_dir(run, tiny_options(tmp_path, run), {})
    name, rest = command_and_rest(without_flags(arguments)[0])
    command = COMMANDS[name]
    given = given_values(rest, command.options, usage=command.usage, positional=POSITIONAL.get(name))
    complete(name, given)
    assert options_of(command.options, given)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"dino-sparo {dino_sparo.__version__} (torch ")


def test_who_has_read_enough_sees_no_traceback():
    program = subprocess.Popen(
        [sys.executable, "-m", "dino_sparo", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert program.stdout is not None and program.stderr is not None
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["knn", "--version"], "dino-sparo 0"),
        (["help", "knn"], "usage: dino-sparo knn"),
        (["help"], "usage: dino-sparo COMMAND"),
    ],
)
def test_help_and_version_wherever_they_stand(arguments, beginning, capsys):
    with suppress(SystemExit):
        assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(beginning)
