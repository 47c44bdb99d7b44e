"""The whole GPU path on a simulated device that computes nothing: waits, launches, memory, processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino_sparo.check.counting import count_step
from dino_sparo.recipe.files import named_recipe
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.training.setup import build_schedules
from tests.running import environment_of, family, is_gone, wait_for_step
from tests.tiny import build_state, tiny_arguments, write_pictures

FAKEGPU = Path(__file__).parent / "fakegpu"
ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("g++") is None or torch.version.cuda is None,
        reason="the simulated GPU needs g++ and a CUDA build of torch",
    ),
]


@pytest.fixture(scope="module")
def gpus(tmp_path_factory):
    """The start of a command that runs Python with simulated GPUs, and its environment."""
    library = tmp_path_factory.mktemp("fakegpu")
    environment = {
        **os.environ,
        "FAKEGPU_LIB": str(library),
        "FAKEGPU_DEVICES": "2",
        "PYTHONPATH": str(ROOT),
        "TORCHINDUCTOR_CACHE_DIR": str(library / "inductor"),
    }
    subprocess.run(["bash", FAKEGPU / "build.sh", sys.executable, library], check=True)
    return ["bash", str(FAKEGPU / "run"), sys.executable], environment


@pytest.fixture
def inside(gpus):
    """Call a function of tests/fakegpu/inside.py with a simulated GPU."""
    start, environment = gpus

    def call(function, memory_gib=80, **arguments):
        command = [*start, str(FAKEGPU / "inside.py"), function, json.dumps(arguments)]
        of_gpu = environment | {"FAKEGPU_MEMORY_GIB": str(memory_gib)}
        done = subprocess.run(command, env=of_gpu, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    return call


@pytest.fixture
def program(gpus):
    """Run a command of dino-sparo with simulated GPUs."""
    start, environment = gpus

    def run(*arguments, **more):
        command = [*start, "-m", "dino_sparo", *map(str, arguments)]
        return subprocess.run(command, check=False, env=environment | more, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pictures(folder, 24, classes=3)
    return folder


@pytest.mark.parametrize("processes", [1, 8])
def test_the_full_step_never_waits_and_as_a_graph_is_launched_at_once(processes, inside):
    """Beside the graph are a seed and an offset of random numbers, and the crops."""
    found = inside("full_step", processes=processes, capture=True)
    assert found["calls"]["graph"] == 1 and found["launches"] <= 4
    assert found["waits"] == 0
    assert found["peak_gib"] < 7.5
    assert sum(found["calls"].get(kind, 0) for kind in ("kernel", "gemm", "memset", "copy")) < 1300
    in_nccl = 3 if processes > 1 else 0  # gradients, center, whether a loss is finite
    eager = found["eager"]
    assert found["calls"].get("nccl", 0) == eager["calls"].get("nccl", 0) == in_nccl
    assert eager["waits"] == 0 and eager["launches"] < 1200 and eager["peak_gib"] < 7.3


def test_compiled_blocks_need_less_memory_and_can_be_captured(inside):
    """One graph for the teacher's blocks, and two for the student's, whose first has no stochastic depth."""
    found = inside("full_step", compiles=True, capture=True)
    eager = found["eager"]
    assert found["graphs"] <= 3
    assert found["calls"]["graph"] == 1 and found["waits"] == eager["waits"] == 0
    assert eager["launches"] < 1100 and eager["peak_gib"] < 7


def test_compiled_blocks_move_less(inside):
    """The whole step moves 86 GB, and 75 GB with the 11 blocks compiled."""
    found = inside("bytes_of_block")
    saved = {model: found[model] - found[f"{model} compiled"] for model in ("teacher", "student")}
    assert 11 * sum(saved.values()) > 11


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32"},
        {"precision": "fp16", "accumulation": 2},
        {"activation_checkpointing": True},
        {"deterministic": True},
    ],
)
def test_every_way_of_taking_a_step_in_eight_processes_never_waits_and_can_be_captured(changes, inside):
    found = inside("full_step", images=2, processes=8, capture=True, **changes)
    assert found["calls"]["graph"] == 1 and found["waits"] == found["eager"]["waits"] == 0


def test_steps_are_captured_when_all_has_learned_for_three_steps(inside):
    """Before, the optimizer has no moments of what was frozen, and a graph would make them anew."""
    frozen = ["last_layer"] * 5 + [""] * 4 + ["backbone"] + [""] * 5
    replays = inside("captured_steps", frozen=frozen)
    assert [step for step, replayed in enumerate(replays) if replayed] == [8, 13, 14]


def test_a_step_that_cannot_be_captured_is_taken_without(inside):
    found = inside("full_step", images=2, capture=True, wait=True)
    assert "graph" not in found["calls"] and found["waits"] == found["eager"]["waits"] == 1


def test_a_step_whose_graph_does_not_fit_into_memory_is_taken_without(inside):
    assert "graph" not in inside("full_step", capture=True, memory_gib=8)["calls"]


def test_an_entry_of_the_log_never_waits(data, inside, tmp_path):
    found = inside("log_entry", data=str(data), run_dir=str(tmp_path / "run"))
    assert found["entries"] == [1, 4, 7, 10, 13, 16, 19]
    assert found["waits"] == 0
    assert found["launches"] < 30


@pytest.mark.parametrize(
    "changes", [{}, {"precision": "fp16"}, {"precision": "fp32"}, {"activation_checkpointing": True}]
)
def test_a_step_that_is_counted_without_a_gpu_is_the_one_that_runs_on_it(changes, inside):
    """Bytes within 5 %, and the peak of memory too: what libraries take for themselves is missing."""
    found = inside("full_step", operators=True, **changes)
    recipe = named_recipe("imagenet_vits16_sparo", {"data.path": "x"})
    precision = changes.pop("precision", "bf16")
    counted = count_step(
        *(build_state(recipe, **changes), [(2, 224), (8, 96)], 64, 1),
        build_schedules(recipe.optim, recipe.loss, 2500).at(5000),
        clip_norm=3.0,
        precision=precision,
    )
    assert counted.flops == found["flops"]
    assert counted.bytes == pytest.approx(found["bytes"], rel=0.05)
    assert 0.95 * found["peak_gib"] < counted.peak_bytes / 2**30 < found["peak_gib"]


@pytest.mark.parametrize("images", [64, 33])
def test_views_are_compiled_before_the_first_batch_and_never_again(images, inside):
    found = inside("views", images=images)
    assert found["prepared"] == found["graphs"] == 2  # crop and resize; what follows
    assert found["waits"] == 0
    assert found["launches"] < 70
    assert found["peak_gib"] < 1.2


def test_views_without_a_compiler_are_said_to_be_slow_at_the_start(data, program, tmp_path):
    changes = {"machine__device": "cuda", "machine__views": "device"}
    arguments = tiny_arguments(data, tmp_path / "run", optim__epochs=1, optim__warmup_epochs=0, **changes)
    (tmp_path / "cache").mkdir()
    without = {"CC": "/nowhere/cc", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = program("pretrain", *arguments, **without)
    assert done.returncode == 0, done.stderr
    warning = done.stderr.index("about ten times as long")
    assert done.stderr.count("cannot be compiled") == 1 and warning < done.stderr.index("starting at step 0")


@pytest.mark.long
def test_check_compares_with_the_memory_of_this_gpu(program, data, tmp_path):
    """One kind of GPU has several sizes; a step of ViT-S/16 with 16 images needs about 2 GiB."""
    here = ("--config", "imagenet_vits16_sparo", "--data.path", data, "--run_dir", tmp_path / "run")
    small = ("--optim.global_batch_size", 16, "--optim.epochs", 40, "--monitor.knn_every_epochs", 0)
    done = program("check", *here, *small, FAKEGPU_MEMORY_GIB="1")
    assert done.returncode == 1, done.stderr
    assert "h100: 16 images per GPU need about" in done.stdout and "but it has 1; use" in done.stdout


def run_arguments(data, run_dir, **changes):
    """A tiny run on GPUs, in two processes, whose views the CPU makes, so that nothing is compiled."""
    changes = {"machine__device": "cuda", "machine__views": "pil"} | changes
    return ["pretrain", *tiny_arguments(data, run_dir, **changes), "--nproc=2"]


@pytest.mark.parametrize(("capture", "views"), [("false", "pil"), ("true", "device")])
def test_two_processes_train_stop_and_resume(capture, views, data, gpus, program, tmp_path):
    start, environment = gpus
    changes = {"machine__capture": capture, "machine__views": views}
    arguments = run_arguments(data, tmp_path / "run", optim__epochs=12, **changes)
    with subprocess.Popen([*start, "-m", "dino_sparo", *arguments], env=environment) as process:
        wait_for_step(10, tmp_path / "run", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert 10 <= load_latest(tmp_path / "run")["step"] < 72
    done = program(*arguments)
    assert done.returncode == 0, done.stderr
    assert "captured" not in done.stderr
    assert load_latest(tmp_path / "run")["step"] == 72


def test_processes_go_on_together_if_one_cannot_capture(data, program, tmp_path):
    arguments = run_arguments(data, tmp_path / "run", machine__capture="true")
    done = program(*arguments, FAKEGPU_NO_CAPTURE="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("could not be captured as a CUDA graph in 1 processes") == 1
    assert load_latest(tmp_path / "run")["step"] == 18


def errors_after(number, gpus, data, run_dir, seconds, **changes):
    """What a run of two processes says when process 1 gets this signal; it ends in time, whole."""
    start, environment = gpus
    arguments = run_arguments(data, run_dir, optim__epochs=4000, **changes)
    command = [*start, "-m", "dino_sparo", *arguments]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(5, run_dir, process)
        members = family(process.pid)
        os.kill(next(pid for pid in members if environment_of(pid).get("RANK") == "1"), number)
        _, errors = process.communicate(timeout=seconds)
    assert process.returncode == 2, errors
    assert all(is_gone(pid) for pid in members)
    return [line for line in errors.splitlines() if "error" in line]


def test_a_killed_process_ends_the_run(data, gpus, tmp_path):
    (error,) = errors_after(signal.SIGKILL, gpus, data, tmp_path / "run", 30)
    assert "process 1 of 2 was ended by SIGKILL" in error


def test_a_stuck_process_ends_the_run(data, gpus, tmp_path):
    """The one that waits for it gives up, in the time that it is given."""
    start, environment = gpus
    impatient = start, environment | {"FAKEGPU_PATIENCE": "20"}
    (error,) = errors_after(signal.SIGSTOP, impatient, data, tmp_path / "run", 60, machine__capture="true")
    assert "process 0 has waited" in error


@pytest.mark.parametrize(
    ("gib", "changes"),
    [(0.01, {}), (0.2, {"views__global_size": 224, "optim__global_batch_size": 24})],
    ids=["networks", "step"],
)
def test_what_does_not_fit_into_memory_is_one_sentence(gib, changes, data, program, tmp_path):
    changes = {"machine__device": "cuda", "machine__views": "pil"} | changes
    arguments = tiny_arguments(data, tmp_path / "run", **changes)
    done = program("pretrain", *arguments, FAKEGPU_MEMORY_GIB=str(gib))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "memory" in done.stderr.splitlines()[-1]


def test_other_commands_run_on_a_gpu(data, gpus, tmp_path):
    """In one process; the weights of the run are what the device's copies give, zeros."""
    start, environment = gpus
    run, images = str(tmp_path / "run"), ["--data.path", str(data)]
    changes = {"machine__device": "cuda", "optim__epochs": 1, "optim__warmup_epochs": 0}
    commands = [
        ["pretrain", *tiny_arguments(data, tmp_path / "run", **changes)],
        ["knn", run, *images],
        ["linear", run, *images, "--epochs", "1", "--batch_size", "20"],
        ["slots", "maps", run, *images],
        ["slots", "health", run, *images],
        ["export", run, "--out", str(tmp_path / "out")],
    ]
    code = f"from dino_sparo.__main__ import main\nfor command in {commands}:\n    assert main(command) == 0"
    done = subprocess.run([*start, "-c", code], check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
