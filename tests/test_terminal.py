"""What a terminal gets and a file does not; what `--quiet` leaves."""

import json
import logging
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dino_sparo import load_encoder, terminal
from dino_sparo.__main__ import main
from dino_sparo.errors import UserError
from dino_sparo.evaluation.compare import Comparison
from dino_sparo.evaluation.knn import table as knn_table
from dino_sparo.slots.drawing import draw_grid
from tests.test_results import result as made_result
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


@pytest.mark.long
def test_file_gets_plain_lines(arguments):
    status, shown = pretrain(*arguments, on_terminal=False)
    assert status == 0
    assert "\r" not in shown and "\033" not in shown
    (line,) = [line for line in shown.splitlines() if "epoch 1/1 step 6/6 " in line]
    assert all(word in line for word in ("loss ", " images/s", "left: epoch 0:00:0", ", run 0:00:0"))
    assert re.search(
        r"after epoch 1: 20-NN top-1 [\d.]+ % ± \d+\.\d, top-5 [\d.]+ %, \d+ test images \(at most ", shown
    )


@pytest.mark.long
def test_quiet_run_shows_nothing_on_a_terminal_and_logs_all(arguments, tmp_path):
    assert pretrain(*arguments, "--quiet", on_terminal=True) == (0, "")
    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert "quiet" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


@pytest.mark.long
def test_terminal_gets_a_bar(arguments):
    status, shown = pretrain(*arguments, on_terminal=True)
    assert status == 0 and "\r" in shown and "epoch 1/1:" in shown
    assert shown.startswith("dino-sparo pretrain ...")
    assert "dino-sparo knn" in shown and "dino-sparo slots report" in shown


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


HOSTILE = "\x1b[2J\rdino-sparo: error: fake\nnext\u202eleft\u200b\x9b\udcff"
ESCAPED = r"\x1b[2J\rdino-sparo: error: fake\nnext\u202eleft\u200b\x9b\udcff"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a \u00e9 \u4e2d | $x$", "a \u00e9 \u4e2d | $x$"),
        (HOSTILE, ESCAPED),
        ("k" * 10_000_000, "k" * 200 + "..."),
        ("\x1b" * 300, r"\x1b" * 200 + "..."),
        (None, "None"),
    ],
    ids=range(5),
)
def test_foreign_text_is_escaped_and_short(text, seen):
    assert terminal.shown(text) == seen


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_a_log_line_is_one_line_whatever_is_put_into_it(level):
    values = (HOSTILE, Path(HOSTILE), UserError(HOSTILE), [HOSTILE], 7, 0.5)
    record = logging.LogRecord("x", level, "", 0, "ours\n%s %s %s %s %d %.2f", values, None)
    listed = repr([HOSTILE])
    assert terminal.Lines("%(message)s").format(record) == f"ours\n{' '.join([ESCAPED] * 3)} {listed} 7 0.50"
    plain = logging.LogRecord("x", level, "", 0, f"a\n{HOSTILE[:5]}", (), None)
    assert terminal.Lines("%(message)s").format(plain) == "a\n" + r"\x1b[2J\r"


def test_tables_and_errors_show_foreign_text_escaped(capsys, tmp_path):
    assert ESCAPED in terminal.markdown_table(("name",), [(HOSTILE,)])
    assert terminal.error_line(UserError(HOSTILE)) == f"dino-sparo: error: {ESCAPED}"
    name = HOSTILE.replace("\udcff", "")
    assert main(["pretrain", "--config", name, "--data.path", "x", "--run_dir", str(tmp_path)]) == 2
    assert main(["pretrain", "--config", "demo", "--data.path", name, f"--run_dir={tmp_path}"]) == 2
    assert main(["knn", name, "--data.path", "x"]) == 2
    assert main(["pretrain", f"--{name}"]) == 2
    told = capsys.readouterr()
    lines = told.err.splitlines()
    assert all(one.isprintable() for one in lines) and len(lines) == 4
    assert all(line.startswith("dino-sparo: error: ") and len(line) < 5000 for line in lines)


def test_results_of_hostile_names(tmp_path, capsys):
    details = {"num_train": 1, "top1_by_class": {HOSTILE: 1.0}, "remark": HOSTILE}
    one = made_result([True], name=HOSTILE, test_set=HOSTILE, weights=HOSTILE, details=details)
    compared = Comparison([HOSTILE], [[HOSTILE]], [HOSTILE])
    for text in (knn_table(HOSTILE, [one]), compared.text(), compared.markdown()):
        assert ESCAPED in text and all(line.isprintable() for line in text.split("\n"))


def test_weights_of_hostile_names(tmp_path):
    path = tmp_path / "x.pth"
    cut = HOSTILE.replace("\udcff", "")
    for state in ({cut: 1}, {"k" * 1_500_000: 1}, {"cls_token": 1, cut: 2, "a" * 1_000_000: 3}):
        torch.save(state, path)
        with pytest.raises(UserError, match=r"x\.pth contains") as caught:
            load_encoder(path)
        assert len(str(caught.value)) < 1000 and str(caught.value).isprintable()


def test_titles_of_pictures_are_no_formulas(tmp_path):
    pictures = [[np.zeros((4, 4, 3))]]
    titles = [[f"{HOSTILE} $\\frac$ $x"]]
    draw_grid(pictures, titles, tmp_path / "x.png", heading="$\\nothing{$" + "k" * 1_000_000)
    assert (tmp_path / "x.png").stat().st_size > 100
