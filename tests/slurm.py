"""A SLURM of two machines that are both this one."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
# As srun does: the command once on each machine, here all on this one, without its own two options.
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 && $2 == --cpus-per-task && $3 == "$SLURM_CPUS_PER_TASK" ]] || exit 1
shift 3
for machine in $(seq "$SLURM_NNODES"); do "$@" & done
status=0
for step in $(jobs -p); do wait "$step" || status=$?; done
exit "$status"
"""


def slurm_environment(folder: Path) -> dict[str, str]:
    """The environment of a job on two machines, its programs in a folder; `scontrol` notes what it is told
    in `told`, and `sbatch` runs a script at once."""
    programs = {
        "srun": SRUN,
        "scontrol": f"#!/bin/sh\necho localhost\necho $* >> {folder / 'told'}\n",
        "sbatch": '#!/bin/sh\nexec bash "$@"\n',
    }
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "machine[1-2]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
    }
