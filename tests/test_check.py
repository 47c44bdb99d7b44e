"""`dino-sparo check`: what it counts, what it measures, and what it warns of."""

import json
import logging
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from dino_sparo.__main__ import main
from dino_sparo.check import measure, plan, program
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.data import workers
from dino_sparo.data.loader import Crops
from dino_sparo.models import DINOHead, DinoModel, build_encoder
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.training.schedules import Hyperparameters
from tests.tiny import TINY, build_state, tiny_options, write_pictures

ARGUMENTS = [f"--{key}={value}" for key, value in TINY.items()]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(program, "LOADING_SECONDS", 0.05)
    logging.getLogger("dino_sparo").handlers.clear()


@pytest.fixture
def data(tmp_path):
    write_pictures(tmp_path / "data", 24, classes=2)
    shutil.copytree(tmp_path / "data" / "train", tmp_path / "data" / "val")
    return tmp_path / "data"


def checked(data, *arguments: str, status: int, capsys) -> dict:
    given = {argument.split("=")[0] for argument in arguments}
    defaults = [argument for argument in ARGUMENTS if argument.split("=")[0] not in given]
    looks = [f"--{look}" for look in ("measure", "scan") if f"--{look}" not in given]
    command = ["check", "--config", "demo", f"--data.path={data}", *defaults, "--json", *looks, *arguments]
    assert main(command) == status
    return json.loads(capsys.readouterr().out)


def test_a_healthy_run(data, capsys):
    report = checked(data, "--nproc=2", "--machine.batch_size_per_gpu=1", status=0, capsys=capsys)
    assert report["problems"] == []
    run = report["run"]
    assert (run["images"], run["steps_per_epoch"], run["steps"]) == (24, 6, 18)
    assert (run["processes"], run["batch_size_per_gpu"], run["accumulation"]) == (2, 1, 2)
    assert run["hours"] == pytest.approx(3 * 24 / run["images_per_second"] / 3600)
    assert report["data"]["val_in_train"]["images"] == 24
    assert report["remarks"] == [
        "no k-NN while training: monitor.knn_path can name a labeled folder",
        "24 of 24 images of val are in train too: k-NN and linear probe may come out up to 100.00 points "
        "too high",
    ]
    assert 0 < report["step"]["loss"] < 20


def test_parameters_flops_and_checkpoint_are_those_of_the_run(data, tmp_path, capsys):
    report = checked(data, status=0, capsys=capsys)
    options = tiny_options(data, tmp_path / "run")
    pretrain(options)
    state = load_latest(tmp_path / "run")
    sizes = {
        part: sum(v.numel() for k, v in state["student"].items() if k.startswith(part))
        for part in ("encoder", "encoder.readout", "head")
    }
    sizes["readout"] = sizes.pop("encoder.readout")
    assert report["parameters"] == sizes
    written = (tmp_path / "run" / "checkpoints" / "step_000000018.pt").stat().st_size
    # A file of so small a model is mostly names and headers; the tensors are counted to the byte.
    tensors = [state["center"], state["skipped"], *state["student"].values(), *state["teacher"].values()]
    tensors += [t for entry in state["optimizer"]["state"].values() for t in entry.values()]
    assert report["checkpoint_bytes"] == sum(t.nbytes for t in tensors) < written


def test_flops_of_a_vision_transformer_are_the_published_ones():
    """ViT-S/16 at 224 has 4.6 G multiply-adds (DINO, table 1)."""
    encoder = build_encoder(readout="cls")
    model = DinoModel(encoder, DINOHead(384, num_prototypes=16))
    flops = measure.count_flops(model, [(2, 224), (0, 0)])
    assert flops["encoder"] == pytest.approx(2 * 4.6e9, rel=0.01)
    assert flops["training"] == pytest.approx(2 * (3 + 1) * flops["encoder"], rel=0.05)


def test_bad_images_are_problems_unless_others_stand_in(data, capsys):
    (data / "train" / "class0" / "000.png").write_bytes(b"")
    report = checked(data, "--data.on_bad_image=stop", status=1, capsys=capsys)
    assert report["data"]["train"]["problems"]["zero_byte"]["count"] == 1
    (problem,) = report["problems"]
    assert problem.startswith("1 image of train cannot be read: repair or remove them, or set data.on_bad")
    assert not checked(data, "--data.on_bad_image=substitute", status=0, capsys=capsys)["problems"]


def test_a_class_of_val_that_train_lacks_is_a_problem(data, capsys):
    (data / "val" / "class0").rename(data / "val" / "other")
    with_knn = checked(data, "--monitor.knn_every_epochs=1", status=1, capsys=capsys)
    assert with_knn["problems"] == ["1 class of val not in train"]
    without = checked(data, status=0, capsys=capsys)
    assert "1 class of val not in train" in without["remarks"]


def test_without_val_nothing_is_said_of_it(data, capsys):
    shutil.rmtree(data / "val")
    report = checked(data, "--monitor.knn_every_epochs=1", status=0, capsys=capsys)
    assert report["data"]["val"] is None and report["data"]["train"]["images"] == 24
    assert report["remarks"] == []


def test_without_a_scan_nothing_is_said_about_files(data, capsys):
    (data / "val" / "class0" / "000.png").write_bytes(b"")
    report = checked(data, "--scan=false", "--measure=false", status=0, capsys=capsys)
    assert "data" not in report and "step" not in report and report["parameters"]["head"] > 0
    assert report["remarks"][1:] == ["files not read: --scan", "speed not measured: --measure"]
    report = checked(data, status=0, capsys=capsys)
    assert "1 image of val cannot be read: repair or remove them" in report["remarks"]


def with_speeds(monkeypatch, *, loader: float, step: float) -> None:
    """The real measurements, but with these speeds in images a second."""
    load, steps = program.measure_loading, program.measure_steps
    monkeypatch.setattr(
        program, "measure_loading", lambda *a, **k: replace(load(*a, **k), images_per_second=loader)
    )
    monkeypatch.setattr(
        program, "measure_steps", lambda *a, **k: replace(steps(*a, **k), images_per_second=step)
    )


@pytest.mark.parametrize(
    ("workers", "loader", "step", "limited_by", "speed"),
    [(1, 40.0, 100.0, "loader", 40.0), (1, 100.0, 40.0, "network", 40.0), (0, 60.0, 30.0, "network", 20.0)],
)
def test_the_slower_one_limits_the_run(data, capsys, monkeypatch, workers, loader, step, limited_by, speed):
    with_speeds(monkeypatch, loader=loader, step=step)
    changes = [f"--machine.num_workers={workers}", "--log.keep_every_epochs=1"]
    report = checked(data, *changes, "--machine.batch_size_per_gpu=2", status=0, capsys=capsys)
    run = report["run"]
    assert (run["limited_by"], run["images_per_second"]) == (limited_by, pytest.approx(speed))
    assert run["hours"] == pytest.approx(72 / speed / 3600)
    # The last two, the one being written, and three to keep.
    assert run["disk_bytes"] == 6 * report["checkpoint_bytes"]
    # Two batches a worker of two images, with two crops of 16 and two of 8 pixels.
    assert run["prefetched_bytes"] == workers * 2 * 2 * 3 * (2 * 16**2 + 2 * 8**2)
    assert (report["loader"]["worker_bytes"] > 2**20) == (workers > 0)
    assert run["memory_bytes"] > run["prefetched_bytes"] + workers * report["loader"]["worker_bytes"]


def test_speeds_are_images_over_time(data, tmp_path, monkeypatch):
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
    state = build_state(tiny_options(data, tmp_path / "run"), torch.device("cpu"))
    crops = Crops(torch.zeros(2, 3, 3, 16, 16, dtype=torch.uint8), torch.zeros(0, 3, 3, 8, 8))
    measured = measure.measure_steps(
        state,
        crops,
        [],
        5,
        Hyperparameters(0.1, 0.1, 0.9, 0.04, False),
        steps=4,
        clip_norm=3.0,
        precision="fp32",
        device=torch.device("cpu"),
    )
    assert (measured.images_per_second, measured.batch_size) == (4 * 5 / 4.0, 5)


def test_full_disk_and_memory_are_problems(data, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage(1, 1, 100))
    monkeypatch.setattr(plan, "shared_memory_free", lambda: 10**9)
    monkeypatch.setattr(plan, "check_shared_memory", lambda _: None)
    (problem,) = checked(data, "--machine.num_workers=1", status=1, capsys=capsys)["problems"]
    assert "checkpoints need" in problem
    monkeypatch.undo()
    monkeypatch.setattr(program, "LOADING_SECONDS", 0.05)
    monkeypatch.setattr(program, "memory_free", lambda: 100)
    (problem,) = checked(data, "--machine.num_workers=1", status=1, capsys=capsys)["problems"]
    assert problem.startswith("loading needs")


def test_small_shared_memory_is_a_problem_and_nothing_is_measured(data, capsys, monkeypatch):
    monkeypatch.setattr(workers, "shared_memory_free", lambda: 1000)
    monkeypatch.setattr(program, "measured", lambda *_: pytest.fail("measured"))
    (problem,) = checked(data, "--machine.num_workers=2", status=1, capsys=capsys)["problems"]
    assert problem.startswith("prefetched views need up to") and "docker run --shm-size" in problem


def test_nothing_readable_is_reported_with_the_scan(data, capsys):
    for path in (data / "train").rglob("*.png"):
        path.write_bytes(b"")
    report = checked(data, status=1, capsys=capsys)
    assert report["data"]["train"]["readable"] == 0
    assert report["problems"][0].startswith("24 images of train cannot be read")
    assert "step" not in report


def test_more_than_one_bad_image_in_a_hundred_is_a_problem_though_others_stand_in(data, capsys):
    for number in ("000", "002"):
        (data / "train" / "class0" / f"{number}.png").write_bytes(b"")
    (problem,) = checked(data, "--data.on_bad_image=substitute", status=1, capsys=capsys)["problems"]
    assert problem.startswith("2 of 24 images of train cannot be read, more than one in a hundred")


def test_a_folder_that_pretrain_would_refuse_is_refused(data, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    arguments = ["check", "--config", "demo", f"--data.path={data}", *ARGUMENTS]
    assert main([*arguments, f"--run_dir={tmp_path / 'other'}"]) == 1
    assert "PROBLEM: run_dir" in (shown := capsys.readouterr().out) and "is no run folder" in shown


def test_torchrun_is_refused(data, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["check", "--config", "demo", f"--data.path={data}"]) == 2
    assert "check runs in one process" in capsys.readouterr().err


def test_a_batch_that_does_not_fit_is_halved_until_it_does(data, capsys, monkeypatch):
    original, tried = program.measure_steps, []

    def small_gpu(state, crops, recipes, batch_size, *args, **kwargs):
        tried.append(batch_size)
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        measured = original(state, crops, recipes, batch_size, *args, **kwargs)
        return replace(measured, memory_gib=70.0, gpu_memory_gib=79.0)

    monkeypatch.setattr(program, "measure_steps", small_gpu)
    (problem,) = checked(data, status=1, capsys=capsys)["problems"]
    assert tried == [4, 2, 1]
    assert problem == "4 images at once do not fit into the GPU's memory: give machine.batch_size_per_gpu 1"


def test_text_says_all_of_it_and_nothing_is_written(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["check", "--config", "demo", f"--data.path={data}", *ARGUMENTS, "--measure", "--scan"]) == 0
    shown = capsys.readouterr().out
    for words in (
        *("train: 24 images, all readable", "val images that are in train too: 24", "M parameters"),
        *("GFLOPs per image", "ln K is 2.77", "images/s with", "images at once", "4 images: 1 x 4"),
        *("18 in all", "minutes for 3 epochs", "MiB each", "of prefetched views", "limit "),
        "no problems found",
    ):
        assert words in shown, words
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistake_in_the_plan_is_answered_before_anything_is_measured(data, capsys):
    assert main(["check", "--config", "demo", f"--data.path={data}", *ARGUMENTS, "--nproc=3"]) == 2
    assert "not divisible by 3 processes" in capsys.readouterr().err
