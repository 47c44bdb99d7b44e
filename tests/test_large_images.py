"""Images that would fill the memory or take for ever: what is decoded, how, and what is refused."""

import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, features

from dino_sparo.data.decode import AS_IS, FORMATS, Reading, decode, size_of
from dino_sparo.data.sources import open_images
from dino_sparo.data.splits import Choice
from dino_sparo.errors import UserError
from tests.pictures import encoded, photo
from tests.tiny import tiny_options

MANY = 1_000_000
NEEDS_AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
PICTURE = photo(40, 30)
JPEG, PNG, GIF = encoded(PICTURE, "JPEG"), encoded(PICTURE, "PNG"), encoded(PICTURE.quantize(16), "GIF")
PROGRESSIVE = encoded(PICTURE, "JPEG", progressive=True)
SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
EMPTY_SCAN = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"  # of the first of several components


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def put_in(data: bytes, before: bytes, what: bytes) -> bytes:
    place = data.index(before)
    return data[:place] + what + data[place:]


def claims(width: int, height: int, bits: int = 8, color: int = 0) -> bytes:
    """The beginning of a PNG of this size."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(5000)))


def jpeg_that_claims(side: int) -> bytes:
    frame = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:frame] + struct.pack(">HH", side, side) + JPEG[frame + 4 :]


# --- Size


@pytest.mark.parametrize("max_side", [None, 100])
@pytest.mark.parametrize(
    "data",
    [
        claims(13_375, 13_375, bits=16),
        claims(1, 170_000_000),
        claims(170_000_000, 1),
        claims(200_000, 10),
        jpeg_that_claims(13_000),
    ],
    ids=["16 bits", "high", "wide", "long", "jpeg"],
)
def test_more_pixels_than_fit_into_memory_are_refused_by_the_header(data, max_side):
    with pytest.raises(OSError, match=r"[\d,]+ x [\d,]+ pixels are too many for data.max_pixels 67,108,864"):
        decode(data, max_side)


def test_the_limit_is_an_option_of_training_and_holds_for_all_its_images(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(encoded(photo(2000, 1000), "PNG"))
    data = tiny_options(tmp_path, tmp_path / "run", data__max_pixels=1_999_999).data
    with pytest.raises(UserError, match=r"a\.png.*2,000 x 1,000 pixels .* data\.max_pixels 1,999,999"):
        open_images(data.path, choice=Choice.of(data)).load(0)
    allowed = Choice.of(replace(data, max_pixels=2_000_000))
    assert open_images(data.path, choice=allowed).load(0).size == (2000, 1000)


@pytest.mark.parametrize(
    ("size", "kind", "counted"),
    [
        ((1000, 800), "PNG", 800_000),
        ((1000, 3), "PNG", 512_000),
        ((1000, 800), "WEBP", 1_600_000),
        pytest.param((1000, 800), "AVIF", 1_600_000, marks=NEEDS_AVIF),
    ],
)
def test_narrow_images_count_as_wide_ones_and_webp_and_avif_twice(size, kind, counted):
    data = encoded(Image.new("RGB", size), kind)
    assert decode(data, reading=Reading(max_pixels=counted)).size == size
    with pytest.raises(OSError, match="too many"):
        decode(data, reading=Reading(max_pixels=counted - 1))


def test_a_file_has_at_most_four_bytes_for_each_pixel_allowed(tmp_path):
    (tmp_path / "a.bmp").write_bytes(encoded(PICTURE, "BMP") + bytes(2**20))
    source = open_images(str(tmp_path), choice=Choice(max_pixels=10))
    with pytest.raises(UserError, match=r"a\.bmp: .* bytes, more than 1,048,616, for data\.max_pixels 10"):
        source.load(0)


# --- Memory


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_images_of_more_than_8_bits_are_reduced_in_blocks(kind):
    """To the same pixels as the whole at once, whose float64 copy would take 48 MB."""
    values = np.random.default_rng(0).integers(0, 4000, (1500, 4000)).astype(kind)
    data = encoded(Image.fromarray(values), "TIFF")
    tracemalloc.start()
    read = decode(data)
    peak = tracemalloc.get_traced_memory()[1] - len(data)
    tracemalloc.stop()
    assert peak < 36e6
    expected = (values.astype(np.float64) * (255.0 / 65535)).round().astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(read), np.stack([expected] * 3, axis=-1))


# --- Time

SLOW = {
    "ppm comment": b"P6\n#" + b"x" * MANY + b"\n4 4 255\n" + bytes(48),
    "plain ppm comments": b"P3\n4 4 255\n" + b"#\n" * MANY + b"0 " * 48,
    "jpeg padding": JPEG[:2] + b"\xff" * MANY + JPEG[2:],
    "jpeg segments": JPEG[:2] + b"\xff\xfe\x00\x02" * MANY + JPEG[2:],
    "jpeg scans": PROGRESSIVE[:-2] + 2000 * SCAN + PROGRESSIVE[-2:],
    "jpeg scans in sequence": put_in(JPEG, b"\xff\xda", 300 * EMPTY_SCAN),
    "png chunks": put_in(PNG, PNG[PNG.index(b"IDAT") - 4 :], chunk(b"prVt") * MANY),
    "png chunks at the end": put_in(PNG, PNG[-12:], chunk(b"prVt") * MANY),
    "gif comments": put_in(GIF, GIF[GIF.index(b",") :], b"!\xfe\x01x\0" * MANY),
}


@pytest.mark.parametrize("kind", SLOW)
def test_files_in_ever_so_many_pieces_are_refused(kind):
    with pytest.raises(OSError, match=r"too many (comments|pieces|scans)"):
        decode(SLOW[kind])


def test_ordinary_files_of_all_formats_are_in_few_pieces():
    picture = photo(450, 300)
    for kind in FORMATS:
        data = encoded(picture, kind)
        assert decode(data).size == size_of(data) == picture.size
    data = encoded(picture, "JPEG", comment=b"x" * 60_000, icc_profile=bytes(500_000), progressive=True)
    assert decode(data, reading=AS_IS).size == picture.size
