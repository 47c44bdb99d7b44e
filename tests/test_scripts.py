"""The launchers: one machine through --nproc, several through SLURM's srun and torchrun's rendezvous."""

import os
import subprocess
from pathlib import Path

import pytest

from dino_sparo.training.checkpoint import load_latest
from dino_sparo.training.runlog import read_metrics
from tests.tiny import TINY, state_hash, write_pictures

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.long
# As srun does: the command once on each machine, here all on this one, without its own two options.
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 && $2 == --cpus-per-task && $3 == "$SLURM_CPUS_PER_TASK" ]] || exit 1
shift 3
for machine in $(seq "$SLURM_NNODES"); do "$@" & done
wait
"""


@pytest.fixture
def data(tmp_path) -> Path:
    write_pictures(tmp_path / "data", 20)
    return tmp_path / "data"


def start(script: str, data: Path, folder: Path, **environment: str) -> None:
    options = [f"--{key}={value}" for key, value in TINY.items()]
    finished = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), str(data), *options],
        env=os.environ | {"RECIPE": "demo", "OMP_NUM_THREADS": "1"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "2 x cpu, 2 images each" in finished.stderr


def test_one_machine_and_two_machines_are_the_same_run(data, tmp_path):
    start("pretrain_8gpu.sh", data, tmp_path, NPROC="2")
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho localhost\n")):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    start(
        "pretrain_slurm.sbatch",
        data,
        tmp_path,
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        RUN_DIR=str(tmp_path / "slurm"),
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_NODELIST="machine[1-2]",
        SLURM_JOB_ID=str(os.getpid()),
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="1",
        SLURM_CPUS_PER_TASK="1",
    )
    one, two = load_latest(tmp_path / "runs" / "demo"), load_latest(tmp_path / "slurm")
    assert state_hash(one) == state_hash(two)
    assert len(read_metrics(tmp_path / "slurm")) == 15


def test_a_missing_folder_is_answered_with_the_usage():
    finished = subprocess.run(
        ["bash", str(ROOT / "scripts" / "pretrain_8gpu.sh")], capture_output=True, text=True, check=False
    )
    assert finished.returncode != 0 and "usage: scripts/pretrain_8gpu.sh DATA" in finished.stderr
