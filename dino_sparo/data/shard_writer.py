"""Writes images into tar shards, each as a whole or not at all, in several processes."""

import multiprocessing
import signal
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dino_sparo.data.decode import UNREADABLE, UnreadableImageError, decode, open_image, problem_of
from dino_sparo.data.index import FolderSource
from dino_sparo.data.shards import ImageOfShard, Shard
from dino_sparo.data.tables import TableSource
from dino_sparo.data.tars import BLOCK
from dino_sparo.errors import UserError
from dino_sparo.files import atomic_write
from dino_sparo.parallel.processes import end_with_parent
from dino_sparo.terminal import shows_bars

JPEG_QUALITY = 95
JPEG_ENDINGS = (".jpg", ".jpeg")


@dataclass(frozen=True, eq=False)
class Job:
    """The shards of one split, and what they are made of."""

    source: FolderSource | TableSource
    folder: Path
    short_side: int | None
    images_per_shard: int

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers of all images."""
        return self.source.labels

    @property
    def num_shards(self) -> int:
        """How many there will be."""
        return -(-len(self.source) // self.images_per_shard)

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{number:06d}.tar"

    def images(self, number: int) -> range:
        """The images in a shard, by their number in the source."""
        first = number * self.images_per_shard
        return range(first, min(first + self.images_per_shard, len(self.source)))

    def missing(self) -> list[int]:
        """The shards that are not there yet; those that are were whole when they got their name."""
        return [number for number in range(self.num_shards) if not self.shard(number).exists()]


def write_shards(jobs: list[Job], num_workers: int) -> dict[Path, Shard]:
    """Write all shards that are not there yet, in so many processes, 0: in this one; what is in them.

    Raises:
        UserError: an image cannot be read, or a process has died.
        OSError: a shard cannot be written.
    """
    todo = [(position, number) for position, job in enumerate(jobs) for number in job.missing()]
    total = sum(len(job.source) for job in jobs)
    done = total - sum(len(jobs[position].images(number)) for position, number in todo)
    written: dict[Path, Shard] = {}
    with tqdm(desc="shards", total=total, initial=done, unit="img", disable=not shows_bars()) as bar:
        for path, shard in _written(jobs, todo, num_workers):
            written[path] = shard
            bar.update(len(shard.sizes))
    return written


def _written(jobs: list[Job], todo: list[tuple[int, int]], num_workers: int) -> Iterator[tuple[Path, Shard]]:
    """Write these shards, given by their job's position and their number; each when it is done."""
    if num_workers == 0:
        for position, number in todo:
            yield _write_shard(jobs[position], number)
    elif todo:
        with _workers(jobs, min(num_workers, len(todo))) as pool:
            for done in as_completed([pool.submit(_write_one, *which) for which in todo]):
                yield done.result()


@contextmanager
def _workers(jobs: list[Job], number: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that write shards; after an error none goes on."""
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of threads
    pool = ProcessPoolExecutor(number, context, _start_worker, (jobs,))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            "a process that writes shards has died; give fewer --num-workers if memory ran out, then the "
            "same command goes on"
        ) from error
    except BaseException:
        for child in multiprocessing.active_children():
            if child not in others:
                child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_jobs: list[Job] = []  # of a worker process


def _start_worker(jobs: list[Job]) -> None:
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    _jobs[:] = jobs


def _write_one(position: int, number: int) -> tuple[Path, Shard]:
    return _write_shard(_jobs[position], number)


def _write_shard(job: Job, number: int) -> tuple[Path, Shard]:
    """Write a shard under another name, then rename it; its file and what a reader will find in it."""
    path = job.shard(number)
    images = []
    with (
        atomic_write(path, path.with_name(f".{path.name}.part")) as file,
        # As GNU tar writes: names of any length in any encoding. Equal images make equal shards.
        tarfile.open(
            fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
        ) as archive,
    ):
        for image in job.images(number):
            name, data = _sample(job, image)
            offset = _add(archive, name, data)
            label = None if job.labels is None else str(job.labels[image])
            if label is not None:
                _add(archive, f"{name.rpartition('.')[0]}.cls", label.encode())
            images.append(ImageOfShard(name, offset, len(data), label))
    return path, Shard.of(images)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file; the offset of its bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, BytesIO(data))
    archive.members.clear()  # type: ignore[attr-defined]  # which would hold all of them
    return archive.offset - -(-len(data) // BLOCK) * BLOCK


def _sample(job: Job, image: int) -> tuple[str, bytes]:
    """Name and bytes of an image in a shard."""
    name, data = job.source.index.name(image), b""
    try:
        data = job.source.read(image)
        return (name, data) if job.short_side is None else _reduced(name, data, job.short_side)
    except UNREADABLE as error:
        raise UnreadableImageError(
            job.source.name(image),
            problem_of(data, error)[1],
            "repair or remove the file, then start again with a new --out if that changes the images",
        ) from error


def _reduced(name: str, data: bytes, short_side: int) -> tuple[str, bytes]:
    """The image itself unless its short side is longer; else a JPEG file of it at that short side."""
    with open_image(data) as image:
        short, long = sorted(image.size)
    if short <= short_side:
        return name, data
    buffer = BytesIO()
    decode(data, max(short_side, round(long * short_side / short))).save(buffer, "JPEG", quality=JPEG_QUALITY)
    stem, _, ending = name.rpartition(".")
    return name if f".{ending}".lower() in JPEG_ENDINGS else f"{stem}.jpg", buffer.getvalue()
