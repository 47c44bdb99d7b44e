"""`dino-sparo shard`: tar shards of webdataset's layout from a folder of images, as they are or reduced."""

import hashlib
import json
import os
import shlex
import shutil
import tarfile
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dino_sparo.data.index import FolderSource, keep_index
from dino_sparo.data.shard_writer import Job, write_shards
from dino_sparo.data.shards import (
    INDEX_FILE,
    RECORD,
    Shard,
    ShardIndex,
    is_finished,
    is_plain,
    is_shard,
    key_of,
    pack_shards,
)
from dino_sparo.data.sources import open_images, open_val
from dino_sparo.data.tables import TableSource
from dino_sparo.errors import UserError
from dino_sparo.files import atomic_write
from dino_sparo.options import ShardOptions
from dino_sparo.parallel.processes import only_writer

IMAGES_PER_SHARD = 2000  # of ImageNet 220 MB, so that it has 641 shards
UNFINISHED_RECORD = f"{RECORD}.part"
SPLITS = ("val", "train")  # in the order in which they are finished: with train all is there


def shard(
    source: str,
    out: str,
    short_side: int | None = None,
    num_workers: int | None = None,
    images_per_shard: int = IMAGES_PER_SHARD,
) -> None:
    """Write the images of a folder into shards, in its order, and print what there is.

    A source with train and val becomes out/train and out/val, any other shards in `out` itself. A shard gets
    its name when it is whole, the index comes last; the same command goes on where it was killed, and does
    nothing if all is done.

    Args:
        source: a folder of images, as `data.path` takes it.
        out: folder for the shards; created if it does not exist.
        short_side: images with a longer short side are reduced to it, in pixels, and become JPEG files; None
            copies all files as they are.
        num_workers: processes that write, one a core if None; 0 writes in this one.
        images_per_shard: images in every shard but the last.

    Raises:
        UserError: there are no images, two of them have one key, an image cannot be read, `out` holds
            something else or has no room.
        OSError: the file system refuses.
    """
    if short_side is not None and short_side < 1:
        raise UserError(f"--short-side is {short_side}; expected a number of pixels above 0, or null")
    jobs = _plan(source, Path(out), short_side, images_per_shard)
    workers = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    _check_out(Path(out), jobs)
    Path(out).mkdir(parents=True, exist_ok=True)
    with only_writer(Path(out)):
        sizes = [_begin(job) for job in jobs]
        _check_space(Path(out), jobs, sizes)
        written = write_shards(jobs, workers)
        for job in jobs:
            _finish(job, written)
    print(_summary(out, jobs))


def _plan(source: str, out: Path, short_side: int | None, images_per_shard: int) -> list[Job]:
    """One job a split. All is checked here that can be before anything is looked at in `out`."""
    found = {"train": open_images(source, key="DIR"), "val": open_val(source)}
    jobs = []
    for split in SPLITS:
        images = found[split]
        if images is None:
            continue
        if not isinstance(images, FolderSource | TableSource):
            raise UserError(
                f"DIR {source!r} is no folder of images, but shards, generated pictures or a set by name"
            )
        if out.resolve().is_relative_to(images.root.resolve()):
            raise UserError(
                f"--out {str(out)!r} lies among the images of {images.root}; choose a folder outside"
            )
        _check_names(images, short_side)
        folder = out / split if found["val"] is not None else out
        jobs.append(Job(images, folder, short_side, images_per_shard))
    return jobs


def _check_names(source: FolderSource | TableSource, short_side: int | None) -> None:
    """Refuse images that could not be told apart in a shard, where the first dot ends a sample's key."""
    names = map(source.index.name, range(len(source)))
    for _, group in groupby(names, key=key_of):
        same = list(group)
        plain = [name for name in same if is_plain(name)]
        if plain and (len(plain) < len(same) or (short_side is not None and len(same) > 1)):
            one, other = same[:2]
            raise UserError(
                f"{source.root / one} and {other!r} would be one sample of a shard, as the first dot ends "
                f"its key; rename one of them"
            )


def _check_out(out: Path, jobs: list[Job]) -> None:
    """Refuse a folder that holds something else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {str(out)!r} is a file; give a folder")
    folders = {job.folder for job in jobs}
    for folder in {out, *folders}:
        there = sorted(os.listdir(folder)) if folder.is_dir() else []
        ours = {UNFINISHED_RECORD, *(inner.name for inner in folders if inner.parent == folder)}
        if RECORD in there:
            ours |= {name for name in there if is_shard(name) or name.startswith((".", INDEX_FILE))}
        foreign = [name for name in there if name not in ours]
        if foreign:
            raise UserError(
                f"--out {str(out)!r} holds other things ({folder / foreign[0]}); choose another or a new "
                f"folder"
            )


def _begin(job: Job) -> NDArray[np.int64]:
    """Write down what the shards are made of, or refuse those made of something else; sizes in bytes."""
    stats = job.source.stats()[:, :2]
    record = {
        "source": str(job.source.root.resolve()),  # for people
        "images": job.source.fingerprint(),
        "files": hashlib.sha256(stats.tobytes()).hexdigest(),
        "short_side": job.short_side,
        "images_per_shard": job.images_per_shard,
    }
    path = job.folder / RECORD
    if path.exists():
        try:
            before = json.loads(path.read_text())
            differ = [name for name in record if name != "source" and before[name] != record[name]]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged; remove {job.folder} and write it again") from error
        if differ:
            what = f"--short-side {before['short_side']}" if differ == ["short_side"] else "other images"
            raise UserError(
                f"{job.folder} was made with {what}, or {before['source']} has changed since; choose another "
                f"--out or remove it"
            )
    else:
        job.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, path.with_name(UNFINISHED_RECORD)) as file:
            file.write(json.dumps(record).encode())
    return stats[:, 0]


def _check_space(out: Path, jobs: list[Job], sizes: list[NDArray[np.int64]]) -> None:
    """Refuse to begin what the disk has no room for. An image that is reduced is taken for its short side's
    square in bytes at most: twice as long as wide at half a byte a pixel."""
    needed = 0
    for job, of_files in zip(jobs, sizes, strict=True):
        bound = of_files if job.short_side is None else np.minimum(of_files, job.short_side**2)
        in_tar = -(-bound // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + 3 * tarfile.BLOCKSIZE
        needed += sum(int(in_tar[job.images(n).start : job.images(n).stop].sum()) for n in job.missing())
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"--out {str(out)!r}: the shards need about {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB "
            f"are free; make room or choose another disk"
        )


def _finish(job: Job, written: dict[Path, Shard]) -> None:
    """Write the index of the shards, unless it is there; with it they can be read. Only those that an earlier
    start wrote are looked at again."""
    if is_finished(job.folder):
        return
    known = {path.name: shard for path, shard in written.items() if path.parent == job.folder}
    index = keep_index(ShardIndex, job.folder / INDEX_FILE, pack_shards(job.folder, known))
    same = job.short_side is not None or index.fingerprint == job.source.fingerprint()
    if len(index) != len(job.source) or not same:
        (job.folder / INDEX_FILE).unlink()
        raise UserError(
            f"{job.folder} holds {len(index)} images that are not the {len(job.source)} of "
            f"{job.source.root}; remove it and write it again"
        )


def _summary(out: str, jobs: list[Job]) -> str:
    """What was written, and what to run next."""
    lines = []
    for job in jobs:
        num_bytes = sum(job.shard(number).stat().st_size for number in range(job.num_shards))
        classes = f", {len(job.source.classes)} classes" if job.labels is not None else ""
        lines.append(
            f"{job.folder}: {len(job.source)} images in {job.num_shards} shards, {num_bytes / 1e9:.2f} GB"
            f"{classes}"
        )
    return "\n".join([*lines, f"next: dino-sparo pretrain --data.path {shlex.quote(out)} ..."])


def run(options: ShardOptions) -> None:
    """`dino-sparo shard`."""
    shard(options.source, options.out, options.short_side, options.num_workers)
