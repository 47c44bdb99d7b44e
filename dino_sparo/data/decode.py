"""From the bytes of an image file to RGB pixels, or why they are no image.

Knows neither torch nor the sources of images.
"""

from importlib.util import find_spec
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dino_sparo.errors import UserError

# What is read, whatever a file is called; Pillow knows others, and starts Ghostscript for one of them.
FORMATS = ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"]
FORMATS += ["AVIF"] if find_spec("PIL.AvifImagePlugin") else []  # since Pillow 11.3
MAX_BYTES = 2**28 + 2**20  # of an image's file
GAP = 2.0  # a JPEG file is decoded at this multiple of the wanted size at least
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what PIL raises
PROBLEMS = ("zero_byte", "not_an_image", "truncated", "unreadable")
# How files of the formats that are read begin.
SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n",
    b"RIFF",
    b"II*\0",
    b"MM\0*",
    b"BM",
    b"P4",
    b"P5",
    b"P6",
    b"GIF8",
)


class UnreadableImageError(UserError):
    """An image that cannot be read: its name, the reason, and what to do about it."""

    def __init__(self, name: str, reason: str, remedy: str = "repair or remove it, then start again") -> None:
        super().__init__(name, reason, remedy)  # all three, so that a worker process can send it
        self.name, self.reason, self.remedy = name, reason, remedy

    def __str__(self) -> str:
        return f"{self.name}: the image cannot be read ({self.reason}); {self.remedy}"


def problem_of(data: bytes, error: Exception) -> tuple[str, str]:
    """Kind, one of PROBLEMS, and reason of the error that a file of this content has led to."""
    reason = getattr(error, "strerror", None) or str(error).rstrip(".") or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        if not data:
            return "zero_byte", "the file is empty"
        if not data.startswith(SIGNATURES) and data[4:8] != b"ftyp":  # as AVIF begins
            return "not_an_image", "no known kind of image"
        return "truncated", "begins as an image, but its header is cut or damaged"
    webp_bytes = 8 + int.from_bytes(data[4:8], "little")  # PIL does not say that a WebP is cut
    if "truncated" in reason.lower() or (data.startswith(b"RIFF") and webp_bytes > len(data)):
        return "truncated", reason
    return "unreadable", reason


def check_size(num_bytes: int) -> None:
    """Raises OSError: an image's file has more bytes than are read into memory."""
    if num_bytes > MAX_BYTES:
        raise OSError(f"the file has {num_bytes:,} bytes, more than the {MAX_BYTES:,} that are read")


def open_image(data: bytes) -> Image.Image:
    """The image in a file of one of FORMATS, not decoded yet; every image of this project is opened here.

    Raises:
        UnidentifiedImageError: it is of none of them.
        OSError, ValueError, SyntaxError, Image.DecompressionBombError: its header is damaged.
    """
    return Image.open(BytesIO(data), formats=FORMATS)


def decode(data: bytes, max_side: int | None = None) -> Image.Image:
    """The image in RGB; one with a longer side than `max_side` is reduced to it, keeping its shape.

    A large JPEG file is decoded at a half, a quarter or an eighth already, at twice the wanted size at least.

    Raises:
        OSError, ValueError: it cannot be decoded; PIL raises SyntaxError and DecompressionBombError too.
    """
    with open_image(data) as image:
        if max_side is None or max(image.size) <= max_side:
            return to_rgb(image)
        size = bounded(image.size, max_side)
        if image.mode in ("RGB", "L"):  # others would change their mode
            image.draft(None, (round(GAP * size[0]), round(GAP * size[1])))
        return to_rgb(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=GAP)


def size_of(data: bytes, max_side: int | None = None) -> tuple[int, int] | None:
    """Width and height that `decode` gives, told by the beginning of the file; None if it does not tell."""
    try:
        with open_image(data) as image:
            return bounded(image.size, max_side)
    except UNREADABLE:
        return None


def bounded(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """A size of the same shape whose longer side is at most `max_side`."""
    if max_side is None or max(size) <= max_side:
        return size
    width, height = (max(1, round(side * max_side / max(size))) for side in size)
    return width, height


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB; alpha is dropped as torchvision's loader does, 16 bits become 8."""
    if image.mode.startswith("I") or image.mode == "F":  # PIL would clip these to white
        values = np.asarray(image, dtype=np.float64)
        values = values * _to_8_bits(image.mode, values)
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_8_bits(mode: str, values: NDArray[np.float64]) -> float:
    """Factor that brings pixels of more than 8 bits to 0..255; modes I and F do not say their range."""
    highest = values.max(initial=0)
    overshoot = 1.1 if mode == "F" else 1.0  # what resizing adds to floating point pixels
    if mode == "F" and highest <= overshoot:
        return 255.0
    if mode in ("I", "F") and highest <= 255 * overshoot:
        return 1.0
    return 255.0 / max(65535.0, highest)
