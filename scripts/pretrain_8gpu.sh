#!/usr/bin/env bash
# The paper's experiment on one machine with 8 GPUs. The same command resumes an interrupted run.
# Usage: scripts/pretrain_8gpu.sh /data/imagenet [--section.key VALUE ...]
# Environment variables: RECIPE, RUN_DIR, NPROC (number of processes, one per GPU).
data=${1?usage: scripts/pretrain_8gpu.sh DATA [--section.key VALUE ...]}
shift
recipe=${RECIPE:-imagenet_vits16_sparo}
here=$(cd "$(dirname "$0")" && pwd)
calling_folder=$PWD
source "$here/setup.sh" ""
cd "$calling_folder"
exec "$here/../.venv/bin/dino-sparo" pretrain --nproc "${NPROC:-8}" --config "$recipe" --data.path "$data" \
  --run_dir "${RUN_DIR:-runs/$(basename "$recipe" .yaml)}" "$@"
