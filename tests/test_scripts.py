"""Launch scripts: one machine with --nproc, several with SLURM's srun and torchrun."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.runs.runlog import read_metrics
from tests.running import environment_of, family, finished, is_gone, plant_modules, wait_for_step
from tests.slurm import ROOT, slurm_environment
from tests.tiny import TINY, state_hash, write_pictures

pytestmark = pytest.mark.long


@pytest.fixture
def data(tmp_path) -> Path:
    write_pictures(tmp_path / "data", 20)
    return tmp_path / "data"


def start(script: str, data: Path, folder: Path, **environment: str) -> None:
    options = [f"--{key}={value}" for key, value in TINY.items()]
    done = finished(
        ["bash", str(ROOT / "scripts" / script), str(data), *options],
        env=os.environ | {"RECIPE": "demo", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""} | environment,
        cwd=folder,
    )
    assert done.returncode == 0 and "2 x cpu, 2 images each" in done.stderr, done.stderr


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    return slurm_environment(tmp_path) | {"RUN_DIR": str(tmp_path / "slurm")}


def test_one_machine_and_two_machines_are_the_same_run(data, slurm, tmp_path):
    plant_modules(tmp_path)
    start("pretrain_8gpu.sh", data, tmp_path, NPROC="2")
    start("pretrain_slurm.sbatch", data, tmp_path, **slurm)
    one, two = load_latest(tmp_path / "runs" / "demo"), load_latest(tmp_path / "slurm")
    assert state_hash(one) == state_hash(two)
    assert len(read_metrics(tmp_path / "slurm")) == 15


def long_job(data: Path, slurm: dict[str, str], folder: Path) -> subprocess.Popen:
    """A job that does not end by itself while a test runs."""
    options = [f"--{key}={value}" for key, value in (TINY | {"optim.epochs": "1000"}).items()]
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "pretrain_slurm.sbatch"), str(data), *options],
        env=os.environ | slurm | {"RECIPE": "demo", "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_job_requeues_itself_before_its_time_is_over(data, slurm, tmp_path):
    run_dir = tmp_path / "slurm"
    with long_job(data, slurm, tmp_path) as job:
        wait_for_step(3, run_dir, job)
        everyone = family(job.pid)
        agents = [pid for pid in everyone if b"torchrun" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        for agent in agents[-2:]:  # the steps of the job, not its shell
            os.kill(agent, signal.SIGUSR1)
        said = job.communicate(timeout=120)[1]
    assert job.returncode != 0 and "stopped by SIGUSR1 after step" in said
    assert all(is_gone(pid) for pid in everyone)
    assert load_latest(run_dir)["step"] >= 3
    assert f"requeue {os.getpid()}" in (tmp_path / "told").read_text()


@pytest.mark.parametrize(
    ("cause", "restarts", "requeued"), [("SIGUSR1", 19, True), ("SIGUSR1", 20, False), ("SIGTERM", 0, False)]
)
def test_a_job_is_requeued_for_its_time_alone_and_not_for_ever(cause, restarts, requeued, slurm, tmp_path):
    """By the mark that a run leaves, here all that there is of one."""
    torchrun = tmp_path / "venv" / "bin" / "torchrun"
    for folder in (torchrun.parent, tmp_path / "slurm"):
        folder.mkdir(parents=True)
    torchrun.write_text(
        f"#!/bin/sh\necho stopped by {cause} > {tmp_path / 'slurm' / 'stopped.json'}\nexit 75\n"
    )
    torchrun.chmod(0o755)
    environment = slurm | {"VENV": str(tmp_path / "venv"), "SLURM_RESTART_COUNT": str(restarts)}
    script = ["bash", str(ROOT / "scripts" / "pretrain_slurm.sbatch"), "data"]
    assert finished(script, env=os.environ | environment).returncode == 75
    assert ("requeue" in (tmp_path / "told").read_text()) == requeued


def test_a_process_that_dies_on_another_machine_is_told(data, slurm, tmp_path):
    run_dir = tmp_path / "slurm"
    with long_job(data, slurm, tmp_path) as job:
        wait_for_step(3, run_dir, job)
        everyone = family(job.pid)
        ranks = {pid: environment_of(pid).get("RANK") for pid in everyone}
        os.kill(next(pid for pid, rank in ranks.items() if rank == "1"), signal.SIGKILL)
        killed = time.monotonic()
        said = job.communicate(timeout=120)[1]
    assert time.monotonic() - killed < 30 and all(is_gone(pid) for pid in everyone)
    assert said.count("a process on another machine of 2 ended without an error message at step ") == 1
    assert not (tmp_path / "told").read_text().count("requeue")


def test_a_missing_folder_is_answered_with_the_usage():
    done = finished(["bash", str(ROOT / "scripts" / "pretrain_8gpu.sh")])
    assert done.returncode != 0 and "usage: scripts/pretrain_8gpu.sh DATA" in done.stderr


@pytest.mark.parametrize(("variable", "more"), [({}, ""), ({"CPU_ONLY": "1"}, " --extra-index-url")])
def test_install_takes_pytorch_without_cuda_if_that_is_asked_for(variable, more, tmp_path):
    """What is given to pip, by a `.venv` that only tells it."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("pip", "python"):
        (tmp_path / ".venv" / "bin" / name).write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    done = finished(["bash", "scripts/setup.sh", "test"], cwd=tmp_path, env=os.environ | variable)
    index = f"{more} https://download.pytorch.org/whl/cpu" if more else ""
    assert done.stdout.endswith(f" --editable .[test]{index}\n"), done
