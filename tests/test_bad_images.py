"""Kinds of odd files in a folder of images: what training, evaluation and the scan make of each."""

import builtins
import json
import os
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from dino_sparo.cli.pretraining import pretrain as pretrain_by
from dino_sparo.data import pil_views
from dino_sparo.data.decode import PROBLEMS
from dino_sparo.data.images import evaluation_crop, evaluation_input, to_tensor
from dino_sparo.data.scan import find_copies, scan_images
from dino_sparo.data.sources import open_images
from dino_sparo.errors import UserError
from dino_sparo.evaluation.features import embed
from dino_sparo.models import build_encoder
from dino_sparo.runs.rundir import BAD_IMAGES_FILE
from dino_sparo.training.stopping import BadImages
from tests.pictures import encoded
from tests.tiny import tiny_options

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
LONG_SIDE, SHORT_SIDE = 20_000, 10


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(100 * (1 + 20_000 // 8)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@dataclass(frozen=True)
class Odd:
    """A kind of file and what is documented of it.

    `image` is what is read; without it, `reason` is told and the scan lists the file as `problem`; without
    either, the file is no image and nobody looks at it.
    """

    name: str
    content: bytes = b""
    image: Image.Image | None = None
    reason: str = ""
    problem: str = ""


PICTURE = Image.fromarray(PIXELS)
DEEP = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
LONG = Image.fromarray(np.resize(PIXELS, (SHORT_SIDE, LONG_SIDE, 3)))
DOT = PICTURE.crop((0, 0, 1, 1))
PALETTE, CMYK = PICTURE.quantize(16), PICTURE.convert("CMYK")
ALPHA = Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]))
PNG, JPEG = encoded(PICTURE, "PNG"), encoded(PICTURE, "JPEG")
DAMAGED = PNG[: len(PNG) // 2] + bytes([PNG[len(PNG) // 2] ^ 255]) + PNG[len(PNG) // 2 + 1 :]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n"
UNKNOWN = ("not a known image format", "not_an_image")
KINDS = {
    "truncated": Odd("cut.jpg", JPEG[: len(JPEG) // 2], None, "image file is truncated", "truncated"),
    "damaged": Odd("damaged.png", DAMAGED, None, "broken", "unreadable"),
    "zero-byte": Odd("empty.jpg", b"", None, "the file is empty", "zero_byte"),
    "html": Odd("page.jpg", b"<!DOCTYPE html><p>404", None, *UNKNOWN),
    "postscript": Odd("drawing.jpg", EPS, None, *UNKNOWN),
    "gif": Odd("moving.jpg", encoded(PALETTE, "GIF"), PALETTE.convert("RGB")),
    "bomb": Odd("bomb.png", bomb(), None, "exceeds limit of 178956970 pixels", "unreadable"),
    "permission": Odd("locked.png", PNG, None, "Permission denied", "unreadable"),
    "16-bit": Odd("deep.png", encoded(DEEP, "PNG"), Image.fromarray(PIXELS[..., 0]).convert("RGB")),
    "palette": Odd("palette.png", encoded(PALETTE, "PNG"), PALETTE.convert("RGB")),
    "cmyk": Odd("cmyk.tif", encoded(CMYK, "TIFF"), CMYK.convert("RGB")),
    "alpha": Odd("alpha.png", encoded(ALPHA, "PNG"), PICTURE),
    "1x1": Odd("dot.png", encoded(DOT, "PNG"), DOT),
    "20000x10": Odd("long.png", encoded(LONG, "PNG"), LONG),
    "duplicate": Odd("again.png", PNG, PICTURE),
    "pipe": Odd("pipe.jpg", b"", None, "not a regular file", "unreadable"),
    "device": Odd("zero.jpg", b"", None, "not a regular file", "unreadable"),
    "huge": Odd("huge.png", b"", None, "300,000,000 bytes, more than", "unreadable"),
    "hidden": Odd(".hidden.png", PNG),
    "loop": Odd("loop"),
}
UNREADABLE = [kind for kind, odd in KINDS.items() if odd.reason]
READABLE = [kind for kind, odd in KINDS.items() if odd.image]


def write(folder: Path, *kinds: str) -> Path:
    """A folder with four good pictures and a file of each of these kinds."""
    folder.mkdir()
    for number in range(4):
        (folder / f"good{number}.png").write_bytes(encoded(PICTURE.rotate(90 * number), "PNG"))
    for kind in kinds:
        path = folder / KINDS[kind].name
        if kind == "loop":
            path.symlink_to(folder, target_is_directory=True)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.write_bytes(KINDS[kind].content)
        if kind == "huge":
            os.truncate(path, 300_000_000)
        if kind == "permission":
            path.chmod(0)
    return folder


@pytest.fixture(autouse=True)
def permissions_bind_the_superuser_too(monkeypatch):
    real_open = builtins.open

    def open_with_permission(file, *args, **kwargs):
        if str(file).endswith("locked.png"):
            raise PermissionError(13, "Permission denied", str(file))
        return real_open(file, *args, **kwargs)

    if os.geteuid() == 0:
        monkeypatch.setattr(builtins, "open", open_with_permission)


@pytest.fixture(autouse=True)
def nothing_starts_ghostscript(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "gs"
    program.write_text(f"#!/bin/sh\ntouch {folder}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once a process
    yield
    assert not (folder / "started").exists(), "a file has started a program"


def pretrain(data: Path, run_dir: Path, on_bad_image: str) -> list[dict[str, str]]:
    """Train for one epoch with the whole folder as a batch; what is listed as bad."""
    changes = {"optim__global_batch_size": len(open_images(str(data))), "data__on_bad_image": on_bad_image}
    changes |= {"optim__epochs": 1, "optim__warmup_epochs": 0, "optim__freeze_last_layer_epochs": 0}
    pretrain_by(tiny_options(data, run_dir, **changes))
    path = run_dir / BAD_IMAGES_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def features(data: Path) -> torch.Tensor:
    encoder = build_encoder({"width": 16, "depth": 2, "num_heads": 2}, 8, 16, readout="cls").eval()
    return torch.from_numpy(embed(encoder, open_images(str(data)), image_size=16))


def check_named(message: str, data: Path, kind: str) -> None:
    assert message.startswith(f"{data / KINDS[kind].name}: the image cannot be read (")
    assert KINDS[kind].reason in message and "\n" not in message
    assert message.count(KINDS[kind].name) == 1  # the reason does not name it again


# --- Training


def test_others_stand_in_for_exactly_the_unreadable_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("dino_sparo.training.stopping.MAX_SHARE", 1.0)
    data = write(tmp_path / "data", *KINDS)
    listed = {
        Path(entry["name"]).name: entry["reason"] for entry in pretrain(data, tmp_path / "run", "substitute")
    }
    assert listed.keys() == {KINDS[kind].name for kind in UNREADABLE}
    for kind in UNREADABLE:
        assert KINDS[kind].reason in listed[KINDS[kind].name]


def test_one_in_a_hundred_is_of_images_of_the_same_kind(tmp_path):
    bad = BadImages(tmp_path, num_images=100)
    bad.list({"val/0.png": "odd", "val/1.png": "odd"}, 2, num_images=200)
    bad.add((("train/0.png", "odd"),))
    bad.share()
    with pytest.raises(UserError, match="3 of 200 images"):
        bad.list({"val/2.png": "odd"}, 3, num_images=200)
    bad.add((("train/1.png", "odd"),))
    with pytest.raises(UserError, match="2 of 100 images"):
        bad.share()
    assert len(bad) == 5


@pytest.mark.parametrize("kind", UNREADABLE)
def test_training_stops_at_an_unreadable_file_by_its_name(tmp_path, kind):
    data = write(tmp_path / "data", kind)
    with pytest.raises(UserError) as raised:
        pretrain(data, tmp_path / "run", "stop")
    check_named(str(raised.value), data, kind)


def test_training_takes_all_others(tmp_path):
    data = write(tmp_path / "data", *(KINDS.keys() - set(UNREADABLE)))
    assert pretrain(data, tmp_path / "run", "stop") == []


@pytest.mark.parametrize("kind", READABLE)
def test_images_are_read_as_documented(tmp_path, kind):
    source = open_images(str(write(tmp_path / "data", kind)))
    (number,) = [i for i in range(len(source)) if source.name(i).endswith(f"/{KINDS[kind].name}")]
    read = source.load(number)
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.array(read), np.array(KINDS[kind].image))


def test_an_image_in_a_shard_is_not_read_if_its_file_is_huge(tmp_path):
    header = tarfile.TarInfo("a.png")
    header.size = 300_000_000
    path = tmp_path / "0.tar"
    path.write_bytes(header.tobuf())
    os.truncate(path, header.size + 2**20)
    with pytest.raises(UserError, match=r"0\.tar: a\.png: .*300,000,000 bytes, more than"):
        open_images(str(tmp_path)).load(0)


@pytest.mark.parametrize("name", ["0.tar", "train-0.parquet"])
def test_nobody_waits_for_a_pipe_among_shards_or_tables(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}.*not a regular file"):
        open_images(str(tmp_path))


def test_the_transform_of_an_encoder_does_not_wait_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(OSError, match="not a regular file"):
        evaluation_input(tmp_path / "a.jpg", 48)


# --- Evaluation


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_counts_every_image_or_stops_by_name(tmp_path, kind):
    data = write(tmp_path / "data", kind)
    if kind in UNREADABLE:
        with pytest.raises(UserError) as raised:
            features(data)
        check_named(str(raised.value), data, kind)
    else:
        found = features(data)
        assert len(found) == 4 + (kind in READABLE) and found.isfinite().all()


EXACT = [(32 * 13, 13), (13, 33 * 13 - 1), (1000, 10), (10, 1000), (103 * 17, 17), (17, 104 * 17)]
NEAR = [(4099, 31), (36, 2203)]  # whose resized long side is no whole number, so the scale differs a little


@pytest.mark.parametrize("size", EXACT + NEAR)
@pytest.mark.parametrize("crop_size", [48, 224])
def test_the_crop_of_a_very_long_image_is_that_of_the_whole_one(size, crop_size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    crop, whole = evaluation_crop(image, crop_size), pil_views.center_crop(image, crop_size)
    assert (crop.int() - to_tensor(whole).int()).abs().max() <= (3 if size in NEAR else 0)


@pytest.mark.parametrize("size", [(LONG_SIDE, SHORT_SIDE), (SHORT_SIDE, LONG_SIDE), (100_000, 1)])
def test_a_very_long_image_is_never_resized_as_a_whole(size, monkeypatch):
    resized = []

    def center_crop(image, size):
        resized.append(image.size)
        return image

    monkeypatch.setattr(pil_views, "center_crop", center_crop)
    evaluation_crop(Image.new("RGB", size), 224)
    assert max(resized[0]) < 36 * min(size) and min(resized[0]) == min(size)


# --- The scan


@pytest.mark.parametrize("kind", KINDS)
def test_the_scan_lists_what_cannot_be_read_and_what_is_there_twice(tmp_path, kind):
    source = open_images(str(write(tmp_path / "data", kind)))
    found = scan_images(source, num_workers=0, description="train")
    counts = {problem: files.count for problem, files in found.report.problems.items()}
    assert counts == {problem: int(problem == KINDS[kind].problem) for problem in PROBLEMS}
    for files in found.report.problems.values():
        for file in files.first:
            assert f"/{KINDS[kind].name}: " in file and KINDS[kind].reason in file
    assert found.report.images == 4 + (kind in READABLE) + (kind in UNREADABLE)
    again = [[Path(name).name for name in group.first] for group in find_copies(found).largest]
    assert again == ([["again.png", "good0.png"]] if kind == "duplicate" else [])
