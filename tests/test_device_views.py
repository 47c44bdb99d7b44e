"""Views of whole batches, as a GPU makes them, against views by PIL on the same numbers; and decoding."""

import copy
import functools
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from dino_sparo.bench.timing import HOST_WAITS
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.data import device_views, pil_views
from dino_sparo.data.decode import decode, size_of
from dino_sparo.data.device_views import (
    collate_photos,
    make_crops,
    numbers_of,
    repeated,
    resize_weights,
    to_pixels,
)
from dino_sparo.data.images import normalize, to_tensor
from dino_sparo.data.loader import (
    BatchOrder,
    CropsDataset,
    PhotoBatch,
    choose_executor,
    crop_batches,
    crops_of,
)
from dino_sparo.data.sources import open_images
from dino_sparo.errors import UserError
from dino_sparo.runs.checkpoint import load_latest
from tests.pictures import photo, recipes, views_of
from tests.tiny import state_hash, tiny_options, write_pictures

CPU = torch.device("cpu")
SIZES = [(120, 90), (60, 130), (300, 41), (33, 33)]


def apart(ours: torch.Tensor, theirs: Image.Image) -> torch.Tensor:
    return (ours.int() - to_tensor(theirs).int()).abs()


def plain(view):
    return replace(view, flip=False, jitter_order=(), grayscale=False, blur_radius=0.0, solarize=False)


def on_device(images, crop_recipes, views):
    taps = 3
    photos = collate_photos(
        [
            (to_pixels(image), [numbers_of(view, taps) for view in row])
            for image, row in zip(images, views, strict=True)
        ]
    )
    return photos, make_crops(photos, [crop_recipes[:2], crop_recipes[2:]], CPU)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_whole_batches_are_pils(interpolation, monkeypatch):
    monkeypatch.setattr(device_views, "IMAGES_AT_ONCE", 5)
    crop_recipes = recipes(interpolation=interpolation)
    images = [photo(*SIZES[number % 4], seed=number) for number in range(12)]
    views = [views_of(image, crop_recipes, sample) for sample, image in enumerate(images)]
    _, (large, small) = on_device(images, crop_recipes, views)
    assert large.shape == (2, 12, 3, 48, 48) and small.shape == (2, 12, 3, 24, 24)
    assert large.dtype == small.dtype == torch.uint8
    for number, (image, row) in enumerate(zip(images, views, strict=True)):
        ours = [large[0, number], large[1, number], small[0, number], small[1, number]]
        for crop, view in zip(ours, row, strict=True):
            assert apart(crop, pil_views.execute(image, view)).float().mean() < 1


def test_crop_resize_and_flip_of_whole_batches():
    crop_recipes = recipes()
    images = [photo(*size) for size in SIZES]
    views = [[plain(v) for v in views_of(image, crop_recipes, 5)] for image in images]
    views[0] = [replace(view, flip=True) for view in views[0]]
    _, groups = on_device(images, crop_recipes, views)
    for number, (image, row) in enumerate(zip(images, views, strict=True)):
        for crop, view in enumerate(row):
            ours = groups[crop // 2][crop % 2, number]
            assert apart(ours, pil_views.execute(image, view)).max() <= 2


@pytest.mark.long  # compiles, as on a GPU
def test_compiled_views_of_whole_batches_are_the_uncompiled_ones(monkeypatch):
    crop_recipes = recipes()
    images = [photo(*SIZES[number % 4], seed=number) for number in range(7)]
    views = [views_of(image, crop_recipes, sample) for sample, image in enumerate(images)]
    photos, expected = on_device(images, crop_recipes, views)

    @functools.cache
    def compiled(function, device):
        return torch.compile(function, fullgraph=True, dynamic=True)

    monkeypatch.setattr(device_views, "_fast", compiled)
    monkeypatch.setattr(device_views, "IMAGES_AT_ONCE", 4)
    crops = make_crops(photos, [crop_recipes[:2], crop_recipes[2:]], CPU)
    for ours, theirs in zip(crops, expected, strict=True):
        assert (ours.int() - theirs.int()).abs().float().mean(dim=(2, 3, 4)).max() < 0.5


def test_repeated_photos_are_the_same_images():
    crop_recipes = recipes()
    images = [photo(*size) for size in SIZES[:3]]
    views = [views_of(image, crop_recipes, 1) for image in images]
    photos, groups = on_device(images, crop_recipes, views)
    more = make_crops(repeated(photos, 7), [crop_recipes[:2], crop_recipes[2:]], CPU)
    for crops, again in zip(groups, more, strict=True):
        assert torch.equal(again, crops[:, [0, 1, 2, 0, 1, 2, 0]])


def test_weights_of_resizing_sum_to_one_within_the_box():
    boxes = torch.tensor([[0.0, 50.0], [7.0, 13.0], [49.0, 1.0]])
    weights = resize_weights(boxes, 20, 50, "bicubic")
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 20))
    assert (weights[1, :, :7] == 0).all() and (weights[1, :, 20:] == 0).all()
    flipped = resize_weights(boxes, 20, 50, "bicubic", flip=torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(flipped, torch.stack([weights[0].flip(0), weights[1], weights[2].flip(0)]))


def test_no_number_is_read_back_while_views_are_made():
    """On a GPU the host would wait for it."""
    crop_recipes = recipes()
    images = [photo(*size) for size in SIZES]
    views = [views_of(image, crop_recipes, sample) for sample, image in enumerate(images)]
    photos, _ = on_device(images, crop_recipes, views)

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        batches = [PhotoBatch(photos)] * 2
        for crops in device_views.ahead(batches, lambda one: crops_of(one, crop_recipes, CPU), CPU):
            for group in crops[:2]:
                normalize(group)
    events = {event.name for event in profiler.events()}
    assert {"aten::bmm", "aten::div"} <= events and not events & set(HOST_WAITS)


def test_ahead_makes_everything_in_order():
    assert list(device_views.ahead(range(5), lambda n: (n * 2,), CPU)) == [(0,), (2,), (4,), (6,), (8,)]
    assert list(device_views.ahead([], lambda n: (n,), CPU)) == []


# --- In training


def loaded(folder, executor, *, num_workers=0, **options):
    """The crops of three batches by one of the executors."""
    dataset = CropsDataset(open_images(str(folder)), recipes(), seed=3, executor=executor, **options)
    order = BatchOrder(num_samples=12, global_batch_size=4, epochs=1, seed=3)
    batches = crop_batches(
        dataset, order, num_workers=num_workers, prefetch_batches=2, pin_memory=False, timeout_seconds=60
    )
    return [crops_of(batch, dataset.crop_recipes, CPU) for batch in batches]


def check_near(batches, expected):
    """Every crop within 1 of 255 in the mean, and the same images replaced."""
    for ours, theirs in zip(batches, expected, strict=True):
        assert ours.replaced == theirs.replaced
        for crops, others in zip(ours[:2], theirs[:2], strict=True):
            assert (crops.int() - others.int()).abs().float().mean(dim=(2, 3, 4)).max() < 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        photo(*SIZES[number % 4], seed=number).save(folder / f"{number:02d}.png")
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_device_views_of_loaded_batches(pictures, num_workers):
    check_near(loaded(pictures, "device", num_workers=num_workers), loaded(pictures, "pil"))


def test_large_images_are_reduced_before_any_crop(pictures):
    bounded = loaded(pictures, "device", max_side=100)
    check_near(bounded, loaded(pictures, "pil", max_side=100))
    assert not torch.equal(bounded[0].global_crops, loaded(pictures, "device")[0].global_crops)


def test_an_unreadable_image_is_replaced_by_the_same_one(pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "03.png").write_bytes(b"nothing")
    check_near(loaded(data, "device", substitute=True), loaded(data, "pil", substitute=True))


def test_a_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    write_pictures(tmp_path / "data", 12)
    changes = {"machine__views": "device", "machine__num_workers": 2, "data__max_side": 20}
    options = {name: tiny_options(tmp_path / "data", tmp_path / name, **changes) for name in ("one", "run")}
    pretrain(options["one"])
    first = copy.deepcopy(options["run"])
    first.log.checkpoint_every_minutes = 1e-9
    with monkeypatch.context() as patched:
        patched.setattr("dino_sparo.training.pretrain.log_step", interrupt_at(4))
        with pytest.raises(KeyboardInterrupt):
            pretrain(first)
    pretrain(options["run"])
    hashes = [state_hash(load_latest(tmp_path / name)) for name in options]
    assert hashes[0] == hashes[1]
    starts = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert load_latest(tmp_path / "run")["step"] > 4
    assert len(starts) == 2 and all(json.loads(line)["views"] == "device" for line in starts)


def interrupt_at(step):
    def log_step(run, run_log, done, *rest):
        if done == step:
            raise KeyboardInterrupt

    return log_step


def test_who_makes_the_views():
    gpu = torch.device("cuda", 0)

    def chosen(name, device=CPU, max_side=1024):
        return choose_executor(name, device, max_side=max_side)

    assert [chosen(name) for name in ("pil", "tensor", "device", "auto")] == ["pil", "pil", "device", "pil"]
    assert chosen("auto", gpu) == "device" and chosen("auto", gpu, max_side=None) == "pil"
    assert chosen("tensor", gpu) == "pil"
    with pytest.raises(UserError, match=r"machine.views device .* give data.max_side 1024"):
        chosen("device", max_side=None)


def test_a_run_that_resumes_with_other_views_says_so_once(tmp_path, monkeypatch, caplog):
    """Older runs had views by tensors, by the recipe or by `auto`."""
    write_pictures(tmp_path / "data", 8)
    options = [tiny_options(tmp_path / "data", tmp_path / "run", machine__views="pil") for _ in range(3)]
    options[0].log.checkpoint_every_minutes = 1e-9
    with monkeypatch.context() as patched:
        patched.setattr("dino_sparo.training.pretrain.log_step", interrupt_at(4))
        with pytest.raises(KeyboardInterrupt):
            pretrain(options[0])
    starts = tmp_path / "run" / "starts.jsonl"
    starts.write_text(starts.read_text().replace('"views": "pil"', '"views": "tensor"'))
    for again in options[1:]:
        pretrain(again)
        assert caplog.text.count("views were made by tensor before and are made by pil now") == 1


@pytest.mark.parametrize("views", ["device", "pil"])
def test_a_file_that_is_gone_is_replaced(views, tmp_path):
    write_pictures(tmp_path / "data", 120)
    (tmp_path / "data" / "train" / "class0" / "000.png").unlink()
    (tmp_path / "data" / "train" / "class0" / "000.png").symlink_to("nowhere")
    changes = {"data__on_bad_image": "substitute", "machine__views": views, "optim__epochs": 1}
    pretrain(tiny_options(tmp_path / "data", tmp_path / "run", optim__warmup_epochs=0, **changes))
    assert load_latest(tmp_path / "run")["step"] == 30


# --- Decoding


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


KINDS = {
    "jpeg": encoded(photo(), "JPEG"),
    "grey": encoded(photo().convert("L"), "JPEG"),
    "cmyk": encoded(photo().convert("CMYK"), "JPEG"),
    "png": encoded(photo(), "PNG"),
    "palette": encoded(photo().quantize(16), "PNG"),
    "large": encoded(photo(3000, 2000), "JPEG"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_side", [None, 1024, 50])
def test_the_size_of_a_file_is_told_by_its_beginning(kind, max_side):
    assert size_of(KINDS[kind][: len(KINDS[kind]) // 2], max_side) == decode(KINDS[kind], max_side).size


def test_a_bound_keeps_the_picture():
    assert decode(KINDS["large"], 1024).size == (1024, 683)
    assert decode(KINDS["jpeg"], 120).size == (120, 90)
    whole = decode(KINDS["large"]).resize((1024, 683), Image.Resampling.BICUBIC)
    difference = np.abs(np.array(decode(KINDS["large"], 1024)).astype(int) - np.array(whole))
    assert difference.mean() < 3
    line = Image.new("RGB", (9000, 2))
    assert decode(encoded(line, "PNG"), 1000).size == (1000, 1)


def test_no_size_of_what_is_no_image():
    assert size_of(b"nothing") is None
