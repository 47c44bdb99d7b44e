"""Reads, hashes and decodes every image once, in parallel: damaged files and sizes.

Of what is read 25 bytes an image are kept. N: images.
"""

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from tqdm import tqdm

from dino_sparo.data.decode import PROBLEMS, open_image, problem_of, to_rgb
from dino_sparo.data.generated import ShapesSource
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.torchvision_sets import ArraySource
from dino_sparo.data.workers import WatchedLoader
from dino_sparo.terminal import shows_bars

log = logging.getLogger("dino_sparo")

MAX_LISTED = 20
BATCH_FILES = 32
HASH_BYTES = 16
LOG_EVERY_SECONDS = 30.0


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of some numbers."""

    smallest: int
    median: int
    largest: int


@dataclass(frozen=True)
class Listing:
    """How many there are, and the first 20 of them."""

    count: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class ScanReport:
    """What a scan found, in plain values."""

    images: int
    readable: int
    problems: dict[str, Listing]
    """Each of PROBLEMS -> the files that have it, with the reason."""
    short_side: Spread | None
    """In pixels, of readable images; None without any."""
    long_side: Spread | None
    """In pixels, of readable images; None without any."""
    total_bytes: int
    seconds: float
    skipped: str
    """Why nothing was scanned; empty after a scan."""


@dataclass(frozen=True, eq=False)
class ScanResult:
    """A scan's report, and what it takes to find copies."""

    report: ScanReport
    source: ImageSource
    readable: NDArray[np.bool_]
    """(N,)"""
    hashes: NDArray[np.uint8]
    """BLAKE2b of each file: (N, 16); zeros where the file could not be read."""


class Finding(NamedTuple):
    """What was found in a file."""

    num_bytes: int
    digest: bytes = bytes(HASH_BYTES)
    """Zeros if it could not be read."""
    sides: tuple[int, int] = (0, 0)
    """Short and long side in pixels, zeros if it could not be decoded."""
    problem: tuple[str, str] | None = None
    """Kind, one of PROBLEMS, and name with the reason."""


class _Files(Dataset):
    """Item -> what is found in a file of a source."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Finding:
        data, digest = b"", bytes(HASH_BYTES)
        try:
            data = self.source.read(index)
            digest = hashlib.blake2b(data, digest_size=HASH_BYTES).digest()
            # Large images and odd metadata make warnings, but training takes them.
            with warnings.catch_warnings(action="ignore"), open_image(data) as image:
                short, long = sorted(to_rgb(image).size)
            return Finding(len(data), digest, (short, long))
        except Exception as error:  # a damaged file makes PIL raise anything, and must not end the scan
            kind, reason = problem_of(data, error)
            return Finding(len(data), digest, problem=(kind, f"{self.name(index)}: {reason}"))

    def name(self, index: int) -> str:
        return printable(self.source.name(index))


def scan_images(
    source: ImageSource, *, num_workers: int, description: str, timeout_seconds: float = 600.0
) -> ScanResult:
    """Read, hash and decode every file of a source as training will.

    Args:
        source: images; those in no files are skipped.
        num_workers: processes to start, from the main thread; 0 scans in this one, where nothing ends a hang.
        description: what the progress bar, or without a terminal the log, calls it.
        timeout_seconds: how long the next 32 files may take.

    Raises:
        StuckError: a worker has died or hangs; the message names the file that it was at.
    """
    skipped = _why_skipped(source)
    sides = np.zeros((len(source), 2), dtype=np.int32)
    hashes = np.zeros((len(source), HASH_BYTES), dtype=np.uint8)
    total_bytes, done = 0, 0
    problems: dict[str, list[str]] = {kind: [] for kind in PROBLEMS}
    started = time.monotonic()
    if not skipped:
        files = _Files(source)
        batches = WatchedLoader(
            files,
            image_of=int,
            name=files.name,
            num_workers=min(num_workers, -(-len(source) // BATCH_FILES)),
            timeout_seconds=timeout_seconds,
            collate=list,
            batch_size=BATCH_FILES,
        )
        with batches.failures_explained(), _progress(description, len(source)) as advance:
            for findings in batches:
                for number, finding in enumerate(findings, done):
                    sides[number] = finding.sides
                    hashes[number] = np.frombuffer(finding.digest, np.uint8)
                    total_bytes += finding.num_bytes
                    if finding.problem is not None:
                        problems[finding.problem[0]].append(finding.problem[1])
                done += len(findings)
                advance(len(findings))
    readable = sides[:, 0] > 0
    report = ScanReport(
        images=len(source),
        readable=int(readable.sum()),
        problems={kind: listing(found) for kind, found in problems.items()},
        short_side=spread(sides[readable, 0]),
        long_side=spread(sides[readable, 1]),
        total_bytes=total_bytes,
        seconds=time.monotonic() - started,
        skipped=skipped,
    )
    return ScanResult(report, source, readable, hashes)


def _why_skipped(source: ImageSource) -> str:
    """Why images have no files to read; empty if they have."""
    if isinstance(source, ShapesSource):
        return "generated pictures are no files"
    return "torchvision has compared their checksum" if isinstance(source, ArraySource) else ""


def listing(names: list[str]) -> Listing:
    """How many names there are, and the first of them."""
    return Listing(len(names), tuple(names[:MAX_LISTED]))


def spread(numbers: NDArray[np.integer]) -> Spread | None:
    """Of numbers (n,); None without any."""
    if len(numbers) == 0:
        return None
    return Spread(int(numbers.min()), round(float(np.median(numbers))), int(numbers.max()))


@contextmanager
def _progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of images done: moves a bar, or without a terminal logs at times."""
    started = logged = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, logged
        done += count
        bar.update(count)
        now = time.monotonic()
        if bar.disable and now - logged >= LOG_EVERY_SECONDS:
            logged, speed = now, done / (now - started)
            left = timedelta(seconds=round((total - done) / speed))
            log.info(f"{description}: {done:,} of {total:,} images, {speed:.0f} images/s, left {left}")

    with tqdm(total=total, desc=description, unit="img", leave=False, disable=not shows_bars()) as bar:
        yield advance


def printable(name: str) -> str:
    """A file name as text, also one that is not valid in the file system's encoding."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
