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

from dino_sparo.data.decode import open_image, problem_of, to_rgb
from dino_sparo.data.shards import Place

HASH_BYTES = 16


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


def printable(name: str) -> str:
    """A file name as text, also one that is not valid in the file system's encoding."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
