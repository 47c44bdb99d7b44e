"""The benchmark, without assertions about time."""

import copy
import json
import runpy
from contextlib import nullcontext
from functools import partial
from itertools import repeat
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from timm.models.vision_transformer import Block
from torch.autograd import DeviceType

from dino_sparo.__main__ import main
from dino_sparo.bench import loading
from dino_sparo.bench.loading import HEIGHT, WIDTH, end_to_end, jpeg_files
from dino_sparo.bench.plain import (
    PlainViews,
    direct_sparo,
    plain_batches,
    plain_state,
    plain_step,
)
from dino_sparo.bench.timing import HOST_WAITS, host_waits, profiled, range_seconds, spread, spread_of_ratios
from dino_sparo.bench.training import published_peak
from dino_sparo.check import measure
from dino_sparo.data.images import normalize
from dino_sparo.data.loader import CropsDataset
from dino_sparo.data.sources import open_images
from dino_sparo.data.views import crop_kinds
from dino_sparo.evaluation.search import nearest
from dino_sparo.models import DINOHead, DinoModel, Sparo, build_encoder
from dino_sparo.models.cost import bytes_saved_for_backward
from dino_sparo.training.loss import DINOLoss
from dino_sparo.training.pretrain import train_step
from dino_sparo.training.schedules import Hyperparameters
from dino_sparo.training.state import state_of
from tests.recipes import content
from tests.slurm import ROOT
from tests.test_trajectory import KEY_BIAS_TOLERANCE, TOLERANCE
from tests.tiny import tiny_options, write_pictures

CPU = torch.device("cpu")
CLIP_NORM = 0.05  # small, so that it clips some gradients and leaves others
SLOTS = {"num_slots": 4, "slot_dim": 8, "key_dim": 8, "group_size": 2}
RANGES = [
    *("teacher forward", "student forward", "loss", "backward", "gradient averaging"),
    *("gradient clipping", "optimizer", "teacher update"),
]


def new_state(readout: str, device=CPU):
    """The initial state of a small run, the same in every call."""
    torch.manual_seed(0)
    networks = []
    for _ in range(2):
        options = SLOTS if readout == "sparo" else {}
        arch = {"width": 48, "depth": 4, "num_heads": 3}
        encoder = build_encoder(arch, 16, 96, readout, **options)
        networks.append(DinoModel(encoder, DINOHead(encoder.embed_dim, 256, 64, 16)))
    return state_of(*networks, DINOLoss(256), device, loss_scaling=False)


def hyperparameters(step: int) -> Hyperparameters:
    return Hyperparameters(
        lr=0.0001, weight_decay=0.1, momentum=0.9, teacher_temp=0.04, freeze_last_layer=step == 0
    )


def crops(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(n, 2, 3, side, side, generator=generator) for n, side in ((2, 96), (3, 48))]


ARGUMENTS_OF_STEP = {"clip_norm": CLIP_NORM, "autocast": nullcontext()}


def seconds_of_ranges(device, calls: int) -> tuple[list, dict[str, float]]:
    """Events and seconds of the last of several profiles of the training step."""
    state, groups = new_state("sparo", device), [group.to(device) for group in crops(0)]
    step = partial(train_step, state, repeat(groups), 1, hyperparameters(1), **ARGUMENTS_OF_STEP)
    for _ in range(calls):
        events = profiled(step, 2, device)
    return events, range_seconds(events, device.type)


@pytest.mark.parametrize("readout", ["sparo", "cls", "gap"])
def test_two_plain_steps_equal_ours(readout):
    ours, same = new_state(readout), new_state(readout)
    of_loss = {"student_temp": same.loss_fn.student_temp, "center_momentum": same.loss_fn.center_momentum}
    plain = plain_state(same.student, same.teacher, same.loss_fn.center, **of_loss, loss_scaling=False)
    initial = copy.deepcopy(ours.student.state_dict())
    for step in range(2):
        output = train_step(ours, repeat(crops(step)), 1, hyperparameters(step), **ARGUMENTS_OF_STEP)
        numbers = {k: v for k, v in vars(hyperparameters(step)).items() if k != "freeze_backbone"}
        loss = plain_step(plain, crops(step), **numbers, **ARGUMENTS_OF_STEP)
        assert loss == pytest.approx(output.loss.item(), rel=TOLERANCE)
        assert (output.gradient_norms > CLIP_NORM).any() and (output.gradient_norms < CLIP_NORM).any()
    torch.testing.assert_close(plain.center, ours.loss_fn.center, atol=TOLERANCE, rtol=0)
    for who in ("student", "teacher"):
        expected = getattr(ours, who).state_dict()
        for name, value in getattr(plain, who).state_dict().items():
            error = (value - expected[name]).abs()
            if name.endswith("qkv.bias"):  # the true gradient of the key bias is zero
                key = slice(len(error) // 3, 2 * len(error) // 3)
                assert error[key].max() < KEY_BIAS_TOLERANCE
                error[key] = 0
            assert error.max() <= TOLERANCE, (who, name)
    moved = ours.student.state_dict()["encoder.backbone.pos_embed"] - initial["encoder.backbone.pos_embed"]
    assert moved.abs().max() > 10 * TOLERANCE


def test_ranges_of_the_real_step_and_its_waits():
    events, seconds = seconds_of_ranges(CPU, 1)
    assert list(seconds) == RANGES and all(value > 0 for value in seconds.values())
    whole = sum(event.time_range.elapsed_us() for event in events if event.name == "training step") / 1e6
    assert sum(seconds.values()) < whole
    assert not [name for name, count in host_waits(events).items() if count and name.startswith("cuda")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ranges_of_the_real_step_on_a_gpu():
    _, seconds = seconds_of_ranges(torch.device("cuda"), 3)
    assert list(seconds) == RANGES and all(value > 0 for value in seconds.values())


def test_on_a_gpu_a_range_takes_what_the_kernels_launched_within_it_take():
    def event(name, start, end, *kernels, annotation=False, device=DeviceType.CPU):
        return SimpleNamespace(
            name=name,
            device_type=device,
            is_user_annotation=annotation,
            cpu_parent=SimpleNamespace(name="training step") if annotation else None,
            time_range=SimpleNamespace(start=start, end=end),
            kernels=[SimpleNamespace(duration=duration) for duration in kernels],
        )

    events = [
        event("forward", 0, 10, 999, annotation=True),
        event("backward", 10, 20, annotation=True),
        event("Optimizer.step#AdamW.step", 20, 30, annotation=True),
        event("aten::mm", 1, 2, 5, 6),
        event("aten::mm", 12, 13, 7),  # in a thread of autograd
        event("aten::mm", 21, 22, 8),
        event("a kernel", 11, 40, device=DeviceType.CUDA),
    ]
    assert range_seconds(events, "cuda") == pytest.approx({"forward": 11e-6, "backward": 7e-6})


def test_plain_views_without_chance_are_those_of_training(tmp_path):
    write_pictures(tmp_path, 3)
    source = open_images(str(tmp_path))
    certain = dict.fromkeys(("blur_probability", "solarize_probability"), (1.0, 1.0, 1.0))
    certain |= {"global_scale": (1.0, 1.0), "local_scale": (1.0, 1.0), "blur_radius": (1.0, 1.0)}
    certain |= {"flip_probability": 1.0, "grayscale_probability": 1.0, "jitter_probability": 0.0}
    sizes = {"global_size": 16, "local_size": 8, "num_local_crops": 2}
    recipes = crop_kinds(**(content("demo")["views"] | sizes | certain))
    plain = PlainViews(source, recipes)
    ours = CropsDataset(source, recipes, seed=5)
    for mine, theirs in zip(plain[2], ours[0, 2].made, strict=True):
        torch.testing.assert_close(mine, normalize(theirs), atol=1e-5, rtol=0)
    batches = plain_batches(plain, batch_size=2, num_workers=0, prefetch_batches=2, device=CPU)
    for _ in range(3):  # more than an epoch
        assert [group.shape for group in next(batches)] == [(2, 2, 3, 16, 16), (2, 2, 3, 8, 8)]


def test_files_get_the_usual_area_and_keep_their_shape(tmp_path):
    for name in ("data", "encoded", "generated"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (30, 90)).save(tmp_path / "data" / "a.png")
    Image.new("RGB", (50, 50)).save(tmp_path / "data" / "b.png")
    encoded = jpeg_files(open_images(str(tmp_path / "data")), 3, tmp_path / "encoded")
    sizes = [encoded.load(number).size for number in range(3)]
    assert sizes == [(250, 750), (433, 433), (250, 750)]
    assert encoded.read(0)[:2] == b"\xff\xd8"
    generated = jpeg_files(None, 2, tmp_path / "generated")
    assert [generated.load(number).size for number in range(2)] == [(WIDTH, HEIGHT)] * 2
    assert generated.read(0) != generated.read(1) and len(generated.read(0)) > 40_000


def test_spreads():
    found = spread([0.1, 0.3, 0.2], images=4)
    assert found == pytest.approx({"median_ms": 200, "p10_ms": 120, "p90_ms": 280, "images_per_second": 20})
    ratios = spread_of_ratios([2.0, 6.0, 1.0], [1.0, 2.0, 1.0])
    assert ratios == pytest.approx({"median": 2, "p10": 1.2, "p90": 2.8})


def test_time_end_to_end_is_shared_between_data_and_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loading, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    taken = []

    def batches():
        while True:
            now[0] += 1.0
            taken.append(len(taken))
            yield [torch.zeros(1)]

    def step(_groups):
        now[0] += 3.0

    endless = batches()
    found = end_to_end(endless, step, prefetched=5, batch_size=8, seconds=10, device=CPU)
    assert found == {"images_per_second": 2.0, "data_wait_share": 0.25, "seconds": 12.0, "steps": 3}
    assert len(taken) == 5 + 2 + 3 and not list(endless)  # it has been closed


def test_host_waits_are_counted_within_steps():
    numbers = torch.ones(3)
    events = profiled(lambda: (numbers.sum().item(), numbers[0].item()), 3, CPU)
    assert host_waits(events) == dict.fromkeys(HOST_WAITS, 0) | {"aten::_local_scalar_dense": 2}
    assert not any(host_waits(profiled(numbers.sum, 2, CPU)).values())


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Some GPU", None)]
)
def test_published_peak_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert published_peak(torch.device("cuda", 0), "bf16") == peak
    assert published_peak(torch.device("cuda", 0), "fp32") is None


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A tiny recipe as a file."""
    options = tiny_options("x", "y").as_dict()
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump({key: options[key] for key in content()}))
    return str(path)


@pytest.fixture
def few_products(monkeypatch):
    monkeypatch.setattr(measure, "MATRIX_SIDE", {"cpu": 32})


ARGUMENTS = ("--batch_size=2", "--rounds=2", "--num_images=2", "--seconds=0.01", "--device=cpu")
STAGES = ["read", "decode", "decode to tensor", "draw views", "views by PIL", "views on the device"]
STAGES += [*RANGES, "whole step"]


@pytest.mark.long
@pytest.mark.usefixtures("few_products")
def test_json_has_all_that_was_measured(recipe, capfd):
    arguments = [f"--config={recipe}", *ARGUMENTS, "--compare", "--json"]
    assert main(["bench", *arguments, "--num_workers=1"]) == 0
    said, table = capfd.readouterr()
    result = json.loads(said)
    assert (result["recipe"], result["precision"], result["device_type"]) == (recipe, "fp32", "cpu")
    assert (result["batch_size"], result["rounds"], result["num_workers"]) == (2, 2, 1)
    assert "2 images, generated pictures as JPEG of 500x375" in result["data"]
    assert set(STAGES) <= set(result["stages"])
    for found in result["stages"].values():
        assert 0 < found["p10_ms"] <= found["median_ms"] <= found["p90_ms"]
    assert all(number > 0 for number in result["end_to_end"].values())
    assert result["flops_per_image"] > 0 and result["peak_flops"]["published"] is None
    expected = result["stages"]["whole step"]["images_per_second"] * result["flops_per_image"]
    utilization, peak = result["utilization"], result["peak_flops"]["measured"]
    assert utilization["step"]["measured"] == pytest.approx(expected / peak)
    assert set(utilization["end_to_end"]) == {"measured"}
    compared = result["compare"]
    assert all(number > 0 for number in compared["plain_end_to_end"].values())
    assert compared["end_to_end"] > 0 and set(compared["step"]) == {"median", "p10", "p90"}
    saved = [result["memory"][who]["saved_bytes"] for who in ("plain", "ours")]
    assert compared["memory"] == {"saved_bytes": pytest.approx(saved[0] / saved[1])}
    assert set(result["host_waits_per_step"]) == set(HOST_WAITS)
    for part in ("whole step", "plain / ours, whole step", "waiting for data", "saved for backward"):
        assert part in table


@pytest.mark.long
@pytest.mark.usefixtures("few_products")
def test_table_of_own_files(recipe, tmp_path, capfd):
    write_pictures(tmp_path, 3)
    files = [f"--data.path={tmp_path}", "--num_images=3", "--seconds=null"]
    rest = [argument for argument in ARGUMENTS if not argument.startswith(("--num_images", "--seconds"))]
    assert main(["bench", f"--config={recipe}", *rest, *files]) == 0
    said = capfd.readouterr().out
    assert f"3 images, {tmp_path} as JPEG of 500x375" in said
    assert "end to end" not in said and "plain" not in said
    for stage in STAGES:
        assert stage in said


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--rounds=0"], "rounds"),
        (["--data.path=/nowhere"], "data.path '/nowhere'"),
        (["--data.path=.", "--data.train=none"], "data.train 'none'"),
    ],
)
def test_mistakes_are_told_in_one_sentence(wrong, message, tmp_path, monkeypatch, capfd):
    write_pictures(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *wrong]) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dino-sparo: error")]
    assert len(told) == 1 and message in told[0]


def test_the_script_that_times_evaluations(capsys):
    names = runpy.run_path(str(ROOT / "eval" / "speed.py"))
    names["main"].__globals__.update(NUM_TRAIN=300, NUM_TEST=100, NUM_IMAGES=128, WIDTH=8)
    train, test = torch.randn(300, 8), torch.randn(100, 8)
    assert torch.equal(names["official_search"](train, test), nearest(train, test, 20)[1])
    names["main"](1)
    rows = [line for line in capsys.readouterr().out.splitlines() if " / " in line]
    pairs = ["this / official", "faiss / official", "products / official"] * 2
    pairs += ["one / plain", "nine / one"] * 3 + ["this / Pillow"]
    assert [row.split("|")[2].strip() for row in rows] == pairs
    assert all(float(row.split("|")[5].split()[0]) > 0 for row in rows)


def test_bytes_saved_are_below_those_of_the_block_and_of_the_direct_form():
    sparo, block = Sparo(384), Block(384, 6, qkv_bias=True)
    tokens = torch.randn(2, 197, 384, requires_grad=True)
    ours = bytes_saved_for_backward(sparo, tokens)
    assert 5 * ours < bytes_saved_for_backward(block, tokens)
    assert 5 * ours < bytes_saved_for_backward(lambda x: direct_sparo(sparo, x), tokens)
    left, right = (torch.randn(10, 10, requires_grad=True) for _ in range(2))
    assert bytes_saved_for_backward(lambda x: x @ right, left) == 2 * 400


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["readout", "--batch_size=1", "--num_tokens=5"], "SPARO, direct"),
    ],
)
def test_parts_alone(arguments, said, capsys):
    assert main(["bench", "--what", *arguments, "--rounds=1", "--device=cpu"]) == 0
    assert said in capsys.readouterr().out
