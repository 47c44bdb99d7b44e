"""`--dry-run`: the plan agrees with the run, lists problems, and writes nothing."""

import re
from pathlib import Path

import pytest

from dino_sparo import terminal
from dino_sparo.__main__ import main
from dino_sparo.check import measure
from dino_sparo.training.setup import build_schedules
from tests.tiny import tiny_arguments, tiny_options, write_pictures


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setattr(measure, "MATRIX_SIDE", {"cpu": 32})
    monkeypatch.setattr(terminal, "LAST_COLUMN", 10**6)
    monkeypatch.setenv("COLUMNS", "100000")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Data and run folder of a complete run of one epoch, which tests must not change."""
    folder = tmp_path_factory.mktemp("trained")
    write_pictures(folder / "data", count=8, side=32, classes=2)
    assert main(["pretrain", *tiny_arguments(folder / "data", folder / "run", optim__epochs=1)]) == 0
    return folder / "data", folder / "run"


def plan(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str], str]:
    """Exit status, table rows by name, and the whole output."""
    capsys.readouterr()
    status = main(["pretrain", *arguments, "--dry-run"])
    out = capsys.readouterr().out
    return status, dict(re.findall(r"^(\w+) +(.+)$", out, re.MULTILINE)), out


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_plan_tells_what_the_run_would_be_and_writes_nothing(tmp_path, capsys):
    write_pictures(tmp_path / "data", count=20, side=32, classes=2)
    before = listing(tmp_path)
    given = tiny_arguments(tmp_path / "data", tmp_path / "runs" / "new", machine__batch_size_per_gpu=1)
    status, rows, out = plan([*given, "--nproc", "2"], capsys)  # one process tells it all
    assert status == 0 and "no problems found" in out
    assert rows["run"].endswith("would start")
    assert rows["images"].startswith("20 of ") and "2 classes" in rows["images"]
    assert rows["batch"] == "4 images: 2 x 1 x 2 micro-batches"
    assert rows["steps"] == "5 per epoch, 15 in total (3 epochs)"
    assert rows["recipe"].startswith("demo, changed: ") and "optim.epochs 4 -> 3" in rows["recipe"]
    assert "seed" not in rows["recipe"]
    assert listing(tmp_path) == before


def test_a_value_after_a_flag_belongs_to_the_flag(tmp_path):
    write_pictures(tmp_path / "data", count=8, side=32, classes=2)
    given = tiny_arguments(tmp_path / "data", tmp_path / "run", optim__epochs=1)
    assert main(["pretrain", *given, "--machine.tf32", "--dry-run", "true"]) == 0
    assert not (tmp_path / "run").exists()
    assert main(["--quiet", "pretrain", *given, "--machine.tf32", "--dry-run", "false"]) == 0
    assert (tmp_path / "run").exists()
    drawn = [str(tmp_path / "run"), f"--data.path={tmp_path / 'data'}", "--num_workers=0"]
    assert main(["slots", "--quiet", "maps", *drawn]) == 0


def test_schedules_at_a_few_points(tmp_path, capsys):
    write_pictures(tmp_path / "data", count=20, side=32, classes=2)
    options = tiny_options(tmp_path / "data", tmp_path / "run")
    schedules = build_schedules(options.optim, options.loss, 5)
    _, _, out = plan(tiny_arguments(tmp_path / "data", tmp_path / "run"), capsys)
    for name, step in {"start": 0, "1/4": 3, "warm-up's end": 5, "1/2": 7, "3/4": 11, "end": 14}.items():
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        at = schedules.at(step)
        told = line.removeprefix(name).split()
        assert int(told[0]) == step
        assert [float(x) for x in told[1:5]] == pytest.approx(
            [at.lr, at.weight_decay, at.momentum, at.teacher_temp], rel=1e-3
        )
        assert told[5] == ("fixed" if at.freeze_last_layer else "learns")


def test_existing_run_is_complete_goes_on_or_is_another(trained, tmp_path, capsys):
    data, run = trained
    before = listing(run)
    assert "is complete" in plan(["--run_dir", str(run)], capsys)[1]["run"]
    status, _, out = plan(["--run_dir", str(run), "--optim.epochs=2"], capsys)
    assert status == 1 and "PROBLEM: run_dir" in out and "optim.epochs was 1, is now 2" in out
    assert listing(run) == before
    assert main(["pretrain", *tiny_arguments(data, tmp_path / "run")]) == 0
    (tmp_path / "run" / "checkpoints" / "step_000000006.pt").unlink()  # as if it had been stopped
    assert "would resume after step 4 of 6" in plan(["--run_dir", str(tmp_path / "run")], capsys)[1]["run"]


def test_full_disk_is_told(tmp_path, capsys, monkeypatch):
    write_pictures(tmp_path / "data", count=8, side=32, classes=2)
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("dino_sparo.check.plan.shutil.disk_usage", lambda folder: usage)
    status, _, out = plan(tiny_arguments(tmp_path / "data", tmp_path / "run"), capsys)
    assert status == 1 and re.search(r"PROBLEM: run_dir .* checkpoints need .* are free", out)


@pytest.mark.parametrize(
    ("command", "world_size", "says"),
    [
        ("knn RUN --data.path x --dry-run", 1, "--dry-run is for pretrain, check, study, not for knn"),
        ("pretrain --config demo --run_dir x --nproc 7 --dry-run", 1, "not divisible"),
        ("pretrain --config demo --run_dir x --dry-run", 2, "torchrun has started several"),
        ("pretrain --config demo --run_dir x --nproc 2", 2, "under torchrun would start processes twice"),
        ("pretrain --config demo --run_dir x --machine.batch_size_per_gpu 3 --dry-run", 1, "not divide"),
        ("check --config demo", 2, "check runs in one process"),
    ],
)
def test_mistakes(capsys, monkeypatch, command, world_size, says):
    for name, value in {"WORLD_SIZE": world_size, "RANK": 0, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("dino_sparo.__main__.end_at_once", lambda status: None)  # not with these tests
    monkeypatch.setattr("dino_sparo.parallel.launch.launch", lambda *_: 0)
    assert main(command.split()) == 2
    assert says in capsys.readouterr().err


def test_a_study_lists_its_runs(tmp_path, capsys):
    arguments = tiny_arguments(Path("shapes"), tmp_path / "study", monitor__knn_every_epochs=1)
    assert (
        main(["study", *arguments, "--evaluate=false", "--vary", "model.readout.num_slots=2,4", "--dry-run"])
        == 0
    )
    out = capsys.readouterr().out
    assert out.count("would start") == 2 and "num_slots=4: would start" in out and "2 runs of demo" in out
    assert not (tmp_path / "study").exists()


def test_starting_weights_are_looked_at(trained, tmp_path, capsys):
    data, run = trained
    given = tiny_arguments(data, tmp_path / "new", init=run)
    status, rows, _ = plan(given, capsys)
    assert status == 0 and "million parameters copied" in rows["weights"]
    given = tiny_arguments(data, tmp_path / "new", init=run, model__arch__width=32)
    status, rows, out = plan(given, capsys)
    assert status == 1 and rows["weights"].endswith("refused")
    assert "PROBLEM: init " in out and "has width 16 (the recipe has 32)" in out
    assert not (tmp_path / "new").exists()


def test_the_plan_fits_a_narrow_terminal(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    data, _ = trained
    _, _, out = plan(tiny_arguments(data, tmp_path / "new"), capsys)
    long = [line for line in out.splitlines() if len(line) > 79 and str(tmp_path) not in line]
    assert not long
