"""Views of whole batches, as a GPU makes them, against views by PIL on the same numbers; and decoding."""

import functools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torchvision.io import decode_jpeg

from dino_sparo.bench.timing import HOST_WAITS
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.data import device_views, pil_views
from dino_sparo.data.decode import decode, decode_pixels, size_of
from dino_sparo.data.device_views import collate_photos, make_crops, numbers_of, repeated, to_pixels
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
from tests.pictures import encoded, photo, recipes, views_of
from tests.running import COMPILER
from tests.tiny import state_hash, tiny_options, write_pictures

CPU = torch.device("cpu")
SIZES = [(120, 90), (60, 130), (300, 41), (33, 33)]


def photos(count):
    return [photo(*SIZES[number % 4], seed=number) for number in range(count)]


def batch_of(images, views):
    return collate_photos(
        [
            (to_pixels(image), [numbers_of(view, taps=3) for view in row])
            for image, row in zip(images, views, strict=True)
        ]
    )


def check_against_pil(groups, images, views, near):
    """Whether every crop is near that of PIL."""
    for number, (image, row) in enumerate(zip(images, views, strict=True)):
        for crop, view in enumerate(row):
            ours, theirs = groups[crop // 2][crop % 2, number], to_tensor(pil_views.execute(image, view))
            assert near((ours.int() - theirs.int()).abs().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # a CPU's and a GPU's
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_whole_batches_are_pils(interpolation, dtype, monkeypatch):
    monkeypatch.setattr(device_views, "IMAGES_AT_ONCE", 5)
    crops, images = recipes(interpolation=interpolation), photos(12)
    views = [views_of(image, crops, sample) for sample, image in enumerate(images)]
    groups = make_crops(batch_of(images, views), [crops[:2], crops[2:]], CPU, dtype)
    assert groups[0].shape == (2, 12, 3, 48, 48) and groups[1].shape == (2, 12, 3, 24, 24)
    assert groups[0].dtype == groups[1].dtype == torch.uint8
    check_against_pil(groups, images, views, lambda apart: apart.mean() < 1)


def resized_only(images, crops):
    """Views without colors, the first image's flipped."""
    plain = {"jitter_order": (), "grayscale": False, "blur_radius": 0.0, "solarize": False}
    return [
        [replace(view, **plain, flip=number == 0) for view in views_of(image, crops, 5)]
        for number, image in enumerate(images)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_crop_resize_and_flip_of_whole_batches(dtype):
    crops, images = recipes(), photos(4)
    views = resized_only(images, crops)
    groups = make_crops(batch_of(images, views), [crops[:2], crops[2:]], CPU, dtype)
    check_against_pil(groups, images, views, lambda apart: apart.max() <= 2)


def test_half_precision_changes_few_pixels_and_those_little():
    """Weights are rounded, sums are not."""
    crops, images = recipes(), photos(4)
    batch = batch_of(images, resized_only(images, crops))
    one, half = (make_crops(batch, [crops[:2], crops[2:]], CPU, dtype) for dtype in (None, torch.float16))
    for group, other in zip(one, half, strict=True):
        apart = (group.int() - other.int()).abs()
        assert apart.max() <= 2 and 0 < apart.float().mean() < 0.05


@pytest.mark.long  # compiles, as on a GPU
def test_compiled_views_of_whole_batches_are_the_uncompiled_ones(monkeypatch):
    crops, images = recipes(), photos(7)
    batch = batch_of(images, [views_of(image, crops, sample) for sample, image in enumerate(images)])
    expected = make_crops(batch, [crops[:2], crops[2:]], CPU)

    @functools.cache
    def compiled(function, device):
        return torch.compile(function, fullgraph=True, dynamic=True, backend=COMPILER)

    monkeypatch.setattr(device_views, "_fast", compiled)
    monkeypatch.setattr(device_views, "IMAGES_AT_ONCE", 4)
    for ours, theirs in zip(make_crops(batch, [crops[:2], crops[2:]], CPU), expected, strict=True):
        assert (ours.int() - theirs.int()).abs().float().mean(dim=(2, 3, 4)).max() < 0.5


def test_repeated_photos_are_the_same_images():
    crops, images = recipes(), photos(3)
    batch = batch_of(images, [views_of(image, crops, 1) for image in images])
    once, more = (make_crops(b, [crops[:2], crops[2:]], CPU) for b in (batch, repeated(batch, 7)))
    for group, again in zip(once, more, strict=True):
        assert torch.equal(again, group[:, [0, 1, 2, 0, 1, 2, 0]])


def test_no_number_is_read_back_while_views_are_made():
    """On a GPU the host would wait for it."""
    crops, images = recipes(), photos(4)
    batch = PhotoBatch(batch_of(images, [views_of(image, crops, 1) for image in images]))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for made in device_views.ahead([batch] * 2, lambda one: crops_of(one, crops, CPU), CPU):
            for group in made[:2]:
                normalize(group)
    events = {event.name for event in profiler.events()}
    assert {"aten::bmm", "aten::div"} <= events and not events & set(HOST_WAITS)


# --- In training


def loaded(folder, executor, *, num_workers=0, **options):
    """The crops of three batches by one of the executors."""
    dataset = CropsDataset(open_images(str(folder)), recipes(), seed=3, executor=executor, **options)
    order = BatchOrder(num_samples=12, global_batch_size=4, epochs=1, seed=3)
    batches = crop_batches(
        dataset, order, num_workers=num_workers, prefetch_batches=2, pin_memory=False, timeout_seconds=60
    )
    return [crops_of(batch, dataset.crop_kinds, CPU) for batch in batches]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(photos(12)):
        image.save(folder / f"{number:02d}.png")
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"max_side": 100}, {"substitute": True}])
def test_device_views_of_loaded_batches(pictures, tmp_path, num_workers, options):
    data = shutil.copytree(pictures, tmp_path / "data")
    if "substitute" in options:
        (data / "03.png").write_bytes(b"nothing")
    batches = loaded(data, "device", num_workers=num_workers, **options)
    for ours, theirs in zip(batches, loaded(data, "pil", **options), strict=True):
        assert ours.replaced == theirs.replaced
        for crops, others in zip(ours[:2], theirs[:2], strict=True):
            assert (crops.int() - others.int()).abs().float().mean(dim=(2, 3, 4)).max() < 1
    assert any(batch.replaced for batch in batches) == ("substitute" in options)


def stop_after_four_steps(options, monkeypatch):
    def log_step(run, run_log, done, *rest):
        if done == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dino_sparo.training.pretrain.log_step", log_step)
        with pytest.raises(KeyboardInterrupt):
            pretrain(options)


def test_a_run_resumes_bit_for_bit(tmp_path, monkeypatch):
    write_pictures(tmp_path / "data", 12)
    changes = {"machine__views": "device", "machine__num_workers": 2, "data__max_side": 20}
    changes |= {"log__checkpoint_every_minutes": 1e-9}
    pretrain(tiny_options(tmp_path / "data", tmp_path / "one", **changes))
    stop_after_four_steps(tiny_options(tmp_path / "data", tmp_path / "run", **changes), monkeypatch)
    pretrain(tiny_options(tmp_path / "data", tmp_path / "run", **changes))
    one, run = (load_latest(tmp_path / name) for name in ("one", "run"))
    assert state_hash(one) == state_hash(run) and run["step"] > 4
    starts = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["views"] for line in starts] == ["device", "device"]


def test_who_makes_the_views():
    gpu = torch.device("cuda", 0)

    def chosen(name, device=CPU, max_side=1024):
        return choose_executor(name, device, max_side=max_side)

    assert [chosen(name) for name in ("pil", "device", "auto")] == ["pil", "device", "pil"]
    assert chosen("auto", gpu) == "device" and chosen("auto", gpu, max_side=None) == "pil"
    assert chosen("pil", gpu) == "pil"
    with pytest.raises(UserError, match=r"machine.views is device.*set data.max_side 1024"):
        chosen("device", max_side=None)


def test_without_a_compiler_many_workers_make_the_views(monkeypatch, caplog):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("dino_sparo.data.loader.why_not_compiled", lambda: "no gcc")

    def chosen(name, num_workers):
        caplog.clear()
        return choose_executor(name, gpu, max_side=1024, num_workers=num_workers)

    assert chosen("auto", 16) == "pil" and "16 workers make the views with PIL" in caplog.text
    assert "no gcc" in caplog.text
    for name, num_workers in (("auto", 8), ("device", 16)):
        assert chosen(name, num_workers) == "device"
        assert "cannot be compiled (no gcc) and takes about ten times as long" in caplog.text
    assert chosen("pil", 8) == "pil" and not caplog.text
    assert chosen("auto", None) == "device" and not caplog.text  # of a GPU that is not here


def test_a_run_that_resumes_with_other_views_says_so_once(tmp_path, monkeypatch, caplog):
    """Older runs had views by tensors, by the recipe or by `auto`."""
    write_pictures(tmp_path / "data", 8)
    changes = {"machine__views": "pil", "log__checkpoint_every_minutes": 1e-9}
    options = [tiny_options(tmp_path / "data", tmp_path / "run", **changes) for _ in range(3)]
    stop_after_four_steps(options[0], monkeypatch)
    starts = tmp_path / "run" / "starts.jsonl"
    starts.write_text(starts.read_text().replace('"views": "pil"', '"views": "tensor"'))
    for again in options[1:]:
        pretrain(again)
        assert caplog.text.count("views were made by tensor before and are made by pil now") == 1


def test_a_file_that_is_gone_is_replaced(tmp_path):
    write_pictures(tmp_path / "data", 120)
    (tmp_path / "data" / "train" / "class0" / "000.png").unlink()
    (tmp_path / "data" / "train" / "class0" / "000.png").symlink_to("nowhere")
    changes = {"data__on_bad_image": "substitute", "machine__views": "device", "optim__epochs": 1}
    pretrain(tiny_options(tmp_path / "data", tmp_path / "run", optim__warmup_epochs=0, **changes))
    assert load_latest(tmp_path / "run")["step"] == 30


# --- Decoding

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
    assert size_of(b"nothing", max_side) is None


def test_a_bound_keeps_the_picture():
    assert decode(KINDS["large"], 1024).size == (1024, 683)
    assert decode(KINDS["jpeg"], 120).size == (120, 90)
    whole = decode(KINDS["large"]).resize((1024, 683), Image.Resampling.BICUBIC)
    difference = np.abs(np.array(decode(KINDS["large"], 1024)).astype(int) - np.array(whole))
    assert difference.mean() < 3
    assert decode(encoded(Image.new("RGB", (9000, 2)), "PNG"), 1000).size == (1000, 1)


# --- Decoding to tensors

FILES = [
    *(("JPEG", "RGB", {"quality": 90, "subsampling": number}) for number in (0, 1, 2)),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"restart_marker_blocks": 2, "optimize": True}),
    ("JPEG", "RGB", {"keep_rgb": True, "quality": 100}),
    *(("JPEG", mode, {"quality": 60}) for mode in ("L", "CMYK", "1")),
    *(("PNG", mode, {}) for mode in ("RGB", "RGBA", "P", "I;16")),
]


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def outcome(decoder, data, max_side=None):
    """Pixels, or the type of the error."""
    try:
        return np.asarray(decoder(data, max_side))
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("size", [(120, 90), (17, 3), (1, 1), (8, 65)])
@pytest.mark.parametrize(("kind", "mode", "options"), FILES)
def test_tensors_are_decoded_to_the_pixels_of_pillow(kind, mode, options, size):
    image = photo(240, 180).resize(size).convert("L" if mode == "I;16" else mode)
    image = Image.fromarray(np.array(image, np.uint16) * 257) if mode == "I;16" else image
    for more in ({}, {"exif": exif(6)}):
        data = encoded(image, kind, **options, **more)
        for max_side in (None, 60):
            found = decode_pixels(data, max_side)
            assert found.dtype == torch.uint8 and found.is_contiguous()
            np.testing.assert_array_equal(found.numpy(), np.array(decode(data, max_side)))


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_damaged_files_are_decoded_as_by_pillow_and_nothing_is_printed(options, capfd):
    good, rng = encoded(photo(), "JPEG", quality=90, **options), np.random.default_rng(0)
    read = 0
    for number in range(150):
        data = bytearray(good[: None if number % 5 else rng.integers(20, len(good))])
        for place in rng.integers(20, len(data), 1 + number % 3):
            data[place] = rng.integers(256)
        expected, found = (outcome(decoder, bytes(data)) for decoder in (decode, decode_pixels))
        read += isinstance(expected, np.ndarray)
        assert np.array_equal(found, expected)
    assert 30 < read < 140
    assert capfd.readouterr() == ("", "")


def test_torchvision_decodes_in_workers_alone(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(encoded(photo(), "JPEG"))
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xff")
    dataset = CropsDataset(open_images(str(tmp_path)), recipes(), 0, executor="device")
    pixels, numbers = dataset[0, 0].made
    calls = []

    def counted(*arguments, **options):
        calls.append(1)
        return decode_jpeg(*arguments, **options)

    monkeypatch.setattr("torchvision.io.decode_jpeg", counted)
    assert torch.equal(dataset[0, 0].made[0], pixels) and not calls
    monkeypatch.setattr("dino_sparo.data.loader.get_worker_info", lambda: True)
    ours = dataset[0, 0].made
    assert torch.equal(ours[0], pixels) and ours[1] == numbers and len(calls) == 1
    with pytest.raises(UserError, match=r"b\.jpg"):
        dataset[0, 1]
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    assert torch.equal(dataset[0, 0].made[0], pixels) and len(calls) == 1
