"""The command line as a user meets it: exit status, one line on a mistake, what lies in the run folder."""

import os
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from dino_sparo.__main__ import given_of, main
from dino_sparo.cli.commands import COMMANDS
from dino_sparo.cli.evaluating import KnnOptions
from dino_sparo.cli.parsing import options_of
from dino_sparo.recipe.typed import flattened
from tests.running import finished
from tests.tiny import parse_options, tiny_arguments, write_pictures


@pytest.fixture
def data(tmp_path) -> Path:
    write_pictures(tmp_path / "data", count=8, side=32, classes=2)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A finished run, for tests that leave it as it is: data and run folder."""
    folder = tmp_path_factory.mktemp("trained")
    write_pictures(folder / "data", count=8, side=32, classes=2)
    assert main(["pretrain", *one_epoch(folder / "data", folder / "run")]) == 0
    return folder / "data", folder / "run"


def one_epoch(data: Path, run_dir: Path, **changes: object) -> list[str]:
    return tiny_arguments(data, run_dir, **({"optim__epochs": 1} | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that the user got wrong."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dino-sparo: error: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


def test_unknown_command(capsys):
    assert f"unknown command 'train'; expected one of {', '.join(COMMANDS)}" in mistake(["train"], capsys)
    assert "unknown command 'slots map'; expected one of slots maps, slots g" in mistake(
        ["slots", "map"], capsys
    )


def test_a_file_that_the_system_refuses_is_one_sentence(trained, capsys):
    data, run_dir = trained
    (data / "file").touch()
    message = mistake(
        ["slots", "health", str(run_dir), "--data.path", str(data), "--out", str(data / "file")], capsys
    )
    assert f"{data / 'file' / 'health'} cannot be read or written (Not a directory); " in message


# --- Mistakes in pretrain


@pytest.mark.long
def test_mistake_through_a_process_is_one_line_and_writes_nothing(tmp_path, data):
    """All that the program prints, logging too: pytest's own logging would hide it in this process."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    arguments = one_epoch(data, tmp_path / "run", monitor__knn_every_epochs=1)
    done = finished([sys.executable, "-m", "dino_sparo", "pretrain", *arguments])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "is not a run folder" in done.stderr
    assert contents(tmp_path / "run") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize(
    ("path", "changes", "expected"),
    [
        ("missing", {}, "does not exist; give an existing folder"),
        ("data", {"monitor__knn_every_epochs": 1, "monitor__knn_path": "~nobody7/x"}, "does not exist"),
        ("data", {"optim__global_batch_size": 9}, "smaller batch, at most --optim.global_batch_size 8"),
        ("data", {"data__max_images": 3}, "gives 3 images, fewer than one batch"),
        ("data", {"monitor__knn_every_epochs": 1, "monitor__knn_path": "no"}, "'no' does not exist"),
    ],
)
def test_mistake_is_one_line_and_writes_nothing(tmp_path, data, capsys, path, changes, expected):
    line = mistake(["pretrain", *one_epoch(tmp_path / path, tmp_path / "run", **changes)], capsys)
    assert expected in line
    assert not (tmp_path / "run").exists()


# --- A run and what becomes of it


def test_second_start_says_that_the_run_is_complete(trained, monkeypatch, caplog):
    data, run = trained
    before = contents(run)
    caplog.set_level("INFO", logger="dino_sparo")
    assert main(["pretrain", *one_epoch(data, run)]) == 0
    assert main(["--quiet", "pretrain", "--run_dir", str(run)]) == 0  # the recipe is the run's own
    monkeypatch.setenv("HOME", str(run.parent))
    assert main(["--quiet", "pretrain", f"--run_dir=~/{run.name}"]) == 0  # which bash passes as it is
    assert caplog.text.count(f"{run} is complete, after 1 epoch\n") == 1  # not if it is quiet
    assert contents(run) == before


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("optim.lr_per_256", "0.006", "0.012"),
        ("views.global_scale", "[0.4, 1.0]", "[0.5, 1.0]"),
        ("model.arch.width", "16", "32"),
    ],
)
def test_changed_experiment_is_refused(trained, capsys, key, before, now):
    data, run = trained
    files = contents(run)
    line = mistake(["pretrain", "--run_dir", str(run), "--data.path", str(data), f"--{key}", now], capsys)
    assert f"({key} was {before}, is now {now})" in line and "choose another run_dir" in line
    assert contents(run) == files


@pytest.mark.parametrize(
    "change",
    [
        *("machine.prefetch_batches=7", "log.log_every_steps=7", "monitor.knn_every_epochs=7"),
        "data.on_bad_image=substitute",
    ],
)
def test_what_is_not_the_experiment_may_change(trained, change):
    assert main(["pretrain", "--run_dir", str(trained[1]), f"--{change}"]) == 0


def test_images_may_move_but_not_change(trained, tmp_path, capsys):
    _, run = trained
    write_pictures(tmp_path / "moved", count=8, side=32, classes=2)
    assert main(["pretrain", "--run_dir", str(run), "--data.path", str(tmp_path / "moved")]) == 0
    one = next((tmp_path / "moved").rglob("*.png"))
    one.rename(one.with_name("other.png"))
    files = contents(run)
    line = mistake(["pretrain", "--run_dir", str(run), "--data.path", str(tmp_path / "moved")], capsys)
    assert "data.path" in line and "not the same as these" in line
    assert contents(run) == files


# --- knn


def test_knn_prints_accuracy_and_number_of_images(trained, capsys):
    data, run = trained
    assert main(["knn", str(run), "--data.path", str(data), "--k", "[1, 3]", "--num_workers", "0"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "7 train and 1 test images, 2 classes" in out[0]
    assert "1 of the 2 train classes has no image here" in out[1]
    assert [line.split()[:2] for line in out[2:4]] == [["1-NN", "top-1"], ["3-NN", "top-1"]]


def test_knn_of_a_run_takes_its_own_images_and_says_so(trained, capsys, caplog):
    caplog.set_level("INFO", logger="dino_sparo")
    data, run = trained
    assert main(["knn", str(run), "--k", "1", "--num_workers", "0"]) == 0
    assert f"images: those of the run, {data}; use --data.path for others" in caplog.text
    assert "7 train and 1 test images" in capsys.readouterr().out


def test_a_mistyped_run_is_told_with_the_nearest(trained, tmp_path, capsys):
    data, run = trained
    near = f"{run}s", f"(did you mean {str(run)!r}?)"
    assert f"there is no run {near[0]!r} {near[1]}" in mistake(["knn", near[0]], capsys)
    assert f"{tmp_path} is not a run folder, so its" in mistake(["knn", str(tmp_path)], capsys)
    assert f"does not exist {near[1]}" in mistake(["knn", near[0], "--data.path", str(data)], capsys)
    assert f"{near[0]} contains no run to resume {near[1]}" in mistake(
        ["pretrain", "--run_dir", near[0]], capsys
    )


ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.skipif(not (ROOT / ".venv").is_dir(), reason="needs the environment that scripts/test.sh makes")
def test_demo_script_hands_its_options_on(tmp_path):
    """From another folder, with a relative path, in the environment that is already there."""
    done = finished(["bash", str(ROOT / "scripts" / "demo.sh"), "--data.path", "nowhere"], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("dino-sparo: error: data.path 'nowhere' does not exist")


# --- Arguments as people write them


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["--num-workers", "3", "--cache=a-b"], {"num_workers": 3, "cache": "a-b"}),
        (["--untrained"], {"untrained": True}),
        (["--untrained", "--k", "7"], {"untrained": True, "k": 7}),
        (["--untrained", "false"], {"untrained": False}),
        (["--untrained=no", "--device", "cpu"], {"untrained": False, "device": "cpu"}),
        (["--test", "a=x", "b=y", "--k=7"], {"test": ["a=x", "b=y"], "k": 7}),
        (["--test=a=x", "--test", "b=y"], {"test": ["a=x", "b=y"]}),
        (['--test=["a=x"]', "--test", "b=y"], {"test": ["a=x", "b=y"]}),
        (["--test", "a=x,y"], {"test": ["a=x,y"]}),
        ([], {"test": [], "untrained": False}),
    ],
)
def test_dashes_flags_and_several_values(given, taken):
    options = parse_options(KnnOptions, ["--run", "r", "--data.path", "d", *given])
    assert {key: getattr(options, key) for key in taken} == taken


@pytest.mark.parametrize("form", ["{} {}", "{},{}", "={},{}", "={} {}", "[{},{}]", "[{}, {}]"])
@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("knn", "k", [10, 20]),
        ("linear", "learning_rates", [1e-3, 0.03]),
        ("slots maps", "slots", [0, 5]),
        ("slots maps", "data.value_range", (-1000.0, 4e2)),
        ("check", "gpu", ["h100", "a100"]),
        ("pretrain", "views.global_scale", (0.4, 1.0)),
    ],
)
def test_a_list_is_written_with_spaces_commas_or_brackets(name, key, values, form):
    """As a shell without quotes gives it; what stands for RUN is no value of a list of numbers."""
    command, run = COMMANDS[name], ["runs/one"] if name not in ("check", "study", "pretrain") else []
    recipe = [] if run else ["--config", "photos_sparo", "--run_dir", "x"]
    words = f"--{key}{' ' * (form[0] != '=')}{form.format(*values)}".split(" ")
    options = options_of(command.options, given_of(name, [*recipe, "--data.path", "d", *words, *run]))
    assert flattened(as_dict(options))[key] == values
    assert not run or options.run == run[0]


def as_dict(options: object) -> dict[str, object]:
    return {
        field.name: as_dict(value) if is_dataclass(value := getattr(options, field.name)) else value
        for field in fields(options)
    }


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_waiting_threads_leave_their_core_to_others_unless_the_user_says_otherwise(monkeypatch, own):
    monkeypatch.setenv("OMP_WAIT_POLICY", own or "")
    if own is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main(["--version"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == (own or "PASSIVE")
