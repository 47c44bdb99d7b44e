"""Decode the bytes of an image file to RGB pixels, or explain why they cannot be read."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from io import BytesIO
from math import prod
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from dino_sparo.errors import UserError
from dino_sparo.files import open_regular

if TYPE_CHECKING:
    from torch import Tensor

# Formats that are read, whatever the file name; Pillow reads others, and starts Ghostscript for one of them.
FORMATS = ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"]
FORMATS += ["AVIF"] if find_spec("PIL.AvifImagePlugin") else []  # since Pillow 11.3
MAX_PIXELS = 2**26  # per image unless data.max_pixels is set; decoding takes about 0.5 GB
NARROW = 512  # pixels; a narrower image counts as this wide
BYTES_PER_PIXEL, BYTES_BESIDE = 4, 2**20  # largest file: bytes per pixel, and for metadata
HEADER_READS, DATA_READS = 2**14, 2**6  # reads allowed for a header; then one more per so many bytes
MAX_SCANS, MAX_COMMENTS = 200, 1000
MAX_PLAIN = 2**22  # bytes of an image that is written as text, which Pillow parses in Python
MAX_NUMBERS = 2**19  # per entry of a TIFF directory; Pillow converts them to Python numbers
IN_BYTES = (1, 2, 7)  # types of entries that stay bytes
PLAIN = (b"P1", b"P2", b"P3")  # first bytes of PBM, PGM, and PPM files that are written as text
BLOCK_PIXELS = 2**20
GAP = 2.0  # a JPEG file is decoded at least at this multiple of the wanted size
PROBLEMS = ("zero_byte", "not_an_image", "truncated", "unreadable")
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# First bytes of files in the formats that are read.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", *TIFF, b"BM", b"P4", b"P5", b"P6", b"GIF8")
OTHER_FORMATS = {  # formats that are not read, and the first bytes of their files
    "HEIC": rb"....ftyp(hei[cxms]|hevc|mif1|msf1)(?!.{0,48}avif)",
    "JPEG 2000": rb"\0\0\0\x0cjP  ",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "Photoshop": rb"8BPS",
}
SAMPLES = {1: "unsigned integers", 2: "signed integers", 3: "floating point"}
# Pillow applies the EXIF orientation of TIFF files, and of no other format; this undoes it.
UNTURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class UnreadableImageError(UserError):
    """An image that cannot be read: its name, the reason, and what to do about it."""

    def __init__(self, name: str, reason: str, remedy: str = "repair or remove it, then run again") -> None:
        super().__init__(name, reason, remedy)  # all three, so that it can be pickled
        self.name, self.reason, self.remedy = name, reason, remedy

    def __str__(self) -> str:
        return f"{self.name}: the image cannot be read ({self.reason}); {self.remedy}"


def problem_of(data: bytes, error: Exception) -> tuple[str, str]:
    """Kind (one of PROBLEMS) and reason of an error that was raised for a file with this content."""
    reason = getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        return _unknown(data)
    webp_bytes = 8 + int.from_bytes(data[4:8], "little")  # PIL does not report a truncated WebP
    if "truncated" in reason.lower() or (data.startswith(b"RIFF") and webp_bytes > len(data)):
        return "truncated", reason
    return "unreadable", reason


def _unknown(data: bytes) -> tuple[str, str]:
    """Kind and reason for the content of a file that Pillow does not recognize."""
    if not data:
        return "zero_byte", "the file is empty"
    if data.startswith(b"version https://git-lfs"):
        return "not_an_image", "a Git LFS pointer instead of the image; run git lfs pull"
    if name := next((name for name, start in OTHER_FORMATS.items() if re.match(start, data, re.DOTALL)), ""):
        return "unreadable", f"{name} is not supported; convert it to JPEG or PNG"
    if not data.startswith(SIGNATURES) and data[4:11] != b"ftypavi":  # as AVIF begins
        return "not_an_image", "not a known image format"
    if data.startswith(TIFF) and (kind := _kind_of_tiff(data)):
        return "unreadable", f"Pillow does not support this kind of TIFF: {kind}"
    return "truncated", "its header is truncated or damaged"


def _kind_of_tiff(data: bytes) -> str:
    """Bands and sample type of a complete TIFF, in words; empty if it is damaged."""
    try:
        directory = ImageFileDirectory_v2(data[: 16 if b"+" in data[:4] else 8])
        file = BytesIO(data)
        file.seek(directory.next)
        directory.load(file)
        offsets, sizes = (273, 279) if 273 in directory else (324, 325)  # of strips or of tiles
        if max(map(add, directory[offsets], directory[sizes])) > len(data):
            return ""
        (bits, *_), (sample, *_) = directory[258], directory.get(339, (1,))
        return f"{directory.get(277, 1)} bands of {bits} bits, {SAMPLES.get(sample, 'of another type')}"
    except Exception:  # a damaged directory makes Pillow raise anything
        return ""


class Reading(NamedTuple):
    """How images are read.

    Attributes:
        max_pixels: number of pixels of the largest image that is decoded; a very narrow one counts more.
        value_range: pixel values of more than 8 bits that become black and white; None: by the image's mode.
    """

    max_pixels: int = MAX_PIXELS
    value_range: tuple[float, float] | None = None

    def check_size(self, num_bytes: int) -> None:
        """Raises OSError: the file of an image has more bytes than are read into memory."""
        most = BYTES_PER_PIXEL * self.max_pixels + BYTES_BESIDE
        if num_bytes > most:
            raise OSError(f"its file has {num_bytes:,} bytes, more than {most:,} {self._allowed()}")

    def read_file(self, path: str | Path) -> bytes:
        """The bytes of an image file. Raises OSError: not a regular file, or too large."""
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            self.check_size(size)
            return file.read(size)  # no more, even if the file grows

    def check_pixels(self, image: Image.Image, *, in_scans: bool = False) -> None:
        """Raises OSError: an image has more pixels than are decoded; `in_scans` as in `_takes_twice`."""
        width, height = stored_size(image)
        if isinstance(image, TiffImageFile):  # its tiles may be larger than the image, and are decoded whole
            tile = [side for tag in (322, 323) if isinstance(side := image.tag_v2.get(tag), int)]
            width, height = max((width, height), tuple(tile), key=prod) if len(tile) == 2 else (width, height)
        pixels = max(width * height, NARROW * max(width, height))
        twice = _takes_twice(image, in_scans)
        if pixels * (2 if twice else 1) > self.max_pixels:
            half = f", half of which such a {image.format} image may have" if twice else ""
            raise OSError(f"{width:,} x {height:,} pixels are too many {self._allowed()}{half}")

    def _allowed(self) -> str:
        return f"for data.max_pixels {self.max_pixels:,}"


AS_IS = Reading()


class _Content(BytesIO):
    """A file in memory with a limit on the number of reads: Pillow reads headers byte by byte, and data in
    chunks whose size the file determines."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.reads_left, self.end = HEADER_READS, 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise OSError("its header or data are in too many pieces")
        data = super().read(size)
        self.end = self.tell()
        return data


def open_image(data: bytes, reading: Reading = AS_IS) -> Image.Image:
    """Open an image in one of FORMATS, without decoding it; all images are opened by this function.

    Raises:
        UnidentifiedImageError: the file has none of these formats.
        OSError: the image is too large, or decoding it would take very long.
        Exception: the header is damaged; Pillow raises many types.
    """
    if data.startswith(PLAIN) and (len(data) > MAX_PLAIN or data.count(b"#") > MAX_COMMENTS):
        raise OSError("it is written as text that is too long or has too many comments")
    if data.startswith((b"II", b"MM")):
        _check_directory(data)
    content = _Content(data)
    image = Image.open(content, formats=FORMATS)
    in_scans = isinstance(image, JpegImageFile) and _in_scans(image, data, content.end)
    reading.check_pixels(image, in_scans=in_scans)
    if in_scans and _num_scans(data) > MAX_SCANS:  # of a JPEG in one scan, further scans are not decoded
        raise OSError("it has too many scans")
    content.reads_left += len(data) // DATA_READS
    return image


def _check_directory(data: bytes) -> None:
    """Raises OSError: an entry of a TIFF's directory has too many numbers."""
    order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    long, entry, size = (8, 20, 8) if 43 in data[2:4] else (2, 12, 4)  # BigTIFF, else TIFF
    start = number(2 * size if size == 8 else size, size)
    for at in range(start + long, start + long + entry * min(number(start, long), HEADER_READS), entry):
        if number(at + 2, 2) not in IN_BYTES and number(at + 4, size) > MAX_NUMBERS:
            raise OSError(f"an entry of its directory has {number(at + 4, size):,} numbers")


def _takes_twice(image: Image.Image, in_scans: bool) -> bool:
    """Whether decoding takes 16 bytes per pixel instead of 8."""
    if isinstance(image, JpegImageFile):  # several scans: all coefficients are in memory
        factors = [across * down for _, across, down, _ in image.layer]
        return in_scans and sum(factors) > 2 * max(factors)
    if isinstance(image, TiffImageFile):  # a strip may be the whole image, and turning copies it
        bits = image.tag_v2.get(258, (1,))
        bits = sum(bits) * (image.tag_v2.get(277, 1) if len(bits) == 1 else 1)
        return bits > 32 or (bits == 32 and orientation(image) in UNTURNED)
    return image.format in ("WEBP", "AVIF")


def _in_scans(image: JpegImageFile, data: bytes, end: int) -> bool:
    """Whether a JPEG has several scans: it is progressive, or some components are missing in its first scan,
    whose header is the last one that Pillow has read."""
    first = data.rfind(b"\xff\xda", 0, end)
    return "progressive" in image.info or data[first + 4] != len(image.layer)


def _num_scans(data: bytes) -> int:
    """Number of scans of a JPEG, in a sixth of the time of `data.count`."""
    halves = (np.frombuffer(data, "<u2", (len(data) - odd) // 2, odd) for odd in (0, 1))
    return sum(int(np.count_nonzero(half == 0xDAFF)) for half in halves)


def decode(data: bytes, max_side: int | None = None, reading: Reading = AS_IS) -> Image.Image:
    """Decode an image to RGB; one with a side longer than `max_side` is resized, keeping its aspect ratio.

    A large JPEG file is decoded at a half, a quarter, or an eighth, but at least at twice the wanted size.

    Raises:
        Exception: it cannot be decoded; Pillow raises many types.
    """
    with open_image(data, reading) as image:
        stored = stored_size(image)
        if max_side is None or max(stored) <= max_side:
            return to_rgb(image, reading.value_range)
        size = bounded(stored, max_side)
        if image.mode in ("RGB", "L"):  # draft would change the mode of others
            image.draft(None, (round(GAP * size[0]), round(GAP * size[1])))
        rgb = to_rgb(image, reading.value_range)
        return rgb.resize(size, Image.Resampling.BICUBIC, reducing_gap=GAP)


def decode_pixels(data: bytes, max_side: int | None = None, reading: Reading = AS_IS) -> "Tensor":
    """The pixels of `decode`, uint8 (height, width, 3), for workers: standard error is closed meanwhile.

    torchvision decodes gray and color JPEG files to the same pixels in less time, since no PIL image is made.
    Whatever it does not decode, Pillow decodes; all, once torchvision has no decoder (deprecated since 0.29).

    Raises:
        Exception: as `decode`.
    """
    import torch  # here, since commands that need no torch read images too

    with open_image(data, reading) as image:
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        plain = plain and bounded(image.size, max_side) == image.size
    if plain:
        with suppress(Exception), warnings.catch_warnings(action="ignore"), _without_standard_error():
            from torchvision.io import ImageReadMode, decode_jpeg

            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return decode_jpeg(content, mode=ImageReadMode.RGB).permute(1, 2, 0)
    return torch.from_numpy(np.array(decode(data, max_side, reading)))


@contextmanager
def _without_standard_error() -> Iterator[None]:
    """Discard what C code prints about damaged data, since it does not name the file."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def size_of(data: bytes, max_side: int | None = None) -> tuple[int, int] | None:
    """Width and height of the result of `decode`, from the header of the file; None if that is damaged."""
    try:
        with open_image(data) as image:
            return bounded(stored_size(image), max_side)
    except Exception:  # a damaged header makes Pillow raise anything
        return None


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as stored in the file, before its EXIF orientation is applied."""
    return (image.tag_v2[256], image.tag_v2[257]) if isinstance(image, TiffImageFile) else image.size


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (not turned) also if EXIF is damaged. Raises as `load`."""
    if not isinstance(image, TiffImageFile):  # loading would turn it
        image.load()  # EXIF may follow the pixels
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF makes Pillow raise anything, but the image can be read
        return 1


def bounded(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """A size with the same aspect ratio whose longer side is at most `max_side`."""
    if max_side is None or max(size) <= max_side:
        return size
    width, height = (max(1, round(side * max_side / max(size))) for side in size)
    return width, height


def to_rgb(image: Image.Image, value_range: tuple[float, float] | None = None) -> Image.Image:
    """Convert an image to 8-bit RGB; alpha and EXIF orientation are ignored, as in torchvision's loader.

    Of pixels with more than 8 bits, `value_range`, or else the range of the image's mode, becomes 0 to 255.

    Raises:
        OSError: `value_range` is given, but Pillow returns only 8 of the image's bits.
        Exception: it cannot be decoded.
    """
    if value_range is not None and _is_cut_to_8_bits(image):
        raise OSError(
            "Pillow reduces 16 bits per channel in color or with alpha to 8, so data.value_range cannot be "
            "applied; convert it to gray or to 8 bits"
        )
    turned = orientation(image) if isinstance(image, TiffImageFile) else 1
    maximum = _maximum_of_ppm(image)  # loading forgets it
    image.load()
    if turned in UNTURNED and orientation(image) != turned:
        image = image.transpose(UNTURNED[turned])
    if is_deep(image):  # PIL would clip its pixels to white
        if maximum:  # it has become 65535
            low, high = value_range or (0.0, maximum)
            value_range = low * 65535 / maximum, high * 65535 / maximum
        return _to_8_bits(image, value_range)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_cut_to_8_bits(image: Image.Image) -> bool:
    """Whether an image that is not decoded yet has more than 8 bits per channel that Pillow reduces to 8."""
    if is_deep(image):
        return False
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(258, (8,))) > 8
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) or _maximum_of_ppm(image) > 255


def _maximum_of_ppm(image: Image.Image) -> int:
    """The value of white in the header of a PGM or PPM image that is not decoded yet; 0 for other images."""
    tiles = getattr(image, "tile", ())
    if image.format != "PPM" or image.mode == "F" or not tiles:
        return 0
    arguments = tiles[0][3]
    return (65535 if ";16" in arguments else 255) if isinstance(arguments, str) else int(arguments[1])


def is_deep(image: Image.Image) -> bool:
    """Whether decoded pixels have more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _to_8_bits(image: Image.Image, value_range: tuple[float, float] | None) -> Image.Image:
    """Convert an image with more than 8 bits to RGB, in blocks of rows. Pixels that are not finite do not
    count for the range, and NaN becomes black."""
    rows = max(1, BLOCK_PIXELS // image.width)
    boxes = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]

    def block(box: tuple[int, int, int, int]) -> NDArray[np.number]:
        return np.asarray(image if len(boxes) == 1 else image.crop(box))

    if value_range is None:
        low, factor = 0.0, _factor(image.mode, max(_finite_max(block(box)) for box in boxes))
    else:
        low, factor = value_range[0], 255.0 / (value_range[1] - value_range[0])
    rgb = Image.new("RGB", image.size)
    for box in boxes:
        values = block(box).astype(np.float64)
        values -= low
        values *= factor
        np.clip(np.rint(values, out=values), 0, 255, out=values)
        if image.mode == "F":
            values[np.isnan(values)] = 0
        rgb.paste(Image.fromarray(values.astype(np.uint8)).convert("RGB"), box)
    return rgb


def _finite_max(values: NDArray[np.number]) -> float:
    """The highest finite value, at least 0."""
    highest = float(values.max(initial=0))
    return highest if np.isfinite(highest) else float(values.max(initial=0, where=np.isfinite(values)))


def _factor(mode: str, highest: float) -> float:
    """Factor from pixels of more than 8 bits to 0..255, by the highest; modes I and F have no fixed range."""
    overshoot = 1.1 if mode == "F" else 1.0  # resizing may have enlarged floating-point pixels
    if mode == "F" and highest <= overshoot:
        return 255.0
    if mode in ("I", "F") and highest <= 255 * overshoot:
        return 1.0
    return 255.0 / max(65535.0, highest)
