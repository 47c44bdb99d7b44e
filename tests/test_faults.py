"""What goes wrong in one process ends all of them, in time, with one message, and loses nothing."""

import fcntl
import json
import os
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dino_sparo.cli.pretraining import pretrain
from dino_sparo.errors import EXIT_USER_ERROR, UserError
from dino_sparo.files import LOCK_OF_FILES, alone_in
from dino_sparo.parallel.launch import status_after
from dino_sparo.runs import checkpoint
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.runs.rundir import lock_run_dir
from dino_sparo.training import pretrain as program
from dino_sparo.training.loss import DINOLoss
from dino_sparo.training.state import capture_state
from tests.running import command, family, finished, is_gone, of_rank, spawn, wait_for_step
from tests.tiny import state_hash, tiny_options

LONG = {"optim__epochs": 1000, "log__checkpoint_every_minutes": 1e-9}


def started(arguments: list[str], **environment: str) -> subprocess.Popen:
    """A run whose messages are kept."""
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=os.environ | environment)


def stopped_step(run_dir: Path) -> int:
    """The step of the marker that a stopped run leaves."""
    return json.loads((run_dir / "stopped.json").read_text())["step"]


# --- A process is killed


def killed(process: subprocess.Popen, rank: int) -> str:
    """Kill one of two processes; what the other one and the launcher say, who end in time and only once."""
    everyone = family(process.pid)
    os.kill(of_rank(rank, process.pid), signal.SIGKILL)
    moment = time.monotonic()
    said = process.communicate(timeout=60)[1]
    assert time.monotonic() - moment < 30 and process.returncode == 2
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert all(is_gone(pid) for pid in everyone)
    return said


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(victim, pictures, tmp_path):
    with started(command(pictures, tmp_path, 2, machine__num_workers=1, **LONG)) as process:
        wait_for_step(4, tmp_path, process)
        said = killed(process, victim)
    message = rf"error: process {victim} of 2 was ended by SIGKILL at step \d+, often because it was out"
    assert re.search(message, said)
    assert load_latest(tmp_path)["step"] >= 3


@pytest.mark.long
@pytest.mark.parametrize(("processes", "workers", "members"), [(1, 2, 3), (2, 1, 5)])
def test_a_killed_launcher_or_run_leaves_nobody_behind(processes, workers, members, pictures, tmp_path):
    with started(command(pictures, tmp_path, processes, machine__num_workers=workers, **LONG)) as process:
        wait_for_step(4, tmp_path, process)
        everyone = family(process.pid)
        process.kill()
        process.stderr.close()  # as if a terminal or `tee` had ended too: nobody reads what the others say
    assert len(everyone) == members and all(is_gone(pid) for pid in everyone)
    if processes == 2:  # the launcher was killed, the run was told to stop
        assert stopped_step(tmp_path) == load_latest(tmp_path)["step"]


def test_a_launcher_killed_before_the_processes_have_met_leaves_nobody_behind(pictures, tmp_path):
    with started(command(pictures, tmp_path, 2, **LONG)) as process:
        while len(family(process.pid)) < 3:
            time.sleep(0.01)
        everyone = family(process.pid)
        process.kill()
    assert all(is_gone(pid) for pid in everyone)


SLOW_SAVES = """
import os, threading, time
flush = os.fsync
def slow(descriptor):
    if threading.current_thread() is not threading.main_thread():
        time.sleep(1)
    flush(descriptor)
os.fsync = slow
"""
BLOCKED_SAVE = """
import ctypes, os, threading
flush, saved = os.fsync, []
def blocked(descriptor):
    if threading.current_thread() is not threading.main_thread():
        if len(saved) == 3:  # of the first checkpoint, for file, hash and folder
            open(os.environ["BLOCKED"], "w").close()
            ctypes.PyDLL(None).sleep(600)  # no thread of Python and no handler of a signal runs meanwhile
        saved.append(descriptor)
    flush(descriptor)
os.fsync = blocked
"""


def with_site(folder: Path, code: str) -> str:
    """A PYTHONPATH by which every process that starts runs this code first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return f"{folder}:{os.environ.get('PYTHONPATH', '.')}"


@pytest.mark.long
@pytest.mark.parametrize(
    ("code", "saved"),
    [(SLOW_SAVES, None), (BLOCKED_SAVE, 3)],  # ended after 23 seconds
    ids=["slow", "blocked outside of Python"],
)
def test_a_process_is_lost_while_a_checkpoint_is_written(code, saved, pictures, tmp_path):
    run_dir, blocked = tmp_path / "run", tmp_path / "blocked"
    seen = blocked if saved else run_dir / "checkpoints" / "writing.tmp"
    arguments = command(pictures, run_dir, 2, log__checkpoint_every_epochs=1, optim__epochs=1000)
    path = with_site(tmp_path / "site", code)
    with started(arguments, PYTHONPATH=path, BLOCKED=str(blocked)) as process:
        while not seen.exists():
            time.sleep(0.01)
            assert process.poll() is None
        assert "process 1 of 2 was ended by SIGKILL" in killed(process, 1)
    step = load_latest(run_dir)["step"]
    assert step == saved if saved else step >= 3


@pytest.mark.parametrize(
    ("codes", "named"),
    [
        ({0: EXIT_USER_ERROR, 1: -signal.SIGTERM}, None),  # the launcher ended the other one
        ({0: EXIT_USER_ERROR}, None),
        ({1: -9, 0: -15}, 1),
        ({0: EXIT_USER_ERROR, 1: -9}, 1),
        ({1: -15, 0: -15}, 1),
    ],
)
def test_a_process_that_the_launcher_did_not_end_is_named(codes, named, tmp_path):
    failures = {number: ProcessFailure(number, 1, code, "no file") for number, code in codes.items()}
    error = ChildFailedError("test", failures)
    if named is None:
        assert status_after(error, 2, tmp_path) == EXIT_USER_ERROR
    else:
        with pytest.raises(UserError, match=f"process {named} of 2 was ended by SIG"):
            status_after(error, 2, tmp_path)


# --- A run is told to stop


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_many_signals_are_one(processes, pictures, tmp_path):
    run_dir, path = tmp_path / "run", with_site(tmp_path / "site", SLOW_SAVES)
    arguments = command(pictures, run_dir, processes, **(LONG | {"log__checkpoint_every_minutes": 0}))
    with started(arguments, PYTHONPATH=path) as process:
        wait_for_step(4, run_dir, process)
        everyone = family(process.pid)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        said = process.stderr.read()
    assert process.returncode == 75 and said.count("stopped by SIGINT") == 1 and "Traceback" not in said
    assert all(is_gone(pid) for pid in everyone)
    assert stopped_step(run_dir) == load_latest(run_dir)["step"]


@pytest.mark.long
def test_a_signal_to_one_process_stops_all(pictures, tmp_path):
    with started(command(pictures, tmp_path, 2, **LONG)) as process:
        wait_for_step(4, tmp_path, process)
        os.kill(of_rank(1, process.pid), signal.SIGUSR1)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and said.count("stopped by SIGUSR1") == 1 and "Traceback" not in said
    assert stopped_step(tmp_path) == load_latest(tmp_path)["step"]


# --- One run in a folder


def test_two_first_starts_in_one_folder(pictures, tmp_path, monkeypatch):
    prepare = program.prepare

    def while_another_one_trains(*given, **more):
        run = prepare(*given, **more)
        monkeypatch.setattr(program, "prepare", prepare)
        if not (tmp_path / "run").exists():
            pretrain(options)
        return run

    options = tiny_options(pictures, tmp_path / "run")
    monkeypatch.setattr(program, "prepare", while_another_one_trains)
    with pytest.raises(UserError, match="another run has started there"):
        pretrain(options)
    assert load_latest(tmp_path / "run")["step"] == 9


@pytest.mark.long
def test_only_one_run_trains_in_a_folder(pictures, tmp_path):
    arguments = command(pictures, tmp_path, **LONG)
    with started(arguments) as process:
        wait_for_step(2, tmp_path, process)
        second = finished(arguments)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 75 and second.returncode == 2
    assert f"is in use: process {process.pid} on " in second.stderr and "Traceback" not in second.stderr
    with lock_run_dir(tmp_path):
        pass  # the lock is free again


@pytest.mark.parametrize(("function", "lock"), [("lockf", lock_run_dir), ("flock", alone_in)])
def test_file_systems_without_locks_are_told(function, lock, tmp_path, monkeypatch, caplog):
    def missing(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, function, missing)
    with caplog.at_level("INFO", logger="dino_sparo"), lock(tmp_path):
        assert "has no locks" in caplog.text


def test_the_lock_of_a_folder_is_a_file_of_it(tmp_path):
    """Since a lock of the folder itself would not reach other machines on NFS."""
    refused = pytest.raises(UserError, match="another process writes")
    with alone_in(tmp_path), open(tmp_path / LOCK_OF_FILES, "a") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with refused, alone_in(tmp_path, wait=False):
            pass
    with alone_in(tmp_path, wait=False):
        pass  # it is free again


# --- Disks


def test_a_disk_that_gets_full_is_told(pictures, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(program.RunLog, "scalars", full)
    message = r"metrics.jsonl cannot be read or written \(No space left on device\); free some space"
    with pytest.raises(UserError, match=message):
        pretrain(tiny_options(pictures, tmp_path / "run"))


@pytest.mark.long
def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_the_old_one_whole(pictures, tmp_path):
    changes = {"optim__epochs": 2, "log__checkpoint_every_epochs": 1}
    pretrain(tiny_options(pictures, tmp_path, **changes))
    before = load_latest(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 2", "epochs: 9"))
    limited = finished(
        command(pictures, tmp_path, **(changes | {"optim__epochs": 9})),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert limited.returncode == 2 and limited.stderr.count("error: ") == 1
    assert re.search(r"step_\d+\.pt \(\d+ bytes\) cannot be written \(", limited.stderr), limited.stderr
    assert state_hash(load_latest(tmp_path)) == state_hash(before)


def test_a_small_disk_is_told_before_the_first_step(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"run/checkpoints: a checkpoint needs \d+ bytes .* but only 1000"):
        pretrain(tiny_options(pictures, tmp_path / "run"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- A loss that is not finite in one of two processes


def in_processes(number: int, folder: str, pictures: str, wrong_step: int) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    original, steps = DINOLoss.forward, []

    def forward(self, *given):
        steps.append(1)
        wrong = number == 1 and len(steps) == wrong_step
        return original(self, *given) * (float("nan") if wrong else 1)

    DINOLoss.forward = forward
    checkpoint.KEEP_LAST = 100
    changes = {"log__log_every_steps": 100} if wrong_step else {"log__checkpoint_every_minutes": 1e-9}
    prepare, runs = program.prepare, []

    def kept(*given, **more):
        runs.append(prepare(*given, **more))
        return runs[0]

    program.prepare = kept
    try:
        pretrain(tiny_options(Path(pictures), Path(folder, "run"), **changes))
        said = ""
    except UserError as error:
        said = str(error)
    Path(folder, f"said{number}").write_text(said)
    Path(folder, f"state{number}").write_text(state_hash({"step": 4, **capture_state(runs[0].state)}))


@pytest.mark.long
def test_a_loss_that_is_not_finite_in_one_process_changes_nothing_in_any(pictures, tmp_path):
    for name, wrong_step in (("whole", 0), ("broken", 5)):  # of three an epoch
        (tmp_path / name).mkdir()
        spawn(in_processes, str(tmp_path / name), str(pictures), wrong_step, processes=2)
    said = [(tmp_path / "broken" / f"said{number}").read_text() for number in (0, 1)]
    for number in (0, 1):
        assert said[number].startswith("step 5: loss not finite; ")
        assert said[number].endswith(f"(process {number} at step 6)")  # the epoch's end, when it is saved
    kept = load_latest(tmp_path / "broken" / "run")
    expected = torch.load(tmp_path / "whole" / "run" / "checkpoints" / "step_000000004.pt")
    assert kept["step"] == 4 and state_hash(kept) == state_hash(expected)
    in_memory = [(tmp_path / "broken" / f"state{number}").read_text() for number in (0, 1)]
    assert in_memory == [state_hash(expected)] * 2
    noted = json.loads((tmp_path / "broken" / "run" / "bad_steps.jsonl").read_text())
    assert noted["step"] == 5 and len(noted["samples"]) == 4
