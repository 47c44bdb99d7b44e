"""A run that is told to stop saves, says so, leaves nothing behind, and resumes bit for bit."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.runs.runlog import read_metrics
from tests.running import command, family, finished, is_gone, wait_for_step
from tests.tiny import state_hash

STOPPED = 75
CHANGES = {
    "optim__epochs": 60,
    "log__checkpoint_every_epochs": 1000,
}  # 3 steps an epoch; none saved but the last


@pytest.fixture(scope="module")
def uninterrupted(pictures, tmp_path_factory):
    """State and curve of the whole run, by number of processes."""
    found = {}

    def get(processes: int) -> tuple[str, list]:
        if processes not in found:
            run_dir = tmp_path_factory.mktemp("runs") / str(processes)
            subprocess.run(command(pictures, run_dir, processes, **CHANGES), check=True, capture_output=True)
            found[processes] = result_of(run_dir)
        return found[processes]

    return get


def result_of(run_dir: Path) -> tuple[str, list]:
    losses = [(entry["step"], entry["loss"]) for entry in read_metrics(run_dir)]
    return state_hash(load_latest(run_dir)), losses


@pytest.mark.long
@pytest.mark.parametrize(
    ("processes", "workers", "sent"),
    [
        (2, 0, signal.SIGTERM),
        (1, 2, signal.SIGINT),
        (2, 2, signal.SIGUSR1),
        (1, 0, signal.SIGHUP),
    ],
)
def test_a_signal_in_mid_epoch(processes, workers, sent, pictures, uninterrupted, tmp_path):
    if sent == signal.SIGHUP and signal.getsignal(sent) is signal.SIG_IGN:
        pytest.skip("these tests run under nohup, and so would the run")
    arguments = command(pictures, tmp_path, processes, machine__num_workers=workers, **CHANGES)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(4, tmp_path, process)
        everyone = family(process.pid)
        process.send_signal(sent)
        said = process.communicate(timeout=60)[1]
    stopped_at = load_latest(tmp_path)["step"]
    assert process.returncode == STOPPED
    assert said.count("; the same command resumes from there") == 1 and "Traceback" not in said
    assert f"{sent.name}: stopping after this step, and saving\n" in said
    assert f"stopped by {sent.name} after step {stopped_at} of 180" in said
    assert len(everyone) == (1 if processes == 1 else 1 + processes) + processes * workers
    assert all(is_gone(member) for member in everyone)
    marker = json.loads((tmp_path / "stopped.json").read_text())
    assert marker == {"step": stopped_at, "signal": sent.name} and 4 <= stopped_at < 180
    again = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert f"resuming at step {stopped_at} of 180" in again.stderr
    assert result_of(tmp_path) == uninterrupted(processes)
    assert not (tmp_path / "stopped.json").exists()


@pytest.mark.long  # starts torch's compiler
def test_a_signal_that_also_ends_the_compiler(pictures, tmp_path):
    """As Ctrl-C in a terminal, which all processes receive."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nkill -INT 0\nkill -TERM $$\n")
    compiler.chmod(0o700)
    environment = os.environ | {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "code")}
    arguments = command(pictures, tmp_path / "run", machine__compile=True)
    done = finished(arguments, env=environment, start_new_session=True)
    assert done.returncode == STOPPED and "Traceback" not in done.stderr
    assert "stopped by SIGINT while compiling, before the first step of this start; the same" in done.stderr
