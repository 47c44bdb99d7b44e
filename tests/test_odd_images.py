"""Images that are read otherwise than one may think: what pixels they give, and what is said of them."""

import json
import logging
import shutil
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from dino_sparo.cli.evaluating import KnnOptions, knn
from dino_sparo.cli.images import LabeledDataOptions, choice_of
from dino_sparo.cli.pretraining import pretrain
from dino_sparo.data import decode as decoding
from dino_sparo.data.decode import decode, size_of
from dino_sparo.data.scan import data_report, describe, scan_images
from dino_sparo.data.sources import open_images
from dino_sparo.data.splits import Choice
from dino_sparo.data.workers import WatchedLoader
from dino_sparo.errors import UserError
from dino_sparo.evaluation.features import embed
from dino_sparo.export import export
from dino_sparo.interop.load import load_encoder
from dino_sparo.models import build_encoder
from tests.pictures import encoded, photo
from tests.tiny import tiny_options, write_pictures

PICTURE = photo(40, 30)
GRAY = np.asarray(PICTURE.convert("L"))
RANGE = {"data__value_range": [0, 4095]}


def pixels_of(data: bytes, value_range=None) -> np.ndarray:
    """Those of a gray image (height, width)."""
    rgb = np.asarray(decode(data, reading=decoding.Reading(value_range=value_range)))
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0].copy()


# --- Values


@pytest.mark.parametrize(("odd", "shown"), [(np.nan, 0), (np.inf, 255), (-np.inf, 0)])
@pytest.mark.parametrize("scale", [1.0, 255.0, 4000.0])
def test_of_floats_the_finite_ones_count(odd, shown, scale):
    values = (GRAY / 255 * scale).astype(np.float32)
    expected = pixels_of(encoded(Image.fromarray(values), "TIFF"))
    values[3, 4] = odd
    expected[3, 4] = shown
    np.testing.assert_array_equal(pixels_of(encoded(Image.fromarray(values), "TIFF")), expected)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [(np.uint16, 0, 4095), (np.int32, -1024, 1016), (np.float32, 250.0, 310.0), (np.float32, -1.0, 1.0)],
    ids=["12 bits in 16", "Hounsfield units", "Kelvin", "-1 to 1"],
)
def test_a_value_range_says_what_the_mode_does_not(kind, low, high):
    values = (low + GRAY / 255 * (high - low)).astype(kind)
    read = pixels_of(encoded(Image.fromarray(values), "TIFF"), (low, high))
    assert np.abs(read.astype(int) - GRAY).max() <= 1
    values[0, 0], values[0, 1] = (0 if low == 0 else low - 9), high + 9
    read = pixels_of(encoded(Image.fromarray(values), "TIFF"), (low, high))
    assert (read[0, :2] == [0, 255]).all()


def test_a_value_range_changes_no_image_of_8_bits():
    data = encoded(PICTURE, "PNG")
    np.testing.assert_array_equal(
        np.asarray(decode(data, reading=decoding.Reading(value_range=(0, 9)))), np.asarray(PICTURE)
    )


def pgm(values: list[int], maximum: int, magic: str = "P5") -> bytes:
    """A PGM or PPM image of one row, as numbers or, with magic P2, as text."""
    kind = ">u2" if maximum > 255 else "u1"
    body = " ".join(map(str, values)).encode() if magic == "P2" else np.array(values).astype(kind).tobytes()
    return f"{magic}\n{len(values) // (3 if magic == 'P6' else 1)} 1\n{maximum}\n".encode() + body


@pytest.mark.parametrize("magic", ["P5", "P2"])
@pytest.mark.parametrize(
    ("values", "maximum", "value_range", "expected"),
    [
        ([0, 1024, 4095], 4095, None, [0, 64, 255]),
        ([0, 1024, 4095], 4095, (0, 4095), [0, 64, 255]),
        ([0, 1024, 4095], 65535, (0, 4095), [0, 64, 255]),
        ([0, 1000, 1400, 3000], 4095, (1000, 2000), [0, 0, 102, 255]),
        ([0, 130, 255, 65535], 65535, None, [0, 1, 1, 255]),
        ([0, 130, 255], 65535, None, [0, 1, 1]),
        ([0, 100, 200], 200, None, [0, 128, 255]),
        ([0, 130, 255], 255, (0, 4095), [0, 130, 255]),
    ],
)
def test_pgm_names_its_own_white(magic, values, maximum, value_range, expected):
    assert pixels_of(pgm(values, maximum, magic), value_range)[0].tolist() == expected


def test_a_scan_reads_pgm_as_training_does(tmp_path):
    (tmp_path / "gray.pgm").write_bytes(pgm([*range(1000, 3000)], 4095))
    (tmp_path / "color.ppm").write_bytes(pgm([4095] * 6, 4095, "P6"))
    source = open_images(str(tmp_path), choice=Choice(value_range=(0, 4095)))
    found = scan_images(source, num_workers=0, description="train").report
    assert found.marks["flat"].count == 0 and found.unreadable == 1


def test_a_value_range_changes_no_ppm_of_8_bits():
    read = decode(pgm([0, 1, 2], 255, "P6"), reading=decoding.Reading(value_range=(0, 9)))
    assert np.asarray(read).tolist() == [[[0, 1, 2]]]


def tiff(bands: int, bits: int, sample: int, photometric: int = 1) -> bytes:
    """An uncompressed TIFF of 4 x 3 pixels with its directory before them."""
    size = 4 * 3 * bands * bits // 8
    tags = {
        256: 4,
        257: 3,
        258: bits,
        259: 1,
        262: photometric,
        273: 200,
        277: bands,
        278: 3,
        279: size,
        339: sample,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)).ljust(200, b"\0") + bytes(
        size
    )


def deep_png(kind: int, bands: int) -> bytes:
    """A PNG of 16 bits per channel, 4 x 3 pixels of 12 bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = 3 * (b"\0" + np.full(4 * bands, 4095, ">u2").tobytes())
    header = struct.pack(">IIBBBBB", 4, 3, 16, kind, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    "data",
    [
        deep_png(2, 3),
        deep_png(4, 2),
        deep_png(6, 4),
        b"P6\n4 3\n65535\n" + np.full(36, 4095, ">u2").tobytes(),
        tiff(3, 16, 1, photometric=2),
    ],
    ids=["PNG in color", "gray PNG with alpha", "PNG in color with alpha", "PPM", "TIFF"],
)
def test_a_value_range_that_cannot_be_applied_is_refused_for_that_file(tmp_path, data):
    (tmp_path / "a.png").write_bytes(data)
    assert open_images(str(tmp_path)).load(0).size == (4, 3)
    with pytest.raises(UserError, match=r"a\.png: .*Pillow reduces 16 bits .*data\.value_range cannot"):
        open_images(str(tmp_path), choice=Choice(value_range=(0, 4095))).load(0)


def test_a_value_range_goes_from_low_to_high(tmp_path):
    with pytest.raises(UserError, match=r"data\.value_range is \[4095\.0, 0\.0\]; expected"):
        tiny_options(tmp_path, tmp_path, data__value_range=[4095, 0])
    with pytest.raises(UserError, match=r"data\.value_range"):
        LabeledDataOptions("x", value_range=(1.0, 1.0))


def test_evaluations_read_values_as_the_run_did(tmp_path):
    write_pictures(tmp_path / "data", 8)
    run = tmp_path / "run"
    pretrain(tiny_options(tmp_path / "data", run, optim__epochs=1, optim__warmup_epochs=0, **RANGE))
    export(str(run), str(tmp_path / "exported"))
    data = LabeledDataOptions("data")
    for path in (run, next((run / "checkpoints").glob("*.pt")), tmp_path / "exported"):
        encoder = load_encoder(path)
        assert choice_of(data, encoder).value_range == (0.0, 4095.0)
        assert choice_of(replace(data, value_range=(0.0, 9.0)), encoder).value_range == (0.0, 9.0)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "8 bits from 0 (black) to 4095 (white)" in card and 'encoder.transform("IMAGE")' in card
    assert choice_of(data, build_encoder({"width": 8, "depth": 2, "num_heads": 1})) == Choice()
    file = tmp_path / "deep" / "12bit.png"
    file.parent.mkdir()
    Image.fromarray(np.linspace(0, 4095, 32 * 32, dtype=np.uint16).reshape(32, 32)).save(file)
    shown = encoder.transform(file)
    assert torch.equal(shown, encoder.transform(Image.open(file)))
    assert shown.max() - shown.min() > 3  # black and white
    np.testing.assert_allclose(embed(encoder, file.parent), encoder(shown[None]).detach(), atol=1e-5)


@pytest.mark.parametrize("value_range", [[4095, 0], ["x", 1], [0], 5])
def test_a_wrong_value_range_in_an_exported_folder_is_refused(value_range, tmp_path):
    folder = shutil.copytree("eval/encoders/demo", tmp_path / "demo")
    config = json.loads((folder / "config.json").read_text())
    config["dino_sparo"]["value_range"] = value_range
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json: value_range"):
        load_encoder(folder)


# --- Formats


def reason(tmp_path, data: bytes) -> str:
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(UserError) as raised:
        open_images(str(tmp_path)).load(0)
    return str(raised.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [((6, 8, 1), "6 bands of 8 bits, unsigned integers"), ((3, 32, 3), "3 bands of 32 bits, floating point")],
)
def test_an_intact_tiff_that_pillow_does_not_read_is_called_that(tmp_path, kind, words):
    assert f"Pillow does not support this kind of TIFF: {words})" in reason(tmp_path, tiff(*kind))
    for cut in (tiff(*kind)[:-1], tiff(*kind)[:100]):
        assert "truncated or damaged" in reason(tmp_path, cut)


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"8BPS\0\1", "Photoshop"),
    ],
)
def test_other_formats_are_called_by_their_names(tmp_path, start, name):
    assert f"({name} is not supported; convert it to JPEG or PNG)" in reason(tmp_path, start.ljust(99, b"\0"))


def test_a_pointer_of_git_lfs_is_called_that(tmp_path):
    assert "run git lfs pull" in reason(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0")


def test_a_film_is_no_damaged_image(tmp_path):
    assert "not a known image format" in reason(tmp_path, b"\0\0\0\x18ftypisom\0\0\0\0".ljust(99, b"\0"))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_cannot_be_read(tmp_path):
    smooth = PICTURE.resize((6, 6)).resize((160, 160), Image.Resampling.BICUBIC)
    data = encoded(smooth, "AVIF")
    assert "cannot be read" in reason(tmp_path, data[: -len(data) // 10] + bytes(len(data) // 10))


@pytest.mark.parametrize("error", [RuntimeError, TypeError, MemoryError])
def test_whatever_a_decoder_raises_is_an_image_that_cannot_be_read(tmp_path, monkeypatch, error):
    (tmp_path / "a.png").write_bytes(encoded(PICTURE, "PNG"))

    def load(self):
        raise error("odd")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(UserError, match=r"a\.png: the image cannot be read \(.*odd"):
        open_images(str(tmp_path)).load(0)


# --- Orientation


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("max_side", [None, 20])
def test_no_format_is_turned_by_its_exif(kind, orientation, max_side):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    plain = encoded(PICTURE, kind, **options)
    turned = encoded(
        PICTURE, kind, **options, **({"exif": exif} if kind != "TIFF" else {"tiffinfo": {274: orientation}})
    )
    expected = decode(plain, max_side)
    assert size_of(turned, max_side) == expected.size
    np.testing.assert_array_equal(np.asarray(decode(turned, max_side)), np.asarray(expected))


# --- What the scan and the log say


def cut(image: Image.Image, **options) -> bytes:
    """The beginning of a JPEG with an end marker: decoders fill in what is missing."""
    data = encoded(image, "JPEG", **options)
    return data[: len(data) * 3 // 5] + b"\xff\xd9"


def test_the_scan_counts_images_that_may_be_wrong(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, data in {
        "good.png": encoded(PICTURE, "PNG"),
        "turned.jpg": encoded(PICTURE, "JPEG", exif=exif),
        "turned.tif": encoded(PICTURE, "TIFF", tiffinfo={274: 6}),
        "bad_exif.jpg": encoded(PICTURE, "JPEG", dpi=(72, 72), exif=b"Exif\0\0no TIFF"),
        "12_bits.png": encoded(Image.fromarray((GRAY / 255 * 4095).astype(np.uint16)), "PNG"),
        "white.png": encoded(Image.new("L", (40, 30), 250), "PNG"),
        "pages.tif": encoded(PICTURE, "TIFF", save_all=True, append_images=[PICTURE]),
        "moves.png": encoded(PICTURE, "PNG", save_all=True, append_images=[PICTURE.rotate(180)]),
        "photo_with_preview.jpg": encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE]),
        "cut_with_end.jpg": cut(PICTURE.resize((64, 64)), quality=95),
        "gray_cut_with_end.jpg": cut(PICTURE.convert("L").resize((64, 64)), quality=95),
    }.items():
        (tmp_path / name).write_bytes(data)

    def found(choice=Choice()):  # noqa: B008
        result = scan_images(open_images(str(tmp_path), choice=choice), num_workers=0, description="train")
        return result.report, "\n".join(describe(data_report(result, None)))

    report, text = found()
    assert report.readable == 11
    assert {mark: [Path(name).name for name in files.first] for mark, files in report.marks.items()} == {
        "flat": ["12_bits.png", "white.png"],
        "turned": ["turned.jpg", "turned.tif"],
        "cut": ["cut_with_end.jpg", "gray_cut_with_end.jpg"],
        "several": ["moves.png", "pages.tif"],
    }
    assert "nearly constant or nearly black: 2 (" in text and "EXIF orientation that is ignored: 2 (" in text
    assert found(Choice(value_range=(0, 4095)))[0].marks["flat"].first == (f"{tmp_path}/white.png",)


class OddWarning(UserWarning):
    pass


class Warns:
    """Items, of which a library warns."""

    def __len__(self):
        return 8

    def __getitem__(self, item):
        warnings.warn(f"item {item} is odd", OddWarning, stacklevel=1)
        if item == 5:
            warnings.warn("and another", OddWarning, stacklevel=1)
        return item


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_libraries_warn_of_is_logged_once_with_the_name_of_the_image(num_workers, capfd):
    handler = logging.StreamHandler()
    logging.getLogger("dino_sparo").addHandler(handler)
    try:
        loader = WatchedLoader(
            Warns(),
            image_of=int,
            name=lambda number: f"{number}.jpg",
            num_workers=num_workers,
            timeout_seconds=60,
            batch_size=4,
        )
        assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    finally:
        logging.getLogger("dino_sparo").removeHandler(handler)
    lines = [line for line in capfd.readouterr().err.splitlines() if "odd" in line or "another" in line]
    assert len(lines) == 2
    assert any(line.startswith("WARNING: 5.jpg: and another") for line in lines)


# --- k-NN during training


@pytest.mark.parametrize(
    ("split", "num_workers"), [("train", 0), pytest.param("val", 2, marks=pytest.mark.long)]
)
def test_k_nn_while_training_leaves_out_what_cannot_be_read(tmp_path, split, num_workers):
    data, run = tmp_path / "data", tmp_path / "run"
    write_pictures(data, 60, classes=3)
    for number in range(12):
        path = data / "val" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(24, 24, seed=number), "PNG"))
    bad = data / split / "class0" / "3.png"
    bad.write_bytes(encoded(PICTURE, "PNG")[:-60])
    options = tiny_options(
        *(data, run),
        optim__epochs=1,
        optim__warmup_epochs=0,
        monitor__knn_every_epochs=1,
        machine__num_workers=num_workers,
        data__on_bad_image="substitute",
    )
    pretrain(options)
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = [entry["knn20_images"] for entry in entries if "knn20_images" in entry]
    assert counted == 2 * [11 if split == "val" else 12]
    listed = [json.loads(line) for line in (run / "bad_images.jsonl").read_text().splitlines()]
    assert [entry["name"] for entry in listed] == [str(bad)]
    with pytest.raises(UserError, match=r"3\.png: the image cannot be read"):
        knn(KnnOptions(run=str(run), data=LabeledDataOptions(str(data)), num_workers=0))
    options.data.on_bad_image, options.machine.num_workers = "stop", 0
    options.run_dir = str(tmp_path / "other")
    with pytest.raises(UserError, match=r"3\.png: the image cannot be read"):
        pretrain(options)
