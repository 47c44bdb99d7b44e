"""What a terminal gets and a file does not; what `--quiet` leaves."""

import json
import logging
import os
import pty
import subprocess
import sys
import termios

import pytest
import yaml

from dino_sparo import terminal
from tests.tiny import tiny_arguments, write_pictures


def pretrain(*arguments: str, on_terminal: bool, **environment: str) -> tuple[int, str]:
    """Exit status, and all that a process writes to its standard error, a terminal or a pipe."""
    ours, theirs = pty.openpty() if on_terminal else os.pipe()
    if on_terminal:
        termios.tcsetwinsize(ours, (24, 100))
    command = [sys.executable, "-m", "dino_sparo", "pretrain", *arguments]
    without = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=theirs, env=without | {"TERM": "xterm"} | environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 10000)
        except OSError:  # how Linux says that nobody has the terminal any more
            part = b""
        if not part:
            break
        shown += part
    os.close(ours)
    return process.wait(), shown.decode()


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """A run of six steps."""
    write_pictures(tmp_path / "data", count=24, side=32, classes=2)
    changes = {"optim__epochs": 1, "monitor__knn_every_epochs": 1}
    return tiny_arguments(tmp_path / "data", tmp_path / "run", **changes)


def test_file_gets_plain_lines(arguments):
    status, shown = pretrain(*arguments, on_terminal=False)
    assert status == 0
    assert "\r" not in shown and "\033" not in shown
    assert "epoch 1/1 step 6/6  loss" in shown and "after epoch 1: knn20_top1" in shown


def test_quiet_run_shows_nothing_on_a_terminal_and_logs_all(arguments, tmp_path):
    assert pretrain(*arguments, "--quiet", on_terminal=True) == (0, "")
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert "quiet" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


@pytest.mark.long
def test_terminal_gets_a_bar(arguments):
    status, shown = pretrain(*arguments, on_terminal=True)
    assert status == 0 and "\r" in shown and "epoch 1/1:" in shown


@pytest.mark.long
def test_quiet_holds_for_all_processes(arguments):
    assert pretrain(*arguments, "--nproc", "2", "--quiet", on_terminal=False) == (0, "")


@pytest.mark.parametrize(
    ("on_terminal", "environment", "colored"),
    [(True, {}, True), (True, {"NO_COLOR": "1"}, False), (True, {"TERM": "dumb"}, False), (False, {}, False)],
)
def test_mistake_is_red_on_terminals_alone(on_terminal, environment, colored):
    status, shown = pretrain("--nothing", on_terminal=on_terminal, **environment)
    assert status == 2
    assert shown.startswith("\033[31mdino-sparo: error: " if colored else "dino-sparo: error: ")
    assert ("\033" in shown) == colored


def test_warnings_are_yellow_and_other_entries_plain(monkeypatch):
    monkeypatch.setattr(terminal.sys, "stderr", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = terminal.Lines("%(message)s")
    warning, entry = (
        logging.LogRecord("dino_sparo", level, "", 0, "text", None, None)
        for level in (logging.WARNING, logging.INFO)
    )
    assert lines.format(warning) == "\033[33mtext\033[0m" and lines.format(entry) == "text"


def test_a_markdown_table_is_aligned_and_text_cannot_add_columns():
    lines = terminal.markdown_table(("name", "x"), [("a|b c", "1"), ("d", "22")]).splitlines()
    assert lines == ["| name   | x   |", "| ------ | --- |", "| a\\|b c | 1   |", "| d      | 22  |"]
