"""`dino-sparo check`: counts, measurements, problems, and remarks."""

import json
import logging
import re
import shutil

import pytest
import torch
from PIL import Image

from dino_sparo.__main__ import main
from dino_sparo.check import measure, program
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.data import workers
from dino_sparo.data.loader import Crops
from dino_sparo.models import DINOHead, DinoModel, build_encoder
from dino_sparo.models.cost import encoder_cost
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.training import setup
from dino_sparo.training.schedules import Hyperparameters
from tests.tiny import TINY, build_state, tiny_options, write_pictures

ARGUMENTS = {f"--{key}": value for key, value in TINY.items()}
NOISE, TURNED = Image.effect_noise((40, 30), 99), Image.Exif()
TURNED[0x0112] = 6


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(program, "LOADING_SECONDS", 0.05)
    monkeypatch.setattr(measure, "MATRIX_SIDE", {"cpu": 32})
    monkeypatch.setattr(setup, "FEW_STEPS", 1)  # for all but one test
    logging.getLogger("dino_sparo").handlers.clear()


@pytest.fixture
def checked(data, capsys):
    def check(*arguments: str, status: int = 0, look=("--measure", "--scan")) -> dict:
        given = ARGUMENTS | dict(argument.split("=") for argument in arguments)
        options = [f"{key}={value}" for key, value in given.items()]
        assert main(["check", "--config=demo", f"--data.path={data}", "--json", *look, *options]) == status
        return json.loads(capsys.readouterr().out)

    return check


def test_a_healthy_run(checked):
    report = checked("--nproc=2", "--machine.batch_size_per_gpu=1")
    assert report["problems"] == []
    run = report["run"]
    assert (run["images"], run["steps_per_epoch"], run["steps"]) == (24, 6, 18)
    assert (run["processes"], run["batch_size_per_gpu"], run["accumulation"]) == (2, 1, 2)
    assert run["hours"] == pytest.approx(3 * 24 / run["images_per_second"] / 3600)
    assert report["data"]["val_in_train"]["images"] == 24
    assert report["remarks"] == [
        "no k-NN during training; set monitor.knn_path to a labeled folder",
        "the time is that of this machine's CPU; for GPUs that are not here: dino-sparo check --gpu h100 "
        "a100 ...",
        "24 of 24 images of val are in train too: accuracies of k-NN and linear probe may be up to 100.00 "
        "percentage points too high",
    ]
    assert 0 < report["step"]["loss"] < 20


def test_hours_are_those_of_the_steps_that_remain(checked, data, tmp_path):
    pretrain(tiny_options(data, tmp_path / "run", optim__epochs=2))
    report = checked(f"--run_dir={tmp_path / 'run'}", "--optim.epochs=2")
    assert report["run"]["hours"] == 0


def test_parameters_and_checkpoint_are_those_of_the_run(checked, data, tmp_path):
    report = checked(look=())
    pretrain(tiny_options(data, tmp_path / "run"))
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
    assert report["remarks"][1:] == [
        "image files were not read; --scan reads them",
        "speed and memory were not measured; --measure measures them",
    ]
    assert "data" not in report and "step" not in report


def test_flops_of_a_vision_transformer_are_the_published_ones():
    """ViT-S/16 at 224 has 4.6 G multiply-adds (DINO, table 1)."""
    encoder = build_encoder(readout="cls")
    model = DinoModel(encoder, DINOHead(384, num_prototypes=16))
    flops = encoder_cost(encoder, 224)["flops"]
    assert flops == pytest.approx(2 * 4.6e9, rel=0.01)
    assert measure.count_flops(model, [(2, 224), (0, 0)]) == pytest.approx(2 * (3 + 1) * flops, rel=0.05)


@pytest.mark.parametrize(
    ("bad", "on_bad_image", "is_problem"),
    [(1, "stop", True), (1, "substitute", False), (2, "substitute", True), (24, "stop", True)],
)
def test_bad_images_are_a_problem_unless_few_are_replaced(checked, data, bad, on_bad_image, is_problem):
    for path in sorted((data / "train").rglob("*.png"))[:bad]:
        path.write_bytes(b"")
    report = checked(f"--data.on_bad_image={on_bad_image}", status=int(is_problem))
    assert report["data"]["train"]["problems"]["zero_byte"]["count"] == bad
    says = f"images of train that cannot be read: {bad} of 24; repair or remove them, or"
    assert [problem.startswith(says) for problem in report["problems"]] == [True] * is_problem
    assert any(remark.startswith(says[:-4]) for remark in report["remarks"]) != is_problem
    assert ("step" in report) != is_problem  # nothing is measured that would not run


@pytest.mark.parametrize("knn_every_epochs", [0, 1])
def test_what_is_wrong_with_val_is_a_problem_if_training_reads_it(checked, data, knn_every_epochs):
    (data / "val" / "class0" / "000.png").write_bytes(b"")
    given = f"--monitor.knn_every_epochs={knn_every_epochs}"
    told = checked(given, status=knn_every_epochs, look=["--scan"])
    unread = "images of val that cannot be read: 1; repair or remove them"
    assert unread in told["problems" if knn_every_epochs else "remarks"]
    (data / "val" / "class0").rename(data / "val" / "other")
    told = checked(given, look=["--scan"])["remarks"]  # the run trains without k-NN
    assert unread in told and "classes of val that are not in train: 1" in told


@pytest.mark.parametrize("bad", [1, 2])
def test_bad_images_of_k_nn_are_a_problem_unless_few_are_left_out(checked, data, bad):
    for path in sorted((data / "val").rglob("*.png"))[:bad]:
        path.write_bytes(b"")
    options = ("--monitor.knn_every_epochs=1", "--data.on_bad_image=substitute")
    report = checked(*options, status=int(bad > 1), look=["--scan"])
    says = "images for k-NN during training that cannot be read: 2 of 48, more than 1 %"
    assert [problem.startswith(says) for problem in report["problems"]] == [True] * (bad > 1)


@pytest.mark.parametrize("layout", ["composed twins", "test of unknown classes"])
def test_classes_that_training_accepts_are_no_problem(checked, data, layout):
    if layout == "composed twins":
        (data / "train" / "class0").rename(data / "train" / "caf\u00e9")
        (data / "val" / "class0").rename(data / "val" / "cafe\u0301")
    else:
        shutil.rmtree(data / "val" / "class1")
        (data / "val" / "class0").rename(data / "val" / "unknown")
        (data / "val").rename(data / "test")
    report = checked("--monitor.knn_every_epochs=1", look=["--scan"])
    assert report["problems"] == [] and (report["data"]["val"] is None) == (layout != "composed twins")


def test_without_val_nothing_is_said_of_it(checked, data):
    shutil.rmtree(data / "val")
    report = checked("--monitor.knn_every_epochs=1")
    assert report["data"]["val"] is None and report["data"]["train"]["images"] == 24
    assert report["remarks"] == []


def test_advice_for_a_small_folder(checked, monkeypatch):
    monkeypatch.setattr(setup, "FEW_STEPS", 2000)
    remarks = checked("--head.num_prototypes=65536", look=[])["remarks"]
    assert remarks[1:3] == [
        "only 18 steps; thousands are usual; --optim.epochs 334 gives 2,000",
        "65,536 prototypes are more than the 24 images; --head.num_prototypes 256 fits them better",
    ]


def test_images_of_k_nn_are_not_limited_by_max_images(checked):
    remarks = checked("--data.max_images=16", "--monitor.knn_every_epochs=1", look=[])["remarks"]
    assert remarks[0] == (
        "k-NN during training uses 24 test and 24 train images; data.max_images does not limit them, "
        "monitor.knn_images_per_class does"
    )


@pytest.mark.parametrize(
    ("workers", "loader", "step", "limited_by", "speed"),
    [(1, 40.0, 100.0, "loader", 40.0), (1, 100.0, 40.0, "network", 40.0), (0, 60.0, 30.0, "network", 20.0)],
)
def test_the_slower_one_limits_the_run(checked, monkeypatch, workers, loader, step, limited_by, speed):
    load, steps = program.measure_loading, program.measure_steps

    def loading(*args, **kwargs):
        measured, batch = load(*args, **kwargs)
        return measured | {"images_per_second": loader}, batch

    monkeypatch.setattr(program, "measure_loading", loading)
    monkeypatch.setattr(
        program, "measure_steps", lambda *a, **k: steps(*a, **k) | {"images_per_second": step}
    )
    changes = [f"--machine.num_workers={workers}", "--log.keep_every_epochs=1"]
    report = checked(*changes, "--machine.batch_size_per_gpu=2", look=["--measure"])
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
    measured = measure.measure_steps(
        build_state(tiny_options(data, tmp_path / "run"), "cpu"),
        Crops(torch.zeros(2, 3, 3, 16, 16, dtype=torch.uint8), torch.zeros(0, 3, 3, 8, 8)),
        [],
        5,
        Hyperparameters(0.1, 0.1, 0.9, 0.04, False),
        steps=4,
        clip_norm=3.0,
        precision="fp32",
        device=torch.device("cpu"),
    )
    assert (measured["images_per_second"], measured["batch_size"]) == (4 * 5 / 4.0, 5)


def test_full_memory_is_a_problem(checked, monkeypatch):
    monkeypatch.setattr(program, "memory_free", lambda: 100)
    (problem,) = checked("--machine.num_workers=1", status=1, look=["--measure"])["problems"]
    assert problem.startswith("loading needs")


def test_small_shared_memory_is_a_problem_and_nothing_is_measured(checked, monkeypatch):
    monkeypatch.setattr(workers, "shared_memory_free", lambda: 1000)
    report = checked("--machine.num_workers=2", status=1, look=["--measure"])
    (problem,) = report["problems"]
    assert problem.startswith("prefetched views need up to") and "docker run --shm-size" in problem
    assert "step" not in report


def test_a_batch_that_does_not_fit_is_halved_until_it_does(checked, monkeypatch):
    original, tried = program.measure_steps, []

    def small_gpu(state, crops, recipes, batch_size, *args, **kwargs):
        tried.append(batch_size)
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        measured = original(state, crops, recipes, batch_size, *args, **kwargs)
        return measured | {"memory_gib": 70.0, "gpu_memory_gib": 79.0}

    monkeypatch.setattr(program, "measure_steps", small_gpu)
    (problem,) = checked(status=1, look=["--measure"])["problems"]
    assert tried == [4, 2, 1]
    assert problem == "4 images per GPU do not fit into its memory; set machine.batch_size_per_gpu to 1"


@pytest.mark.parametrize(
    ("change", "scan", "doubt"),
    [
        (lambda root: None, True, None),
        (lambda root: shutil.copytree(root / "train/class0", root / "extra"), False, "left out: extra (12"),
        (lambda root: shutil.copytree(root / "train", root / "test"), False, "not used: test"),
        (lambda root: (root / "train/class0/x.gif").touch(), False, "1 ending in .gif"),
        (lambda root: Image.new("L", (40, 30), 250).save(root / "train/class0/x.png"), True, "constant"),
        (lambda root: NOISE.save(root / "val/class0/x.jpg", exif=TURNED), True, "EXIF"),
        (lambda root: NOISE.save(root / "train/class0/x.tif", save_all=True, append_images=[NOISE]), True,
         "the first of several images in their file; the others are not read: 1 of 25"),
        (lambda root: shutil.move(root / "val", root / "cat") and shutil.move(root / "train", root / "x_val"),
         False, "taken as classes: x_val"),
    ],
)  # fmt: skip
def test_no_problems_are_found_only_where_nothing_is_odd(data, capsys, change, scan, doubt):
    shutil.rmtree(data / "val")
    write_pictures(data.parent / "val", 4, side=25, classes=2)
    (data.parent / "val/train").rename(data / "val")
    change(data)
    options = [f"{key}={value}" for key, value in ARGUMENTS.items()] + scan * ["--scan"]
    assert main(["check", "--config=demo", f"--data.path={data}", *options]) == 0
    shown = capsys.readouterr().out
    assert ("no problems found" in shown) == (doubt is None)
    assert doubt is None or re.search(rf"REMARK: .*{re.escape(doubt)}", shown)


def test_val_of_k_nn_is_compared_with_the_train_of_k_nn(checked, data, tmp_path):
    write_pictures(tmp_path / "birds", 24, classes=3)
    given = [f"--monitor.knn_path={tmp_path / 'birds'}", "--monitor.knn_every_epochs=1"]
    for name in ("class0", "class1", "class2"):
        (tmp_path / f"birds/train/{name}").rename(tmp_path / f"birds/train/bird_{name}")
    report = checked(*given, look=["--scan"])
    assert report["data"]["classes"]["only_in_val"]["count"] == 0
    assert report["data"]["classes"]["train"]["classes"] == 2 and report["data"]["val"]["images"] == 4
    next((tmp_path / "birds").glob("train/bird_class1/*")).write_bytes(b"no image")  # of those k-NN takes
    (problem,) = checked(*given, status=1, look=["--scan"])["problems"]
    assert problem.startswith("images for k-NN during training that cannot be read: 1 of 24")


@pytest.mark.parametrize("views", ["pil", "device"])
def test_text_says_all_of_it_and_nothing_is_written(data, tmp_path, capsys, monkeypatch, views):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    options = [f"{key}={value}" for key, value in (ARGUMENTS | {"--machine.views": views}).items()]
    assert main(["check", "--config=demo", f"--data.path={data}", "--measure", "--scan", *options]) == 0
    shown = capsys.readouterr().out
    for words in (
        *("train: 24 images, all readable", "val images that are also in train: 24", "M parameters"),
        *("GFLOPs per image", "ln K is 2.77", "images/s with", " s for ", "4 images: 1 x 4"),
        *("18 in total", "minutes for 3 epochs", "MiB each", "of prefetched views", "limited by the "),
        "nothing would end the run; see the remarks",  # as val is train
    ):
        assert words in " ".join(shown.split()), words
    assert sorted(tmp_path.rglob("*")) == before
