"""`dino-sparo shard`: write the images of a folder, copied or reduced, to tar shards in webdataset's layout.

Several processes write the shards of a split, each shard atomically.
"""

import hashlib
import json
import multiprocessing
import shlex
import signal
import tarfile
from collections import Counter
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dino_sparo.data.decode import (
    UnreadableImageError,
    decode,
    is_deep,
    open_image,
    problem_of,
    stored_size,
)
from dino_sparo.data.index import FolderSource, current_index, keep_index
from dino_sparo.data.shards import (
    INDEX_FILE,
    RECORD,
    ImageOfShard,
    Shard,
    is_plain,
    is_shard,
    key_of,
    pack_shards,
    shards_are_current,
)
from dino_sparo.data.sources import AS_FOUND, hold_out, open_images, open_val
from dino_sparo.data.splits import Choice
from dino_sparo.data.tables import TableSource
from dino_sparo.errors import UserError
from dino_sparo.files import alone_in, atomic_write, check_space, parsed_json, read_as, write_file
from dino_sparo.parallel.processes import cores, end_with_parent
from dino_sparo.prepare import check_out
from dino_sparo.terminal import shows_bars

IMAGES_PER_SHARD = 2000  # 220 MB and 641 shards for ImageNet
JPEG_QUALITY = 95


@dataclass(frozen=True, eq=False)
class Split:
    """The shards of a split and their images."""

    source: FolderSource | TableSource
    folder: Path
    short_side: int | None
    images_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.source) // self.images_per_shard)

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / f"{number:06d}.tar"

    def images(self, number: int) -> range:
        """The images in a shard, by their number in the source."""
        first = number * self.images_per_shard
        return range(first, min(first + self.images_per_shard, len(self.source)))

    def missing(self) -> list[int]:
        """The numbers of the shards that do not exist yet; existing ones are complete."""
        return [number for number in range(self.num_shards) if not self.shard(number).exists()]


def shard(
    source: str,
    out: str,
    short_side: int | None = None,
    num_workers: int | None = None,
    images_per_shard: int = IMAGES_PER_SHARD,
    *,
    every: int | None = None,
    choice: Choice = AS_FOUND,
) -> None:
    """Write the images of a folder to shards, in their order, and print a summary.

    A source with train and val is written to out/train and out/val, any other to `out`. A shard gets its
    final name when it is complete, and the index is written last; the same command resumes an interrupted
    one, and does nothing if everything is done.

    Args:
        source: a folder of images, as for `data.path`.
        out: folder for the shards; created if it does not exist.
        short_side: in pixels; images with a longer short side are reduced to it and stored as JPEG. None: all
            files are copied.
        num_workers: processes that write. None: one per core; 0: this process.
        images_per_shard: images in each shard except the last.
        every: every so many-th image of train becomes val, in the order of class and name; val of the source
            is not read. None: train and val of the source.
        choice: how images are read, as by `data.max_pixels` and `data.value_range`.

    Raises:
        UserError: there are no images, two of them have the same key, an image cannot be read, or `out` holds
            something else or has too little space.
        OSError: `out` cannot be written.
    """
    if short_side is not None and short_side < 1:
        raise UserError(f"--short-side is {short_side}; expected a number of pixels above 0, or null")
    splits = _plan(source, Path(out), short_side, images_per_shard, every, choice)
    workers = cores() if num_workers is None else num_workers
    folders = {Path(out)} | {split.folder for split in splits}
    for folder in folders:
        check_out(folder, [split.source.root for split in splits], partial(_is_ours, folder, folders))
    Path(out).mkdir(parents=True, exist_ok=True)
    with alone_in(Path(out), wait=False):
        sizes = [_begin(split) for split in splits]
        _check_space(Path(out), splits, sizes)
        for split in splits:
            _finish(split, _write_shards(split, workers))
    print(_summary(out, splits))


def _plan(
    source: str,
    out: Path,
    short_side: int | None,
    images_per_shard: int,
    every: int | None,
    choice: Choice,
) -> list[Split]:
    """The splits of a source, train last. Checks everything that can be checked without `out`."""
    train = open_images(source, key="DIR", choice=choice)
    if every is not None and not 2 <= every <= len(train):
        raise UserError(
            f"--hold_out is {every}; expected a number from 2 to {len(train)}, the number of images of train"
        )
    train, val = hold_out(train, every) if every else (train, open_val(source, choice, train))
    splits = []
    for name, images in (("val", val), ("train", train)):  # train last: where it exists, all is complete
        if images is None:
            continue
        if not isinstance(images, FolderSource | TableSource):
            raise UserError(
                f"DIR {source!r} holds shards, generated pictures, or a dataset by name; give a folder of "
                f"images"
            )
        if images.index.header.get("class_level"):
            raise UserError(
                f"DIR {source!r}: {name} is in several folders, such as {images.index.name(0)}, which would "
                f"become classes; link their images into one folder"
            )
        _check_names(images, short_side)
        folder = out / name if val is not None else out
        splits.append(Split(images, folder, short_side, images_per_shard))
    return splits


def _is_ours(folder: Path, folders: set[Path], name: str) -> bool:
    """Whether a name is one of `folders` or, in a folder of shards, that of a shard or the index."""
    is_file = is_shard(name) or name.startswith(INDEX_FILE)
    return folder / name in folders or (is_file and (folder / RECORD).exists())


def _check_names(source: FolderSource | TableSource, short_side: int | None) -> None:
    """Raises UserError if two images have the same key: a key of webdataset ends at the first dot. Reduced
    images get the ending .jpg, so their names without endings differ too."""
    names = (source.index.name(source.position(image)) for image in range(len(source)))
    for _, group in groupby(names, key=key_of):
        same = list(group)
        plain = [name for name in same if is_plain(name)]
        dotted = [name for name in same if name not in plain]
        stems = Counter(name.rpartition(".")[0] for name in same)
        twice = [name for name in same if short_side is not None and stems[name.rpartition(".")[0]] > 1]
        if (plain and dotted) or twice:
            one, other = twice[:2] if twice else (plain[0], dotted[0])
            raise UserError(
                f"{source.root / one} and {other!r} have the same key or name in a shard, where keys end "
                f"at the first dot and reduced images are .jpg files; rename one of them"
            )


def _begin(split: Split) -> NDArray[np.int64]:
    """Record what the shards are made from; returns the file sizes in bytes.

    Raises UserError if existing shards were made from something else.
    """
    stats = split.source.stats()[:, :2]
    record: dict[str, Any] = {
        "source": str(split.source.root.resolve()),  # only for messages
        "images": split.source.fingerprint(),
        "files": hashlib.sha256(stats.tobytes()).hexdigest(),
        "short_side": split.short_side,
        "images_per_shard": split.images_per_shard,
    }
    if split.short_side is not None and (value_range := split.source.reading.value_range):
        record["value_range"] = list(value_range)
    path = split.folder / RECORD
    if path.exists():
        with read_as(f"{path} is damaged", f"remove {split.folder} and start again"):
            before = dict(parsed_json(path))
            source, side = before["source"], before["short_side"]
        differ = [name for name in record if name != "source" and before.get(name) != record[name]]
        if differ:
            what = f"--short-side {side}" if differ == ["short_side"] else "other images"
            raise UserError(
                f"{split.folder} was made with {what}, or {source} has changed since; choose "
                f"another --out or remove {split.folder}"
            )
    else:
        split.folder.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(record))
    return stats[:, 0]


def _check_space(out: Path, splits: list[Split], sizes: list[NDArray[np.int64]]) -> None:
    """Raises UserError if the disk has too little space.

    A reduced image is assumed to need at most short_side ** 2 bytes, as if it were twice as long as wide and
    had half a byte per pixel.
    """
    needed = 0
    for split, of_files in zip(splits, sizes, strict=True):
        bound = of_files if split.short_side is None else np.minimum(of_files, split.short_side**2)
        in_tar = -(-bound // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + 3 * tarfile.BLOCKSIZE
        needed += sum(
            int(in_tar[split.images(n).start : split.images(n).stop].sum()) for n in split.missing()
        )
    check_space(out, needed, f"--out {str(out)!r}: the shards need about")


def _finish(split: Split, written: dict[str, Shard]) -> None:
    """Write the index of the shards unless it exists; only shards of earlier starts are read for it."""
    path = split.folder / INDEX_FILE
    if current_index(path, split.folder, shards_are_current) is not None:
        return
    index = keep_index(path, pack_shards(split.folder, written))
    same = split.short_side is not None or index.fingerprint == split.source.fingerprint()
    if len(index) != len(split.source) or not same:
        path.unlink()
        raise UserError(
            f"{split.folder} holds {len(index)} images, expected the {len(split.source)} of "
            f"{split.source.root}; remove {split.folder} and start again"
        )


def _summary(out: str, splits: list[Split]) -> str:
    """Text about the shards, and the next command."""
    lines = []
    for split in splits:
        num_bytes = sum(split.shard(number).stat().st_size for number in range(split.num_shards))
        classes = f", {len(split.source.classes)} classes" if split.source.labels is not None else ""
        lines.append(
            f"{split.folder}: {len(split.source)} images in {split.num_shards} shards, "
            f"{num_bytes / 1e9:.2f} GB{classes}"
        )
    return "\n".join([*lines, f"next: dino-sparo pretrain --data.path {shlex.quote(out)} ..."])


def _write_shards(split: Split, num_workers: int) -> dict[str, Shard]:
    """Write all missing shards; returns their contents by file name."""
    todo, total = split.missing(), len(split.source)
    done = total - sum(len(split.images(number)) for number in todo)
    written: dict[str, Shard] = {}
    with (
        tqdm(desc="shards", total=total, initial=done, unit="img", disable=not shows_bars()) as bar,
        closing(_write(split, todo, min(num_workers, len(todo)))) as shards,
    ):
        for name, shard in shards:
            written[name] = shard
            bar.update(len(shard.sizes))
    return written


def _write(split: Split, numbers: list[int], num_workers: int) -> Generator[tuple[str, Shard], None, None]:
    """Write shards, and yield name and content of each when it is done; errors end all processes."""
    if num_workers == 0:
        for number in numbers:
            yield _write_shard(split, number)
        return
    others = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")  # a fork would inherit locks of threads
    pool = ProcessPoolExecutor(num_workers, context, _start_worker, (split,))
    try:
        for done in as_completed([pool.submit(_write_one, number) for number in numbers]):
            yield done.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that writes shards has died; use fewer --num-workers if it was out of memory, then "
            "start again to resume"
        ) from error
    except BaseException:
        for child in multiprocessing.active_children():
            if child not in others:
                child.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_split: list[Split] = []  # of a worker process


def _start_worker(split: Split) -> None:
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    _split[:] = [split]


def _write_one(number: int) -> tuple[str, Shard]:
    return _write_shard(_split[0], number)


def _write_shard(split: Split, number: int) -> tuple[str, Shard]:
    """Write a shard atomically; returns its file name and content."""
    path, labels, images = split.shard(number), split.source.labels, []
    with (
        atomic_write(path, path.with_name(f".{path.name}.part")) as file,
        # GNU format: names of any length and encoding. The same images give the same bytes.
        tarfile.open(
            fileobj=file, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
        ) as archive,
    ):
        for image in split.images(number):
            name, data = _sample(split, image)
            offset = _add(archive, name, data)
            label = None if labels is None else str(labels[image])
            if label is not None:
                _add(archive, f"{name.rpartition('.')[0]}.cls", label.encode())
            images.append(ImageOfShard(name, offset, len(data), label))
    return path.name, Shard.of(images)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file; returns the offset of its data."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, BytesIO(data))
    archive.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps all members in memory
    return archive.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _sample(split: Split, image: int) -> tuple[str, bytes]:
    """Name and bytes of an image in a shard: the original file, or a reduced JPEG file."""
    name = split.source.index.name(split.source.position(image))
    data, limit = b"", split.short_side
    try:
        data = split.source.read(image)
        if limit is None:
            return name, data
        with open_image(data, split.source.reading) as opened:
            short, long = sorted(stored_size(opened))
            unclear = is_deep(opened) and split.source.reading.value_range is None
        if short <= limit:
            return name, data
        if unclear:
            raise OSError("its pixels have more than 8 bits, those of JPEG have 8; set --value_range")
        buffer, max_side = BytesIO(), max(limit, round(long * limit / short))
        decode(data, max_side, split.source.reading).save(buffer, "JPEG", quality=JPEG_QUALITY)
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise UnreadableImageError(
            split.source.name(image),
            problem_of(data, error)[1],
            "repair or remove the file, then start again with a new --out if that changes the images",
        ) from error
    stem, _, ending = name.rpartition(".")
    return name if ending.lower() in ("jpg", "jpeg") else f"{stem}.jpg", buffer.getvalue()
