"""`dino-sparo check`: what it counts, what it measures, and what it warns of."""

import json
import logging
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

from dino_sparo import check as program
from dino_sparo import measure
from dino_sparo.__main__ import main
from dino_sparo.models import DINOHead, DinoModel, build_encoder
from dino_sparo.training.checkpoint import load_latest
from dino_sparo.training.pretrain import pretrain
from tests.tiny import TINY, tiny_options, write_pictures

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
    command = ["check", "--config", "demo", f"--data.path={data}", *defaults, "--json", *arguments]
    assert main(command) == status
    return json.loads(capsys.readouterr().out)


def test_a_healthy_run(data, capsys):
    report = checked(data, "--nproc=2", "--machine.batch_size_per_gpu=1", status=0, capsys=capsys)
    assert report["problems"] == []
    run = report["run"]
    assert (run["images"], run["steps_per_epoch"], run["steps"]) == (24, 6, 18)
    assert (run["processes"], run["batch_size_per_gpu"], run["accumulation"]) == (2, 1, 2)
    slower = min(report["loader"]["images_per_second"], report["step"]["images_per_second"])
    assert run["images_per_second"] == slower
    assert run["limited_by"] in ("loader", "network")
    assert run["hours"] == pytest.approx(3 * 24 / slower / 3600)
    assert report["data"]["val_in_train"]["images"] == 24
    assert report["remarks"] == [
        "24 of 24 images of val are in train too: k-NN and linear probe may come out up to 100.00 points "
        "too high"
    ]
    assert 0 < report["step"]["loss"] < 20


def test_parameters_flops_and_checkpoint_are_those_of_the_run(data, tmp_path, capsys):
    report = checked(data, status=0, capsys=capsys)
    options = tiny_options(data, tmp_path / "run")
    pretrain(options)
    state = load_latest(tmp_path / "run")
    sizes = {
        part: sum(v.numel() for k, v in state["student"].items() if k.startswith(part))
        for part in ("encoder", "head")
    }
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
    assert problem.startswith("1 images of train cannot be read: repair or remove them or set data.on_bad")
    assert not checked(data, "--data.on_bad_image=substitute", status=0, capsys=capsys)["problems"]


def test_a_class_of_val_that_train_lacks_is_a_problem(data, capsys):
    (data / "val" / "class0").rename(data / "val" / "other")
    assert checked(data, status=1, capsys=capsys)["problems"] == ["1 classes of val are not in train"]


def test_without_val_nothing_is_said_of_it(data, capsys):
    shutil.rmtree(data / "val")
    report = checked(data, status=0, capsys=capsys)
    assert report["data"]["val"] is None and report["data"]["train"]["images"] == 24
    assert report["remarks"] == []


def test_without_a_scan_nothing_is_said_about_files(data, capsys):
    (data / "val" / "class0" / "000.png").write_bytes(b"")
    assert "data" not in checked(data, "--scan=false", status=0, capsys=capsys)
    assert checked(data, status=1, capsys=capsys)["problems"] == [
        "1 images of val cannot be read: repair or remove them"
    ]


def test_full_disk_and_small_shared_memory_are_problems(data, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(program.shutil, "disk_usage", lambda _: usage(1, 1, 100))
    problems = checked(data, "--machine.num_workers=2", status=1, capsys=capsys)["problems"]
    assert len(problems) == 2
    assert "checkpoints need" in problems[0] and "prefetched batches need" in problems[1]


def test_a_batch_that_does_not_fit_is_halved_until_it_does(data, capsys, monkeypatch):
    original, tried = program.measure_steps, []

    def small_gpu(state, crops, batch_size, *args, **kwargs):
        tried.append(batch_size)
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        measured = original(state, crops, batch_size, *args, **kwargs)
        return replace(measured, memory_gib=70.0, gpu_memory_gib=79.0)

    monkeypatch.setattr(program, "measure_steps", small_gpu)
    (problem,) = checked(data, status=1, capsys=capsys)["problems"]
    assert tried == [4, 2, 1]
    assert problem == "4 images at once do not fit into the GPU's memory: give machine.batch_size_per_gpu 1"


def test_text_says_all_of_it_and_nothing_is_written(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["check", "--config", "demo", f"--data.path={data}", *ARGUMENTS]) == 0
    shown = capsys.readouterr().out
    for words in (
        *("train: 24 images, all readable", "val images that are in train too: 24", "M parameters"),
        *("GFLOPs an image", "ln K is 2.77", "images/s with", "images at once", "4 images: 1 x 4"),
        *("18 in all", "hours for 3 epochs", "GiB a checkpoint", "of prefetched views", "limit "),
        "nothing is in the way",
    ):
        assert words in shown, words
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistake_in_the_plan_is_answered_before_anything_is_measured(data, capsys):
    assert main(["check", "--config", "demo", f"--data.path={data}", *ARGUMENTS, "--nproc=3"]) == 2
    assert "not divisible by 3 processes" in capsys.readouterr().err
