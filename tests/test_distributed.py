"""Several processes are one run: the same samples, the same parameters, one voice, and resumable."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dino_sparo.__main__ import main
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.errors import UserError
from dino_sparo.parallel import distributed
from dino_sparo.recipe.sections import smaller_batch, split_batch
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.runs.rundir import read_starts
from dino_sparo.runs.runlog import read_metrics
from tests import running
from tests.recipes import content
from tests.running import children, is_gone, of_rank, plant_modules, spawn, wait_for_step
from tests.test_trajectory import TOLERANCE, assert_near
from tests.tiny import build_state, state_hash, tiny_options, write_pictures

NUM_IMAGES, TOTAL_STEPS = 44, 15  # batch 8: five steps an epoch, three epochs
PROCESSES = 2
COMMON = {
    "optim__global_batch_size": 8,
    "optim__lr_per_256": 0.1,
    "model__drop_path_rate": 0.0,
    "monitor__knn_every_epochs": 1,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder, NUM_IMAGES, classes=2)
    return folder


def command(processes: int, pictures: Path, run_dir: Path, **changes) -> list[str]:
    return running.command(pictures, run_dir, processes, **(COMMON | changes))


def run(processes: int, pictures: Path, run_dir: Path, **changes) -> subprocess.CompletedProcess[str]:
    """A whole run in so many processes."""
    return running.finished(command(processes, pictures, run_dir, **changes))


def run_until(step: int, processes: int, pictures: Path, run_dir: Path, **changes) -> None:
    """A run that is killed, with all its processes, when `step` is in its log."""
    with subprocess.Popen(
        command(processes, pictures, run_dir, **changes), stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        wait_for_step(step, run_dir, process)
        killed = [process.pid, *children(process.pid)]  # each leads a group of its own
        for leader in killed:
            os.killpg(os.getpgid(leader), signal.SIGKILL)
        process.wait()
    assert all(map(is_gone, killed)), "a killed process is still there, and holds the run folder"


def curve(run_dir: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(run_dir) if "loss" in entry]


WATCHED = ("loss", "kl", "entropy_teacher", "entropy_mean", "feature_std", "gradient_norm", "center_norm")


def watched(run_dir: Path) -> list[list[float]]:
    """What the log says about learning, entry by entry."""
    return [[entry[name] for name in WATCHED] for entry in read_metrics(run_dir) if "loss" in entry]


def knn(run_dir: Path) -> list[float]:
    return [entry["knn20_top1"] for entry in read_metrics(run_dir) if "knn20_top1" in entry]


@pytest.fixture(scope="module")
def two_processes(pictures, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    finished = run(PROCESSES, pictures, run_dir, log__keep_every_epochs=1)
    assert finished.returncode == 0, finished.stderr
    return run_dir, finished.stderr


def assert_same_state(one: dict, other: dict) -> None:
    for part in ("student", "teacher"):
        for name, value in one[part].items():
            assert_near(name, value, other[part][name], TOLERANCE)
    torch.testing.assert_close(one["center"], other["center"], atol=TOLERANCE, rtol=0)


def after_five_steps(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoints" / "step_000000005.pt")


@pytest.mark.parametrize(
    "batch_size_per_gpu",
    [8, pytest.param(4, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.long)],
)
def test_processes_and_accumulation_are_the_same_experiment(
    batch_size_per_gpu, pictures, two_processes, tmp_path
):
    """2 processes x 4 images against 1 x 8, and 1 x 4 and 1 x 1 with accumulation."""
    changes = {"log__keep_every_epochs": 1, "machine__batch_size_per_gpu": batch_size_per_gpu}
    options = tiny_options(pictures, tmp_path, **COMMON, **changes)
    pretrain(options)
    one, two = after_five_steps(tmp_path), after_five_steps(two_processes[0])
    assert one["images"] == two["images"]
    assert_same_state(one, two)
    initial = build_state(options).student.state_dict()
    name = "encoder.backbone.blocks.0.attn.qkv.weight"
    assert (one["student"][name] - initial[name]).abs().max() > 100 * TOLERANCE, "nothing was learned"
    np.testing.assert_allclose(watched(tmp_path)[:5], watched(two_processes[0])[:5], rtol=1e-4, atol=1e-5)
    assert knn(tmp_path)[0] == knn(two_processes[0])[0]


def test_one_process_speaks_and_the_command_is_that_of_the_user(two_processes, pictures):
    run_dir, shown = two_processes
    (start,) = read_starts(run_dir)
    assert start["command"][1:] == command(PROCESSES, pictures, run_dir, log__keep_every_epochs=1)[3:]
    lines = [line for line in shown.splitlines() if line.startswith("epoch 1/3 step 1/5 ")]
    assert len(lines) == 1
    assert "Traceback" not in shown and "OMP_NUM" not in shown


@pytest.mark.long
def test_three_processes_go_on_bit_for_bit(pictures, tmp_path):
    """Of three numbers the order of summation matters: it must not depend on where a start began."""
    changes = {"optim__global_batch_size": 9, "model__drop_path_rate": 0.3}
    assert run(3, pictures, tmp_path / "one", **changes).returncode == 0
    run_until(7, 3, pictures, tmp_path / "run", log__checkpoint_every_minutes=1e-9, **changes)
    finished = run(3, pictures, tmp_path / "run", **changes)
    assert finished.returncode == 0 and "resuming at step" in finished.stderr
    assert state_hash(load_latest(tmp_path / "run")) == state_hash(load_latest(tmp_path / "one"))
    assert curve(tmp_path / "run") == curve(tmp_path / "one")
    assert knn(tmp_path / "run") == knn(tmp_path / "one")


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes(pictures, two_processes, tmp_path):
    run_until(7, PROCESSES, pictures, tmp_path, log__checkpoint_every_minutes=1e-9)
    done = load_latest(tmp_path)["step"]
    pretrain(tiny_options(pictures, tmp_path, **COMMON))
    assert load_latest(tmp_path)["step"] == TOTAL_STEPS
    assert curve(tmp_path)[:done] == curve(two_processes[0])[:done]
    # The same samples in the same batches: another order of summation is all that differs.
    assert curve(tmp_path) == pytest.approx(curve(two_processes[0]), rel=1e-3)
    pretrain(tiny_options(pictures, tmp_path / "other", seed=1, **COMMON))
    assert curve(tmp_path / "other") != pytest.approx(curve(two_processes[0]), rel=1e-3)


@pytest.mark.long
def test_a_mistake_is_answered_once(tmp_path):
    finished = run(PROCESSES, tmp_path / "nowhere", tmp_path / "run")
    assert finished.returncode == 2 and finished.stderr.count("error: ") == 1
    assert f"data.path '{tmp_path / 'nowhere'}' does not exist" in finished.stderr
    assert "Traceback" not in finished.stderr and not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_bad_image_of_one_process_is_named_once(tmp_path):
    write_pictures(tmp_path / "data", 16)
    bad = tmp_path / "data" / "train" / "class0" / "003.png"
    bad.write_bytes(b"no picture")
    finished = run(PROCESSES, tmp_path / "data", tmp_path / "run", monitor__knn_every_epochs=0)
    assert finished.returncode == 2
    assert finished.stderr.count(f"error: {bad}: the image cannot be read") == 1
    assert "Traceback" not in finished.stderr


@pytest.mark.long
def test_images_of_all_processes_that_were_replaced_are_listed(tmp_path):
    write_pictures(tmp_path / "data", 400, side=4)
    names = [tmp_path / "data" / "train" / "class0" / f"{number}.png" for number in ("007", "111", "222")]
    for name in names:
        name.write_bytes(b"no picture")
    changes = {"monitor__knn_every_epochs": 0, "data__on_bad_image": "substitute", "optim__epochs": 1}
    pretrain(tiny_options(tmp_path / "data", tmp_path / "one", **(COMMON | changes)))
    finished = run(2, tmp_path / "data", tmp_path / "two", **changes)
    assert finished.returncode == 0, finished.stderr
    one, two = ((tmp_path / name / "bad_images.jsonl").read_text() for name in ("one", "two"))
    assert one == two and one.count("no picture") == 0 and all(str(name) in one for name in names)
    assert [read_metrics(tmp_path / name)[-1]["bad_images"] for name in ("one", "two")] == [3, 3]


@pytest.mark.long
def test_too_many_bad_images_end_the_run(tmp_path):
    write_pictures(tmp_path / "data", 40)
    names = [f"00{number}.png" for number in (1, 2, 3)]
    for name in names:
        (tmp_path / "data" / "train" / "class0" / name).write_bytes(b"no picture")
    changes = {"monitor__knn_every_epochs": 0, "data__on_bad_image": "substitute"}
    changes |= {"log__checkpoint_every_minutes": 1e-9}
    finished = run(PROCESSES, tmp_path / "data", tmp_path / "run", **changes)
    assert finished.returncode == 2 and "images cannot be read, more than 1 %" in finished.stderr
    assert "Traceback" not in finished.stderr
    options = tiny_options(tmp_path / "data", tmp_path / "run", **(COMMON | changes))
    with pytest.raises(UserError, match="images cannot be read, more than 1 %"):
        pretrain(options)  # it resumes from a checkpoint
    for name in names:  # repaired ones do not end a run, although they are still listed
        shutil.copy(tmp_path / "data" / "train" / "class0" / "000.png", tmp_path / "data/train/class0" / name)
    pretrain(options)
    assert len((tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()) == 3


@pytest.mark.long
def test_a_data_worker_that_stops_ends_all_processes_in_time(tmp_path):
    write_pictures(tmp_path / "data", 64)
    changes = {"monitor__knn_every_epochs": 0, "optim__epochs": 10_000}
    changes |= {"machine__num_workers": 2, "machine__data_timeout_seconds": 3}
    arguments = command(PROCESSES, tmp_path / "data", tmp_path / "run", **changes)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(5, tmp_path / "run", process)
        worker = next(child for child in children(of_rank(1, process.pid)) if children(child) == [])
        os.kill(worker, signal.SIGSTOP)
        stopped = time.monotonic()
        said = process.communicate(timeout=60)[1]
    assert time.monotonic() - stopped < 30 and process.returncode == 2
    assert said.count("error: no batch of images came within machine.data_timeout_seconds 3") == 1
    assert "Traceback" not in said
    assert is_gone(worker)


def test_nproc_may_stand_in_a_recipe(pictures, tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content("demo") | {"nproc": 8}))
    monkeypatch.setattr("dino_sparo.parallel.launch.launch", lambda number, arguments: number)
    given = [f"--config={tmp_path / 'recipe.yaml'}", f"--data.path={pictures}", f"--run_dir={tmp_path}"]
    assert main(["pretrain", *given]) == 8


@pytest.mark.long
def test_nothing_is_imported_from_where_the_user_stands(pictures, tmp_path):
    plant_modules(tmp_path / "here")
    script = Path(sys.executable).with_name("dino-sparo")
    trained = command(2, pictures, tmp_path / "run", optim__epochs=1)[3:]
    sharded = ["shard", str(pictures), "--out", str(tmp_path / "shards"), "--num-workers", "2"]
    for arguments in (trained, sharded):
        environment = os.environ | {"PYTHONSAFEPATH": ""}
        finished = running.finished([script, *arguments], cwd=tmp_path / "here", env=environment)
        assert finished.returncode == 0, finished.stderr


# --- Collectives


def in_processes(number: int, folder: str) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "3", "LOCAL_RANK": str(number)}
    distributed.HEARTBEAT_SECONDS = 0.05
    with distributed.process_group(torch.device("cpu")):
        assert (distributed.rank(), distributed.world_size()) == (number, 3)
        assert distributed.gather_objects(f"of {number}") == ["of 0", "of 1", "of 2"]
        assert distributed.sum_over_ranks(torch.tensor([number])).item() == 3
        assert distributed.mean_over_ranks(torch.tensor([float(number)])).item() == 1
        assert distributed.first_rank_decides(number == 0) is True
        assert distributed.first_rank_decides(number > 0) is False
        for distributed.GATHERED_ROWS in (1, 2, 256):
            for total in (7, 8, 9):
                rows = torch.arange(total)[:, None] * torch.tensor([[1, 10]])
                assert torch.equal(distributed.gather_rows(rows[number::3], total), rows)

        def work() -> str:
            path = Path(folder) / "made"
            if number == 0:
                time.sleep(0.5)
                path.write_text("by the first")
            return path.read_text()

        assert distributed.first_rank_first(work) == "by the first"

        def fail() -> None:
            raise UserError("the first has failed")

        with pytest.raises(UserError, match="the first has failed"):
            distributed.first_rank_first(fail)


@pytest.mark.long
def test_collectives(tmp_path):
    spawn(in_processes, str(tmp_path), processes=3)


@pytest.mark.parametrize(("share", "tried", "smaller"), [(64, 64, 32), (100, 25, 10), (7, 7, 1), (12, 12, 6)])
def test_the_batch_proposed_for_want_of_memory_divides_the_share(share, tried, smaller):
    assert smaller_batch(share, tried) == smaller
    assert split_batch(2 * share, smaller, 2) == (smaller, share // smaller)
