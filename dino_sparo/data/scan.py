"""Reads, hashes and decodes every image once, in parallel: damaged files and sizes.

Worker processes know neither torch nor the source: they get names of files, or places in shards, and give
back numbers, of which 25 bytes an image are kept. N: images.
"""

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from ctypes import c_longlong
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dino_sparo.data.decode import PROBLEMS
from dino_sparo.data.generated import ShapesSource
from dino_sparo.data.scan_files import HASH_BYTES, Chunk, examine, printable
from dino_sparo.data.shards import ShardSource
from dino_sparo.data.sources import ImageSource
from dino_sparo.data.torchvision_sets import ArraySource
from dino_sparo.errors import UserError
from dino_sparo.terminal import shows_bars

log = logging.getLogger("dino_sparo")

MAX_LISTED = 20
CHUNK_FILES = 32
LOG_EVERY_SECONDS = 30.0
LOOK_EVERY_SECONDS = 1.0
NO_FILE = -1


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


def scan_images(
    source: ImageSource, *, num_workers: int, description: str, timeout_seconds: float = 600.0
) -> ScanResult:
    """Read, hash and decode every file of a source as training will.

    Args:
        source: images; those in no files are skipped.
        num_workers: processes to start, from the main thread; 0 scans in this one, where nothing ends a hang.
        description: what the progress bar, or without a terminal the log, calls it.
        timeout_seconds: how long a worker may be at one file.

    Raises:
        UserError: a worker has died or hangs; the message names the file that it was at.
    """
    skipped = _why_skipped(source)
    num_files = 0 if skipped else len(source)
    sides = np.zeros((len(source), 2), dtype=np.int32)
    hashes = np.zeros((len(source), HASH_BYTES), dtype=np.uint8)
    total_bytes, counts = 0, dict.fromkeys(PROBLEMS, 0)
    listed: dict[str, list[tuple[int, str]]] = {kind: [] for kind in PROBLEMS}
    started = time.monotonic()
    with (
        closing(_examined(source, num_files, num_workers, timeout_seconds)) as chunks,
        _progress(description, num_files) as advance,
    ):
        for start, chunk in chunks:
            here = slice(start, start + len(chunk.sides))
            sides[here], hashes[here] = chunk.sides, chunk.hashes
            total_bytes += int(chunk.num_bytes.sum())
            for kind, number, file in chunk.problems:  # chunks come in any order
                counts[kind] += 1
                listed[kind] = sorted([*listed[kind], (number, file)])[:MAX_LISTED]
            advance(len(chunk.sides))
    readable = sides[:, 0] > 0
    report = ScanReport(
        images=len(source),
        readable=int(readable.sum()),
        problems={kind: Listing(counts[kind], tuple(file for _, file in listed[kind])) for kind in PROBLEMS},
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


class _Worker:
    """A process that examines one chunk of files at a time."""

    def __init__(self, context: SpawnContext) -> None:
        self.connection, theirs = context.Pipe()
        self.at = context.RawValue(c_longlong, NO_FILE)
        self.seen_at, self.quiet_seconds = NO_FILE, 0.0
        self.process = context.Process(target=_work, args=(theirs, self.at), daemon=True)
        self.process.start()
        theirs.close()  # so that the worker's death ends the connection

    def look(self, seconds: float) -> float:
        """How long the worker has been at its present file, now that another `seconds` have passed."""
        at = self.at.value
        self.quiet_seconds = self.quiet_seconds + seconds if at == self.seen_at else 0.0
        self.seen_at = at
        return self.quiet_seconds

    def death(self) -> str:
        """What ended the process."""
        self.process.join()
        code = self.process.exitcode or 0
        return f"died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"

    def error(self, source: ImageSource, what: str) -> UserError:
        """One sentence that names the file at which the worker has failed."""
        if self.at.value == NO_FILE:
            return UserError(
                f"a process that scans images {what} before its first file; mend what it says above, or give "
                f"machine.num_workers 0 to scan without such processes"
            )
        return UserError(
            f"{printable(source.name(self.at.value))}: a process that scans images {what} at this file; "
            f"repair or remove it, or give fewer machine.num_workers if memory ran out, then start again"
        )


def _work(connection: Connection, at: c_longlong) -> None:
    Image.core.set_blocks_max(2)  # keep the memory of an image and its copy: new pages cost half a decoding
    with suppress(EOFError, BrokenPipeError):  # the scanning process has gone
        while True:
            start, places = connection.recv()
            connection.send((start, examine(places, start, at)))


def _examined(
    source: ImageSource, num_files: int, num_workers: int, timeout_seconds: float
) -> Generator[tuple[int, Chunk]]:
    """The number of the first file and the findings of each chunk, in any order."""
    place = source.place if isinstance(source, ShardSource) else source.name
    chunks = (
        (start, [place(i) for i in range(start, min(start + CHUNK_FILES, num_files))])
        for start in range(0, num_files, CHUNK_FILES)
    )
    if num_workers == 0:
        yield from ((start, examine(places, start, c_longlong())) for start, places in chunks)
        return
    busy: dict[Any, _Worker] = {}  # by connection
    with _workers(min(num_workers, -(-num_files // CHUNK_FILES))) as workers:
        idle, looked = workers, time.monotonic()
        while True:
            for worker, chunk in zip(idle, chunks, strict=False):
                with suppress(BrokenPipeError):  # a dead worker is found below
                    worker.connection.send(chunk)
                busy[worker.connection] = worker
            if not busy:
                return
            idle = [busy.pop(connection) for connection in wait(list(busy), LOOK_EVERY_SECONDS)]
            for worker in idle:
                try:
                    findings = worker.connection.recv()
                except (EOFError, OSError) as error:
                    raise worker.error(source, worker.death()) from error
                yield findings
            # At most two looks' worth, so that a program that was stopped and goes on has not hung.
            passed = min(time.monotonic() - looked, 2 * LOOK_EVERY_SECONDS)
            looked = time.monotonic()
            for worker in busy.values():
                if worker.look(passed) > timeout_seconds:
                    raise worker.error(source, f"did nothing for {timeout_seconds:g} s")


@contextmanager
def _workers(count: int) -> Iterator[list[_Worker]]:
    """Start workers, and kill them at the end whatever they do."""
    # Spawned, as a forked process would inherit torch's threads and the other workers' connections.
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    try:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit: Ctrl-C is not for them
        try:
            for _ in range(count):
                workers.append(_Worker(context))
        finally:
            signal.signal(signal.SIGINT, handler)
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()
