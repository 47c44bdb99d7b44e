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
    [claims(13_375, 13_375, bits=16), claims(170_000_000, 1), claims(200_000, 10), jpeg_that_claims(13_000)],
    ids=["16 bits", "wide", "long", "jpeg"],
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


FULL_COLOR = {"progressive": True, "subsampling": 0}


@pytest.mark.parametrize(
    ("mode", "kind", "options", "counted"),
    [
        ("RGB", "PNG", {}, 1),
        ("RGB", "WEBP", {}, 2),
        pytest.param("RGB", "AVIF", {}, 2, marks=NEEDS_AVIF),
        ("RGB", "JPEG", {"subsampling": 0}, 1),
        ("RGB", "JPEG", {"progressive": True, "subsampling": 2}, 1),
        ("L", "JPEG", {"progressive": True}, 1),
        ("RGB", "JPEG", FULL_COLOR, 2),
        ("RGBA", "TIFF", {}, 1),
        ("RGB", "TIFF", {"tiffinfo": {274: 6}}, 1),
        ("RGBA", "TIFF", {"tiffinfo": {274: 6}}, 2),
    ],
)
def test_formats_that_take_twice_the_memory_count_twice(mode, kind, options, counted):
    data = encoded(Image.new(mode, (1000, 800)), kind, **options)
    decode(data, reading=Reading(max_pixels=counted * 800_000))
    half = f", half of which such a {kind} image may have" if counted == 2 else ""
    with pytest.raises(OSError, match=rf"too many for data\.max_pixels [\d,]*999{half}$"):
        decode(data, reading=Reading(max_pixels=counted * 800_000 - 1))


def test_narrow_images_count_as_wide_ones():
    data = encoded(Image.new("RGB", (1000, 3)), "PNG")
    assert decode(data, reading=Reading(max_pixels=512_000)).size == (1000, 3)
    with pytest.raises(OSError, match="too many"):
        decode(data, reading=Reading(max_pixels=511_999))


def test_a_jpeg_in_scans_of_one_component_counts_as_a_progressive_one():
    """Pillow writes none: its first scan is made one of a component alone, the data then are damaged."""
    data = encoded(photo(1000, 800), "JPEG", subsampling=0)
    scan = data.index(b"\xff\xda")
    alone = data[:scan] + EMPTY_SCAN + data[scan:]
    with pytest.raises(OSError, match="too many"):
        decode(alone, reading=Reading(max_pixels=1_599_999))


def tiff(entries: dict[int, tuple[int, int, int]], data: bytes = b"") -> bytes:
    """A TIFF of 10 x 10 pixels in grey: entries are kind, count and value by tag; the data come last."""
    entries = {256: (4, 1, 10), 257: (4, 1, 10), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)} | entries
    listed = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + listed + bytes(4) + data


def test_tiles_that_are_larger_than_their_image_count_as_large_as_they_are():
    tiles = {322: (4, 1, 20_000), 323: (4, 1, 20_000), 324: (4, 1, 200), 325: (4, 1, 100)}
    with pytest.raises(OSError, match="20,000 x 20,000 pixels are too many"):
        decode(tiff(tiles, bytes(200)))


@pytest.mark.parametrize("tag", [258, 273, 279])
def test_ever_so_many_numbers_in_the_directory_of_a_tiff_are_refused_before_they_are_read(tag):
    data = tiff({tag: (3, MANY, 200)}, b"\x08\x01" * MANY)
    tracemalloc.start()
    with pytest.raises(OSError, match="an entry of its directory has 1,000,000 numbers"):
        decode(data)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_a_file_has_at_most_four_bytes_for_each_pixel_allowed(tmp_path):
    (tmp_path / "a.bmp").write_bytes(encoded(PICTURE, "BMP") + bytes(2**20))
    source = open_images(str(tmp_path), choice=Choice(max_pixels=10))
    with pytest.raises(UserError, match=r"a\.bmp: .* bytes, more than 1,048,616 for data\.max_pixels 10"):
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
    "plain ppm": b"P3\n2000 2000 255\n" + b"0 " * 12_000_000,
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
