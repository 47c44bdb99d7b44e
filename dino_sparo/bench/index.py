"""`dino-sparo bench --what index`: time and memory of starting many processes on a folder of many images.

The images are empty files in the folder for temporary files (TMPDIR): nothing here reads one.
"""

import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dino_sparo.data.index import open_index
from dino_sparo.data.sources import ImageSource, open_images
from dino_sparo.data.walk import CLOCK_TICK_NS
from dino_sparo.errors import UserError
from dino_sparo.terminal import shows_bars

log = logging.getLogger("dino_sparo")

SHARES = (0.1, 0.5, 1.0)
NUM_CLASSES = 1000
NUM_LOOKED_UP = 100_000  # names that each worker asks for, from all over the folder
PATIENCE_SECONDS = 600.0  # of processes that wait for the others
MEMORY = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True)
class Memory:
    """Bytes of one process."""

    private: int
    """What no other process has."""
    shared: int
    """Its share of what it has together with others: Pss without the private part."""


@dataclass(frozen=True)
class Build:
    """What the first process on a folder measures."""

    seconds: float
    file_bytes: int
    list_bytes: int
    """What a Python list of the names would take, in every process."""


@dataclass(frozen=True)
class Start:
    """What each of the processes measures that start together when there is an index."""

    import_seconds: float
    """Until the program is imported, torch with it."""
    open_seconds: float
    workers_seconds: float
    """From there to the first answer of the last data worker."""
    rank: Memory
    workers: list[Memory]


def bench_index(num_files: int, ranks: int, workers: int) -> None:
    """Print a table for 10 %, 50 % and all of `num_files` images, with `workers` workers in each of `ranks`.

    Raises:
        UserError: the system does not tell the memory of a process, or a number is too small.
    """
    for key, value, least in (
        ("index_files", num_files, 10),
        ("index_processes", ranks, 1),
        ("index_workers", workers, 1),
    ):
        if value < least:
            raise UserError(f"{key} is {value}, expected at least {least}; give a larger number")
    if not MEMORY.exists():
        raise UserError(
            f"{MEMORY} does not exist; this benchmark needs Linux, where it tells a process's memory"
        )
    sizes = [round(share * num_files) for share in SHARES]
    results = []
    with tempfile.TemporaryDirectory(prefix="dino_sparo-bench-") as temporary:
        root = Path(temporary, "images")
        for have, size in zip([0, *sizes], sizes, strict=False):
            _make_files(root, have, size)
            time.sleep(1.1 * CLOCK_TICK_NS / 1e9)  # an index of folders that have just changed is not trusted
            results.append(_measure(root, Path(temporary, "cache"), ranks, workers))
        print(_table(sizes, results, ranks, workers), flush=True)
        log.info("removing %d files", num_files)


def _make_files(root: Path, have: int, size: int) -> None:
    """Make a folder of `have` images one of `size`, evenly over the classes."""
    with tqdm(total=size - have, desc="making files", leave=False, disable=not shows_bars()) as bar:
        for label in range(NUM_CLASSES):
            folder = root / f"n{label:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            numbers = range(*((total - label + NUM_CLASSES - 1) // NUM_CLASSES for total in (have, size)))
            for number in numbers:
                open(f"{folder}/{folder.name}_{number}.JPEG", "xb").close()
            bar.update(len(numbers))


def _measure(root: Path, cache: Path, ranks: int, workers: int) -> tuple[Build, list[Start]]:
    context = multiprocessing.get_context("spawn")  # fresh processes, as a launcher starts them

    def processes(number: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            number, context, _enter, (cache, context.Barrier(number, timeout=PATIENCE_SECONDS))
        )

    with processes(1) as pool:
        with _deaf_to_interrupts():
            build = pool.submit(_build, root)
        build.result()
    with processes(ranks) as pool:
        with _deaf_to_interrupts():
            starts = [pool.submit(_start, root, workers, time.time()) for _ in range(ranks)]
        return build.result(), [start.result() for start in starts]


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started within leave Ctrl-C to the first one, which ends them."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


# --- In the fresh processes

_together: list[Barrier] = []


def _enter(cache: Path, barrier: Barrier) -> None:
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores
    os.environ["DINO_SPARO_CACHE"] = str(cache)
    _together.append(barrier)


def _build(root: Path) -> Build:
    started = time.perf_counter()
    index = open_index(root)
    seconds = time.perf_counter() - started
    list_bytes = sum(sys.getsizeof(index.name(i)) + 8 for i in range(len(index)))  # with a pointer each
    return Build(seconds, index.path.stat().st_size, list_bytes)


def _start(root: Path, workers: int, submitted: float) -> Start:
    import_seconds = time.time() - submitted
    _together[0].wait()
    started = time.perf_counter()
    source = open_images(str(root))
    opened = time.perf_counter()
    loader = DataLoader(
        _Probe(source, workers),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=1,
        persistent_workers=True,
        # In a fresh process of `spawn` its workers would be spawned too; those of a run are forked on Linux.
        multiprocessing_context=multiprocessing.get_all_start_methods()[0],
    )
    list(loader)  # one item from each worker
    answered = time.perf_counter()
    list(loader)  # looks up names
    _together[0].wait()  # all have them: what is shared counts as shared
    worker_memory = list(loader)
    rank_memory = _memory()
    _together[0].wait()
    return Start(import_seconds, opened - started, answered - opened, rank_memory, worker_memory)


class _Probe(Dataset):
    """One item a worker, asked for three times: a name; after looking up many; the worker's memory."""

    def __init__(self, source: ImageSource, workers: int) -> None:
        self.source, self.workers = source, workers
        self.times_asked = 0

    def __len__(self) -> int:
        return self.workers

    def __getitem__(self, item: int) -> str | Memory:
        self.times_asked += 1
        if self.times_asked == 3:
            return _memory()
        if self.times_asked == 2:
            for index in random.Random(item).choices(range(len(self.source)), k=NUM_LOOKED_UP):
                self.source.name(index)
        return self.source.name(item)


def _memory() -> Memory:
    """The memory of this process, without its swapped part."""
    kilobytes = {key: int(value) for key, value, *_ in map(str.split, MEMORY.read_text().splitlines()[1:])}
    private = kilobytes["Private_Clean:"] + kilobytes["Private_Dirty:"]
    return Memory(1024 * private, 1024 * (kilobytes["Pss:"] - private))


# --- The report


def _table(sizes: list[int], results: list[tuple[Build, list[Start]]], ranks: int, workers: int) -> str:
    import_seconds = max(start.import_seconds for _, starts in results for start in starts)
    lines = [
        f"empty files in {NUM_CLASSES} class folders, {ranks} processes x {workers} data workers, "
        f"{os.cpu_count()} cores; the longest or most of all processes",
        f"before what is counted here a process takes up to {import_seconds:.1f} s to start and import torch",
        f"{'':>9} |{'index':^26} |{'start-up s':^15} |{'worker MB':^16} |{'process MB':^16}",
        f"{'images':>9} |{'build s':>8}{'file MB':>9}{'list MB':>9} |{'open':>6}{'workers':>9} |"
        f"{'private':>8}{'shared':>8} |{'private':>8}{'shared':>8}",
    ]
    for size, (build, starts) in zip(sizes, results, strict=True):
        opening, answering = (
            max(getattr(start, f"{x}_seconds") for start in starts) for x in ("open", "workers")
        )
        worker, rank = (
            _worst([m for start in starts for m in start.workers]),
            _worst([s.rank for s in starts]),
        )
        lines.append(
            f"{size:>9} |{build.seconds:>8.2f}{build.file_bytes / 1e6:>9.1f}{build.list_bytes / 1e6:>9.1f} |"
            f"{opening:>6.2f}{answering:>9.2f} |{worker.private / 1e6:>8.1f}{worker.shared / 1e6:>8.1f} |"
            f"{rank.private / 1e6:>8.1f}{rank.shared / 1e6:>8.1f}"
        )
    return "\n".join([*lines, _growth(sizes, results)])


def _growth(sizes: list[int], results: list[tuple[Build, list[Start]]]) -> str:
    """What the number of images changes, in words."""
    (least, least_starts), (most, most_starts) = results[0], results[-1]
    before, after = (
        _worst([m for start in starts for m in start.workers]) for starts in (least_starts, most_starts)
    )
    return (
        f"from {sizes[0]} to {sizes[-1]} images the time to build the index grows "
        f"{most.seconds / least.seconds:.1f} times and its file {most.file_bytes / least.file_bytes:.1f} "
        f"times; the memory of that file is shared by all. A worker's private memory grows by "
        f"{(after.private - before.private) / 1e6:.1f} MB, where a list of the names would add "
        f"{(most.list_bytes - least.list_bytes) / 1e6:.1f} MB to each"
    )


def _worst(memories: list[Memory]) -> Memory:
    return Memory(max(m.private for m in memories), max(m.shared for m in memories))
