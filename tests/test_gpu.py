"""What needs a GPU: runs in every precision, runs that are bit-equal, and the evaluations."""

from functools import partial
from itertools import repeat

import numpy as np
import pytest
import torch

from dino_sparo.cli import evaluating
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.data import pil_views
from dino_sparo.data.color import blur_taps
from dino_sparo.data.device_views import Photos, ahead, collate_photos, make_crops, numbers_of, to_pixels
from dino_sparo.data.images import normalize, to_tensor
from dino_sparo.data.loader import PhotoBatch, crops_of
from dino_sparo.evaluation.results import read_results
from dino_sparo.evaluation.search import nearest
from dino_sparo.parallel.precision import autocast
from dino_sparo.runs.checkpoint import load_latest
from dino_sparo.runs.runlog import read_metrics
from dino_sparo.training.pretrain import train_step
from dino_sparo.training.setup import build_schedules
from dino_sparo.training.steps import Steps
from tests.pictures import photo, recipes, views_of
from tests.tiny import build_state, parse_options, state_hash, tiny_options, write_pictures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HEAD = {"head__hidden_dim": 512, "head__bottleneck_dim": 64}  # narrower ones overflow in half precision


def run(tmp_path, name, **changes):
    if not (tmp_path / "data").exists():
        write_pictures(tmp_path / "data", 60, classes=3)
    common = {"machine__device": "cuda", "monitor__knn_every_epochs": 1, **HEAD}
    options = tiny_options(tmp_path / "data", tmp_path / name, **(common | changes))
    pretrain(options)
    return load_latest(tmp_path / name)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_tiny_run(precision, tmp_path):
    state = run(tmp_path, "run", machine__precision=precision)
    assert state["step"] == 45
    entries = [entry for entry in read_metrics(tmp_path / "run") if "loss" in entry]
    assert all(entry["loss"] < 10 for entry in entries)
    assert all(value.dtype == torch.float32 for value in state["teacher"].values())
    assert entries[-1]["overflows"] < 15


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_runs_are_bit_equal(precision, tmp_path):
    changes = {"machine__deterministic": "true", "machine__precision": precision}
    try:
        hashes = {state_hash(run(tmp_path, name, **changes)) for name in ("one", "other")}
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(hashes) == 1


def test_views_of_whole_batches_are_pils():
    crop_kinds = recipes(224, 96)
    images = [photo(*((500, 375), (300, 420), (640, 200))[number % 3], seed=number) for number in range(40)]
    views = [views_of(image, crop_kinds, sample) for sample, image in enumerate(images)]
    photos = collate_photos(
        [
            (to_pixels(image), [numbers_of(view, 3) for view in row])
            for image, row in zip(images, views, strict=True)
        ]
    )
    device = torch.device("cuda", 0)
    made = ahead(
        [photos], lambda one: tuple(make_crops(one, [crop_kinds[:2], crop_kinds[2:]], device)), device
    )
    ((large, small),) = made
    for number, (image, row) in enumerate(zip(images, views, strict=True)):
        ours = [large[0, number], large[1, number], small[0, number], small[1, number]]
        for crop, view in zip(ours, row, strict=True):
            difference = (crop.cpu().int() - to_tensor(pil_views.execute(image, view)).int()).abs().float()
            assert difference.mean() < 1, (number, view)


def whole_images(crop_kinds, count):
    """A batch of images whose crops are still to be made, where the loader would put it."""
    images = [photo(*((64, 48), (40, 72))[number % 2], seed=number) for number in range(count)]
    taps = max(blur_taps(recipe.blur_radius[1]) for recipe in crop_kinds)
    photos = collate_photos(
        [
            (to_pixels(image), [numbers_of(view, taps) for view in views_of(image, crop_kinds, sample)])
            for sample, image in enumerate(images)
        ]
    )
    return PhotoBatch(Photos(*(values.pin_memory() for values in photos)))


def test_views_beside_the_training_come_in_order_and_whole():
    """What is made, slowly, in a stream of its own is used, slowly, in the one of the training."""
    device = torch.device("cuda", 0)
    training, streams = torch.cuda.current_stream(device), []

    def make(number):
        streams.append(torch.cuda.current_stream(device))
        values = torch.zeros(1 << 20, device=device)
        torch.cuda._sleep(5_000_000)  # cycles of the GPU, some milliseconds
        return values.fill_(number + 1), number

    copies, numbers, at_once = [], [], []
    for values, number in ahead(range(8), make, device):
        assert torch.cuda.current_stream(device) == training
        assert len(streams) == min(8, len(copies) + 2)  # one is made ahead
        at_once.append(values.clone())
        torch.cuda._sleep(20_000_000)  # meanwhile memory that is still needed could be given away
        copies.append(values.clone())
        numbers.append(number)
        del values
    assert numbers == list(range(8))
    for found in (at_once, copies):
        assert [(copy.min().item(), copy.max().item()) for copy in found] == [(n, n) for n in range(1, 9)]
    assert len(set(streams)) == 1 and streams[0] != training
    assert list(ahead([], make, device)) == []


def test_a_step_with_its_views_never_lets_the_host_wait(tmp_path):
    """With the host forbidden to."""
    options = tiny_options(
        tmp_path / "data", tmp_path / "run", machine__device="cuda", machine__precision="bf16", **HEAD
    )
    device = torch.device("cuda", 0)
    state = build_state(options, device)
    crop_kinds = recipes(16, 8)
    batch, hyper = whole_images(crop_kinds, 8), build_schedules(options.optim, options.loss, 10).at(15)
    made = ahead(repeat(batch), lambda one: crops_of(one, crop_kinds, device), device)
    groups = ([normalize(crops.global_crops), normalize(crops.local_crops)] for crops in made)

    of_state = partial(train_step, state, clip_norm=3.0, autocast=autocast("bf16", device))
    steps = Steps(of_state, device, 1, capture=False)

    def step():
        steps.take(groups, hyper, logged=True)

    for _ in range(3):  # which set things up
        step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "changes",
    [
        {"machine__precision": "bf16"},
        {"machine__precision": "fp16"},
        {"machine__precision": "fp32"},
        {"machine__precision": "bf16", "machine__batch_size_per_gpu": 1},
        {"machine__precision": "bf16", "machine__activation_checkpointing": "true"},
        {"machine__precision": "bf16", "optim__freeze_last_layer_epochs": 2},
    ],
)
def test_captured_steps_are_the_eager_ones(changes, tmp_path, caplog):
    """Bit for bit in deterministic runs: 45 steps with stochastic depth, all but the first ones captured."""
    changes |= {"machine__deterministic": "true"}
    try:
        hashes = {
            state_hash(run(tmp_path, capture, machine__capture=capture, **changes))
            for capture in ("false", "true")
        }
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(hashes) == 1
    assert "could not be captured" not in caplog.text
    entries = [read_metrics(tmp_path / name) for name in ("false", "true")]
    assert [entry["loss"] for entry in entries[0]] == [entry["loss"] for entry in entries[1]]


def test_captured_steps_are_near_the_eager_ones(tmp_path):
    changes = {"machine__precision": "fp32", "optim__epochs": 1, "optim__warmup_epochs": 0}
    eager = run(tmp_path, "eager", **changes)
    captured = run(tmp_path, "captured", machine__capture="true", **changes)
    for name, value in eager["student"].items():
        torch.testing.assert_close(captured["student"][name], value, rtol=1e-5, atol=1e-5)


def test_accumulation_is_near_the_whole_batch(tmp_path):
    common = {"model__drop_path_rate": 0.0, "machine__precision": "fp32"}
    whole = run(tmp_path, "whole", **common)
    parts = run(tmp_path, "parts", machine__batch_size_per_gpu=1, **common)
    torch.testing.assert_close(whole["center"], parts["center"], atol=1e-3, rtol=1e-3)


def test_search_on_a_gpu_finds_the_same_neighbors():
    rng = np.random.default_rng(0)
    train, test = (rng.normal(size=(number, 64)).astype(np.float16) for number in (5000, 300))
    on_cpu = nearest(train, test, 200, by_faiss=False)
    on_gpu = nearest(train, test, 200, device=torch.device("cuda", 0), train_chunk=700, test_chunk=90)
    torch.testing.assert_close(on_gpu[0], on_cpu[0], atol=1e-5, rtol=0)
    assert (on_gpu[1] == on_cpu[1]).float().mean() > 0.999  # but for cosines that differ in the last digit


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluations_on_a_gpu(tmp_path, precision):
    write_pictures(tmp_path / "data", 60, classes=3)
    run = tmp_path / "run"
    changes = {"machine__device": "cuda", "optim__epochs": 1, "optim__warmup_epochs": 0}
    pretrain(tiny_options(tmp_path / "data", run, **changes))
    common = [f"--run={run}", f"--data.path={tmp_path / 'data'}", "--num_workers=0"]
    for device in ("cuda", "cpu"):
        out = [f"--out={tmp_path / device}", f"--cache={tmp_path / device / 'cache'}", f"--device={device}"]
        evaluating.knn(parse_options(evaluating.KnnOptions, [*common, *out, "--k=5"], usage=""))
        more = ["--epochs=2", "--batch_size=16", f"--precision={precision if device == 'cuda' else 'fp32'}"]
        evaluating.linear(parse_options(evaluating.LinearOptions, [*common, *out, *more], usage=""))
    on_gpu, on_cpu = (read_results(tmp_path / device) for device in ("cuda", "cpu"))
    assert [result.name for result in on_gpu] == [result.name for result in on_cpu]
    for one, other in zip(on_gpu, on_cpu, strict=True):
        assert one.num_images == other.num_images == 12
        assert abs(one.top1 - other.top1) < 20  # two of the few images may change sides by rounding
