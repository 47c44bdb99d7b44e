"""A run that is interrupted and started again ends as if nothing had happened, bit for bit."""

import os
import random
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dino_sparo.cli.pretraining import pretrain
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.runs.runlog import read_metrics
from dino_sparo.training import pretrain as program
from tests.running import PowerCutError, in_new_process, logged, pretrain_until
from tests.tiny import state_hash, tiny_arguments, tiny_options, write_pictures

NUM_IMAGES, TOTAL_STEPS = 10, 6  # batch 4: two steps an epoch, two images dropped, three epochs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, NUM_IMAGES)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    pretrain(tiny_options(pictures, run_dir))
    return run_dir


def curve(run_dir: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in read_metrics(run_dir) if "loss" in entry]


def event_steps(run_dir: Path) -> list[int]:
    """Steps that TensorBoard shows of files in the order in which they were made.

    It sorts their names, which end in a number, by letters; that misleads for the tenth file of a process, if
    the ninth is of the same second.
    """
    files = (run_dir / "tensorboard").iterdir()
    in_order = sorted(files, key=lambda file: [*map(int, re.findall(r"\d+", file.name))])
    with TemporaryDirectory() as folder:
        for number, file in enumerate(in_order):
            Path(folder, f"{number:03}.tfevents").symlink_to(file)
        events = EventAccumulator(folder).Reload()
    found = "loss/loss" in events.Tags()["scalars"]
    return [event.step for event in events.Scalars("loss/loss")] if found else []


def assert_as_uninterrupted(run_dir: Path, uninterrupted: Path) -> None:
    assert curve(run_dir) == curve(uninterrupted)
    assert event_steps(run_dir) == event_steps(uninterrupted) == list(range(1, TOTAL_STEPS + 1))
    assert state_hash(load_latest(run_dir)) == state_hash(load_latest(uninterrupted))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("step", range(1, TOTAL_STEPS))
def test_interrupted_after_any_step(step, workers, pictures, uninterrupted, tmp_path, monkeypatch):
    options = tiny_options(
        pictures, tmp_path / "run", machine__num_workers=workers, log__checkpoint_every_minutes=1e-9
    )
    pretrain_until(step, options, monkeypatch)
    assert load_latest(tmp_path / "run")["step"] == step
    pretrain(options)
    assert_as_uninterrupted(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(("step", "saved"), [(1, 0), (5, 4)])  # they are saved after each epoch of two steps
def test_interrupted_between_checkpoints_cuts_the_logs(
    step, saved, pictures, uninterrupted, tmp_path, monkeypatch
):
    options = tiny_options(pictures, tmp_path)
    pretrain_until(step, options, monkeypatch)
    assert [logged for logged, _ in curve(tmp_path)] == event_steps(tmp_path) == [*range(1, step + 1)]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # what a power cut leaves of a line
    pretrain_until(0, options, monkeypatch)
    assert [logged for logged, _ in curve(tmp_path)] == event_steps(tmp_path) == [*range(1, saved + 1)]
    pretrain(options)
    assert_as_uninterrupted(tmp_path, uninterrupted)


def test_damaged_checkpoint_costs_time_but_changes_nothing(
    pictures, uninterrupted, tmp_path, monkeypatch, caplog
):
    options = tiny_options(pictures, tmp_path)
    pretrain_until(5, options, monkeypatch)
    path = tmp_path / "checkpoints" / "step_000000004.pt"
    path.write_bytes(path.read_bytes()[:-1])
    pretrain(options)
    assert "step_000000004.pt is damaged" in caplog.text
    assert_as_uninterrupted(tmp_path, uninterrupted)
    assert (tmp_path / "checkpoints" / "step_000000004.pt.damaged").exists()


def test_monitoring_and_logging_change_nothing(pictures, uninterrupted, tmp_path):
    write_pictures(tmp_path / "labeled", 60, classes=3)
    changes = {"monitor__knn_path": tmp_path / "labeled", "monitor__knn_every_epochs": 1}
    pretrain(tiny_options(pictures, tmp_path / "run", log__log_every_steps=4, **changes))
    assert state_hash(load_latest(tmp_path / "run")) == state_hash(load_latest(uninterrupted))
    evaluations = [entry for entry in read_metrics(tmp_path / "run") if "knn20_top1" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 2, 4, 6]


@pytest.mark.long
@pytest.mark.parametrize("step", [2, 6])
def test_killed_in_an_evaluation(step, pictures, uninterrupted, tmp_path, monkeypatch):
    """The checkpoint is written before it, and the next start makes up for it."""
    write_pictures(tmp_path / "labeled", 30, classes=3)
    changes = {"monitor__knn_path": tmp_path / "labeled", "monitor__knn_every_epochs": 1}
    pretrain(tiny_options(pictures, tmp_path / "whole", **changes))
    options, original = tiny_options(pictures, tmp_path / "run", **changes), program.evaluate

    def killed(run, run_log, done):
        if done == step:
            raise PowerCutError
        original(run, run_log, done)

    with monkeypatch.context() as patch:
        patch.setattr(program, "evaluate", killed)
        with pytest.raises(PowerCutError):
            pretrain(options)
    assert load_latest(tmp_path / "run")["step"] == step
    pretrain(options)
    pretrain(options)  # it is complete
    found, expected = (
        [(e["step"], e["knn20_top1"]) for e in read_metrics(tmp_path / name) if "knn20_top1" in e]
        for name in ("run", "whole")
    )
    assert found == expected and [number for number, _ in found] == [0, 2, 4, 6]
    assert curve(tmp_path / "run") == curve(uninterrupted)


def test_another_seed_is_another_run(pictures, uninterrupted, tmp_path):
    pretrain(tiny_options(pictures, tmp_path, seed=1))
    assert state_hash(load_latest(tmp_path)) != state_hash(load_latest(uninterrupted))


@pytest.mark.long
def test_killed_twenty_times(pictures, tmp_path):
    """SIGKILL at random moments, also while a checkpoint is written, which each step is."""
    changes = {"optim__epochs": 100, "log__checkpoint_every_minutes": 1e-9}
    pretrain(tiny_options(pictures, tmp_path / "whole", **changes))
    moments = random.Random(0)
    for kill in range(21):
        workers = 2 if kill % 5 == 4 else 0  # which import torch, for seconds
        arguments = tiny_arguments(pictures, tmp_path / "run", machine__num_workers=workers, **changes)
        before = len(logged(tmp_path / "run"))
        process = in_new_process(["pretrain", *arguments])
        if kill < 20:  # the last one runs to the end
            while process.is_alive() and len(logged(tmp_path / "run")) <= before:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.1))
            assert process.is_alive(), "the run has ended before it could be killed"
            process.kill()
        process.join()
    assert process.exitcode == 0
    assert state_hash(load_latest(tmp_path / "run")) == state_hash(load_latest(tmp_path / "whole"))
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    assert event_steps(tmp_path / "run") == event_steps(tmp_path / "whole")


def kill_at(call: int) -> None:
    """End this process by SIGKILL at a call of `os.fsync` by the thread that saves."""
    flush, calls = os.fsync, []

    def killing(descriptor):
        if threading.current_thread() is not threading.main_thread():  # it flushes the log
            calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = killing


@pytest.mark.parametrize(
    "call", [4, *(pytest.param(call, marks=pytest.mark.long) for call in (5, 6))]
)  # second checkpoint: the file, its hash, the folder
def test_killed_inside_a_save(call, pictures, uninterrupted, tmp_path):
    arguments = ["pretrain", *tiny_arguments(pictures, tmp_path, log__checkpoint_every_minutes=1e-9)]
    killed = in_new_process(arguments, partial(kill_at, call))
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert (tmp_path / "checkpoints" / "writing.tmp").exists() == (call < 6)
    assert load_latest(tmp_path)["step"] == (1 if call < 6 else 2)
    resumed = in_new_process(arguments)
    resumed.join()
    assert resumed.exitcode == 0
    assert_as_uninterrupted(tmp_path, uninterrupted)
