"""What a scan does with a file: reads, hashes and decodes it, and tells what is wrong with it.

Knows neither torch nor the source of the images.
"""

import hashlib
import warnings
from collections.abc import Sequence
from ctypes import c_longlong
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import UnidentifiedImageError

from dino_sparo.data.decode import open_image, to_rgb
from dino_sparo.data.packed import Place

PROBLEMS = ("zero_byte", "not_an_image", "truncated", "unreadable")
HASH_BYTES = 16
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


class Chunk(NamedTuple):
    """What was found in n consecutive files."""

    sides: NDArray[np.int32]  # (n, 2) short and long side in pixels, 0 if the image cannot be decoded
    num_bytes: NDArray[np.int64]  # (n,)
    hashes: NDArray[np.uint8]  # (n, 16)
    problems: list[tuple[str, int, str]]  # kind, number in the source, name and reason


def examine(places: Sequence[str | Place], start: int, at: c_longlong) -> Chunk:
    """Read, hash and decode files number `start` onwards; `at` holds the number of the present one."""
    sides = np.zeros((len(places), 2), dtype=np.int32)
    num_bytes = np.zeros(len(places), dtype=np.int64)
    hashes = np.zeros((len(places), HASH_BYTES), dtype=np.uint8)
    problems = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large images, odd metadata: training takes them
        for position, place in enumerate(places):
            at.value = start + position
            data = b""
            try:
                data = _read(place)
                digest = hashlib.blake2b(data, digest_size=HASH_BYTES).digest()
                hashes[position] = np.frombuffer(digest, dtype=np.uint8)
                with open_image(data) as image:
                    sides[position] = sorted(to_rgb(image).size)
            except Exception as error:  # a damaged file makes PIL raise anything, and must not end the scan
                kind, reason = problem_of(data, error)
                name = printable(place if isinstance(place, str) else place.name)
                problems.append((kind, start + position, f"{name}: {reason}"))
            num_bytes[position] = len(data)
    return Chunk(sides, num_bytes, hashes, problems)


def _read(place: str | Place) -> bytes:
    if not isinstance(place, str):
        return place.read()
    with open(place, "rb") as file:
        return file.read()


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


def printable(name: str) -> str:
    """A file name as text, also one that is not valid in the file system's encoding."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
