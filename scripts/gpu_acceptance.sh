#!/usr/bin/env bash
# Run this first on a machine with GPUs (about ten minutes): GPU tests, speed compared with plain code, several GPUs.
# Usage: scripts/gpu_acceptance.sh DATA [OUT]      DATA as for --data.path; needs no network
# Requirements: the package with the extra `test`, as made by scripts/test.sh or `pip install -e '.[test]'`.
# Results are kept in OUT (default: runs/gpu_acceptance); a second start runs only the missing parts.
# Environment variables: PYTHON, the Python to use.
set -uo pipefail
data=${1?usage: scripts/gpu_acceptance.sh DATA [OUT]}
[ ! -e "$data" ] || data=$(realpath "$data") # else the name of a dataset
out=$(realpath -m "${2:-runs/gpu_acceptance}")
cd "$(dirname "$0")/.."
read -ra python <<< "${PYTHON:-.venv/bin/python}"
gpus=$("${python[@]}" -c 'import dino_sparo, pytest, torch; print(torch.cuda.device_count())') || {
  echo "'${python[*]}' cannot import the package and pytest; install them: .venv/bin/pip install -e '.[test]'" >&2
  exit 2
}
[ "$gpus" -gt 0 ] || { echo "torch sees no CUDA device here" >&2; exit 2; }
mkdir -p "$out"

part() { # FILE SECONDS COMMAND...: write standard output to OUT/FILE, which exists only if the command succeeded
  local file=$out/$1 seconds=$2
  shift 2
  [ -f "$file" ] && return
  echo "== $(basename "$file")" >&2
  timeout "$seconds" "$@" > "$file.part" 2> "$file.log" && mv "$file.part" "$file" || tail -n 3 "$file.part" "$file.log" >&2
}

bench() { # FILE CONFIG [OPTION...]: benchmark of training with batch size 64, as JSON
  local file=$1 config=$2
  shift 2
  part "$file" 240 "${python[@]}" -m dino_sparo bench --config "$config" --data.path "$data" \
    --batch_size 64 --num_images 512 --rounds 20 --json "$@"
}

part tests.txt 300 "${python[@]}" -m pytest -q -m gpu tests
bench sparo.json imagenet_vits16_sparo --compare --seconds 20
bench dino.json imagenet_vits16_dino --seconds null
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1
bench flash.json imagenet_vits16_sparo --seconds null
unset TORCH_CUDNN_SDPA_DEPRIORITIZED
part estimate.txt 180 "${python[@]}" -m dino_sparo check --config imagenet_vits16_sparo --data.path "$data" --measure \
  --optim.global_batch_size 64 --monitor.knn_every_epochs 0 --gpu h100 h200 a100 v100 l40s
if [ "$gpus" -gt 1 ]; then
  part several.txt 240 "${python[@]}" -m dino_sparo pretrain --nproc "$gpus" --config imagenet_vits16_sparo \
    --data.path "$data" --run_dir "$out/several" --optim.epochs 1 --optim.warmup_epochs 0 --data.max_images 20000 \
    --machine.capture true --optim.freeze_last_layer_epochs 0 \
    --optim.global_batch_size $((64 * gpus)) --monitor.knn_every_epochs 0 --loss.warmup_teacher_temp_epochs 0
fi

"${python[@]}" - "$out" <<'PYTHON' | tee "$out/table.txt"
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
result = {}
for file in sorted(out.glob("*.json")):
    if file.name != "result.json":
        result[file.stem] = json.loads(file.read_text())
tests = out / "tests.txt"
result["tests"] = tests.read_text().strip().splitlines()[-1] if tests.exists() else "failed, see tests.txt.part"
print(f"tests marked gpu: {result['tests']}")
if "passed" in result["tests"] and "failed" not in result["tests"]:
    print("captured steps equal eager steps: train with --machine.capture true")
for name in ("sparo", "dino", "flash"):
    found = result.get(name)
    if found is None:
        print(f"{name}: failed, see {name}.json.log")
        continue
    print(f"{name}: {found['device']}, {found['precision']}, torch {found['torch']}")
    for stage, times in found["stages"].items():
        print(f"  {stage:<24}{times['median_ms']:>10.2f} ms{times['images_per_second']:>12.1f} images/s")
    for what, shares in found["utilization"].items():
        print(f"  utilization, {what}: {', '.join(f'{100 * s:.1f} % of {peak}' for peak, s in shares.items())}")
    memory = found["memory"]["ours"]["peak_bytes"]
    print(f"  peak memory {memory / 2**30:.2f} GiB, host waits per step {found['host_waits_per_step']}")
    if found["end_to_end"]:
        print("  end to end {images_per_second:.1f} images/s, data wait share {data_wait_share:.3f}".format(**found["end_to_end"]))
    if found["compare"]:
        print(f"  plain / ours: step {found['compare']['step']['median']:.2f}, memory {found['compare']['memory']}")
estimate = out / "estimate.txt"
if estimate.exists():
    text = estimate.read_text()
    print(text[max(0, text.find("measured:")) :])
run = out / "several" / "metrics.jsonl"
if run.exists():
    entries = [json.loads(line) for line in run.read_text().splitlines()]
    result["several"] = [entry for entry in entries if "images_per_second" in entry][-1:]
    for entry in result["several"]:
        print(f"all GPUs, captured: {entry['images_per_second']:.0f} images/s")
(out / "result.json").write_text(json.dumps(result, indent=1))
PYTHON
