"""A run folder whose files cannot be read: named, and set aside where the run can do without them."""

import json
import os
import shutil
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dino_sparo.__main__ import main
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.errors import EXIT_USER_ERROR
from dino_sparo.files import COMPILED, clean_lines, read_lines
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.runs.rundir import read_starts
from dino_sparo.runs.runlog import RunLog, each_metric, read_metrics
from tests.running import finished
from tests.tiny import state_hash, tiny_arguments, tiny_options, write_pictures

CHECKPOINT = "checkpoints/step_000000002.pt"
LINES = (b"\0\x80\xff" * 9, b"7", b"[]", b"{}", b'{"step": "x", "name": [1], "views": 0}', b"[" * 9999)
LINES += (b'{"step": NaN, "epoch": 1}', b'{"step": 1, "epoch": ' + b"9" * 400 + b"}")
LINES += (b'{"time": "", "command": [1], "versions": {}, "device": "", "precision": "", "processes": 1}',)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of three steps, and beside it one whose last checkpoint is gone."""
    folder = tmp_path_factory.mktemp("whole")
    write_pictures(folder / "data", 4)
    pretrain(tiny_options(folder / "data", folder / "run", log__keep_every_epochs=1))
    shutil.copytree(folder / "run", folder / "stopped")
    for path in (folder / "stopped" / "checkpoints").glob("*3.pt*"):
        path.unlink()
    return folder


@pytest.fixture
def stopped(whole, tmp_path) -> Path:
    shutil.copytree(whole / "stopped", tmp_path / "run")
    return tmp_path / "run"


def resume(whole: Path, run_dir: Path) -> int:
    return main(["pretrain", *tiny_arguments(whole / "data", run_dir, log__keep_every_epochs=1)])


def make_folder(path: Path) -> None:
    if path.is_file():
        path.unlink()
    path.mkdir()
    (path / "kept").touch()


def make_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("x")


def make_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def add_lines(path: Path) -> None:
    """Damaged lines before and after those that are there, and one that is not finished."""
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(b"\n".join(LINES) + b"\n" + before + b"\n".join(LINES) + b"\n" + b'{"step": 3, "ep')


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((f"{name}.jsonl", make_folder) for name in ("metrics", "starts", "bad_images", "bad_steps")),
        *((f"{name}.jsonl", add_lines) for name in ("metrics", "starts", "bad_images")),
        ("metrics.jsonl", make_pipe),
        ("stopped.json", make_folder),
        (".lock", make_folder),
        ("checkpoints/writing.tmp", make_folder),
        ("checkpoints/writing.tmp.sha256", make_folder),
        (CHECKPOINT, make_folder),
        (f"{CHECKPOINT}.sha256", make_folder),
        ("checkpoints/step_000000001.pt", make_folder),
        ("checkpoints/step_000000001.pt.sha256", make_folder),
        ("tensorboard", make_file),
    ],
)
def test_a_run_resumes_without_what_it_does_not_need(name, damage, whole, stopped, caplog):
    damage(stopped / name)
    assert resume(whole, stopped) == 0
    aside = stopped / f"{name}.damaged"
    assert aside.exists() and f"renamed to {aside.name}" in caplog.text
    assert aside.is_dir() == (damage is make_folder)
    assert state_hash(load_latest(stopped)) == state_hash(load_latest(whole / "run"))
    if not name.startswith("metrics") or damage is add_lines:  # good lines on both sides are there
        assert [entry["step"] for entry in read_metrics(stopped)] == [1, 2, 3]
    assert len(read_starts(stopped)) == (1 if name == "starts.jsonl" and damage is make_folder else 2)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("config.yaml", make_folder, "config.yaml is not a regular file"),
        ("config.yaml", lambda path: path.write_bytes(bytes(range(256))), "not UTF-8"),
        ("config.yaml", lambda path: path.write_text(path.read_text()[:300] + "\n['"), "not valid YAML"),
        ("config.yaml", lambda path: path.write_text(""), "config.yaml has no sections"),
        ("config.yaml", lambda path: path.write_text("- 1\n"), "config.yaml has no sections"),
        ("config.yaml", lambda path: path.write_text("1: 2\n"), "key '1' is unknown"),
        ("checkpoints", make_file, "checkpoints is not a folder"),
    ],
)
def test_a_run_is_refused_in_one_sentence_without_what_it_needs(name, damage, said, whole, stopped, capsys):
    damage(stopped / name)
    assert resume(whole, stopped) == 2
    told = capsys.readouterr().err
    assert told.count("error: ") == 1 and said in told and Path(name).name in told
    if name == "config.yaml" and "key" not in said:  # which names the images of evaluations
        assert main(["knn", str(stopped), "--device=cpu"]) == 2
        told = capsys.readouterr().err
        assert told.count("error: ") == 1 and said in told


def test_damage_in_a_file_of_tensorboard_does_not_hide_the_next_start(whole, stopped):
    (path,) = (stopped / "tensorboard").iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes(200) + data[400:])
    assert resume(whole, stopped) == 0
    events = EventAccumulator(str(stopped / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/loss")][-1] == 3


def test_what_was_set_aside_before_stays(whole, stopped):
    for number in (1, 2):
        (stopped / "stopped.json").mkdir()
        (stopped / "stopped.json" / str(number)).touch()
        assert resume(whole, stopped) == 0
    assert (stopped / "stopped.json.damaged" / "1").exists()
    assert (stopped / "stopped.json.damaged-2" / "2").exists()


def test_files_without_damage_are_left_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a":1}\n{"a" : 2}')
    clean_lines(path)
    assert path.read_text() == '{"a":1}\n{"a" : 2}' and [*tmp_path.iterdir()] == [path]


@pytest.mark.long
def test_logs_of_any_length_are_read_line_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    entry = {"step": 1, "epoch": 0.5} | {f"a number with a long name {number}": 0.25 for number in range(20)}
    path.write_text(f"{json.dumps(entry)}\n" * 8000 + "9" * 2**18)
    tracemalloc.start()
    try:
        assert sum(1 for _ in each_metric(tmp_path)) == 8000
        assert any(read_lines(path))
        with RunLog(tmp_path, first_step=1, steps_per_epoch=2, total_steps=2):
            pass
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 2
    finally:
        tracemalloc.stop()
    assert len(read_metrics(tmp_path)) == 8000


# --- Another user


@pytest.mark.long
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_another_user_cannot_train_in_a_run_folder_but_can_evaluate_it():
    with tempfile.TemporaryDirectory() as shared:
        folder, theirs = Path(shared), Path(shared) / "theirs"
        folder.chmod(0o755)
        write_pictures(folder / "data", 8, classes=2)
        pretrain(tiny_options(folder / "data", run := folder / "run"))
        theirs.mkdir()
        shutil.chown(theirs, 65534, 65534)
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}

        def as_another(*arguments: object) -> tuple[int, str]:
            command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
            own = dict.fromkeys(("DINO_SPARO_CACHE", "MPLCONFIGDIR", COMPILED), str(theirs))
            done = finished([*command, "-m", "dino_sparo", *map(str, arguments)], env=os.environ | own)
            return done.returncode, done.stderr

        if as_another("--version")[0] != 0:
            pytest.skip("another user cannot read this installation")
        status, said = as_another("pretrain", "--run_dir", run)
        assert status == EXIT_USER_ERROR and said.count("\n") == 1 and f"{run}/.lock" in said
        evaluated = ("knn", run, "--k", 1, "--num_workers", 0)
        status, said = as_another(*evaluated)
        assert status == EXIT_USER_ERROR and "another folder with --out" in said
        assert as_another(*evaluated, "--out", theirs)[0] == 0 and (theirs / "results.json").exists()
        shown = ("slots", "gallery", run, "--data.path", folder / "data", "--num_workers", 0)
        assert as_another(*shown, "--out", theirs)[0] == 0 and (theirs / "features").is_dir()
        assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
